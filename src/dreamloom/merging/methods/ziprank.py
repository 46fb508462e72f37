"""ZipRank: a learned weight for every direction of every update."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors, find_spectrum, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod
from dreamloom.merging.prepared import LEARNING, take_mask


def zip_directions(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add updates whose singular directions are masked: ΔW = Σ wₖ Uₖ diag(mₖ) Σₖ Vₖᵀ.

    Directions between two factors mean nothing by themselves: another way to split the update has
    others. Its singular directions are its own. There are far fewer of them than inputs, so there
    is less to learn than for ZipLoRA. The masks are prepared with the base model.

    Source:
        Roy et al., DuoLoRA (arXiv:2504.13206): masks on the rank axis. That they stand on the
        singular values is what makes them independent of the split.

    Raises:
        ConfigError: If nothing was learned for the layer.
    """
    if len(parts) == 1:
        return stack([(part.factors, part.weight) for part in parts])
    zipped = []
    for part in parts:
        directions = split_directions(part.factors)
        mask = take_mask(part, context, directions.rank)
        zipped.append((mask_directions(directions, mask), part.weight))
    return stack(zipped)


def split_directions(factors: Factors) -> Factors:
    """Split an update into its singular directions, the strongest first."""
    spectrum = find_spectrum(factors)
    return spectrum.truncate(len(spectrum.values))


def mask_directions(factors: Factors, mask: Float[Tensor, " rank"]) -> Factors:
    """Multiply each direction of an update by a number."""
    return Factors(factors.up * mask.to(factors.up), factors.down)


METHODS = (
    MergeMethod(
        name="ziprank",
        summary="A learned weight for every direction of every update, so that each adapter's "
        "prompts are answered as by it alone.",
        formula="ΔW = Σ wₖ Uₖ diag(mₖ) Σₖ Vₖᵀ, m by descent on ‖ε_merged − εₖ‖² + λ overlap",
        source="Roy et al., DuoLoRA: Cycle-consistent and Rank-disentangled Content-Style "
        "Personalization (arXiv:2504.13206), its ZipRank without layer priors and cycle loss",
        merge=zip_directions,
        needs="training",
        options=LEARNING,
    ),
)
