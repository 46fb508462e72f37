"""Iso-C: the sum of LoRAs with its spectrum flattened, all directions equally strong."""

from __future__ import annotations

from collections.abc import Sequence

from dreamloom.merging.factors import Factors, find_spectrum, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod, Option

# A direction below this share of the strongest is what rounding left of float32 factors that repeat
# each other; made as strong as the rest it would be noise.
_NOISE = 1e-5


def add_isotropic(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add weighted updates, and make all directions of the sum equally strong.

    No direction outshines another any more, which helped models merged from many tasks. Only the
    directions that the adapters span are made equal: over a whole layer's, most of the result would
    be noise. A style lives by its strong directions, so try it with care, and tune ``strength``.
    Where the result is cut to a rank, those stay that were the strongest.

    Source:
        Marczak et al., No Task Left Behind (arXiv:2502.04959), section 4, Iso-C; within the
        adapters' own directions as in Panariello et al., Core Space (arXiv:2509.17786).
    """
    total = stack([(part.factors, part.weight) for part in parts])
    spectrum = find_spectrum(total)
    values = spectrum.values
    count = int((values > _NOISE * values[:1]).sum())
    mean = (values[:count].sum() / max(count, 1)).sqrt()
    up = spectrum.left_vectors()[:, :count] * mean
    down = spectrum.right_vectors()[:count] * mean
    dtype = total.up.dtype
    return Factors(up.to(dtype), down.to(dtype)).scaled(context.number("strength"))


METHODS = (
    MergeMethod(
        name="iso",
        summary="The weighted sum with all its directions made equally strong.",
        formula="ΔW = σ̄ U Vᵀ, U diag(σ) Vᵀ = Σ wᵢ ΔWᵢ, σ̄ = mean of its σ",
        source="Marczak et al. (arXiv:2502.04959), section 4, Iso-C, in core space",
        merge=add_isotropic,
        options=(Option("strength", 1.0, "What the result is multiplied by."),),
        keeps_one=False,
        ordered=True,
    ),
)
