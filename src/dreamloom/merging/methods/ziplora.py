"""ZipLoRA: a learned weight for every input of every layer, adapter by adapter."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod
from dreamloom.merging.prepared import LEARNING, take_mask


def zip_columns(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add updates whose columns are masked: ΔW = Σ wₖ ΔWₖ diag(mₖ).

    A column is what a layer does with one of its inputs. Masking the columns of up · down masks
    those of down, so the result is a LoRA again, exactly, whose rank is that of the parts
    together. The masks are prepared: they are learned with the base model, so that the merge says
    on each adapter's prompts what that adapter says alone.

    Source:
        Shah et al., ZipLoRA (arXiv:2311.13600), section 3.3; the factored form is ours.

    Raises:
        ConfigError: If nothing was learned for the layer.
    """
    if len(parts) == 1:
        return stack([(part.factors, part.weight) for part in parts])
    return stack(
        [
            (
                mask_columns(part.factors, take_mask(part, context, part.factors.shape[1])),
                part.weight,
            )
            for part in parts
        ]
    )


def mask_columns(factors: Factors, mask: Float[Tensor, " inputs"]) -> Factors:
    """Multiply each column of an update by a number, without multiplying it out."""
    return Factors(factors.up, factors.down * mask.to(factors.down))


METHODS = (
    MergeMethod(
        name="ziplora",
        summary="A learned weight for every input of every layer, so that each adapter's prompts "
        "are answered as by it alone.",
        formula="ΔW = Σ wₖ ΔWₖ diag(mₖ), m by gradient descent on ‖ε_merged − εₖ‖² + λ |mᵢ·mⱼ|",
        source="Shah et al., ZipLoRA: Any Subject in Any Style by Effectively Merging LoRAs "
        "(arXiv:2311.13600), section 3.3",
        merge=zip_columns,
        needs="training",
        options=LEARNING,
    ),
)
