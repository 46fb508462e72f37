"""Task arithmetic: the exact weighted sum of LoRAs."""

from __future__ import annotations

from collections.abc import Sequence

from dreamloom.merging.factors import Factors, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod


def add_updates(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add weighted updates exactly: the merged file draws what the parts draw, worn together.

    The factors are stacked, not added: with up = [w1 up1, w2 up2] and down = [down1; down2] the
    product is w1 ΔW1 + w2 ΔW2. Adding factors instead would mix in cross terms up1 down2.

    Source:
        Block matrix product; task arithmetic (Ilharco et al., arXiv:2212.04089), Eq. 2, on LoRAs.
    """
    return stack([(part.factors, part.weight) for part in parts])


METHODS = (
    MergeMethod(
        name="sum",
        summary="The exact weighted sum: what the adapters draw when they are worn together.",
        formula="ΔW = Σ wᵢ ΔWᵢ",
        source="Ilharco et al., Editing Models with Task Arithmetic (arXiv:2212.04089), section 2",
        merge=add_updates,
    ),
)
