"""DARE: drop entries at random, and make up for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.entries import (
    REDUCE,
    SCALE,
    Trim,
    density_option,
    election_option,
    merge_entries,
)
from dreamloom.merging.method import Context, LayerPart, Merged, MergeMethod
from dreamloom.merging.spaces import space_option


def drop_at_random(density: float, rng: torch.Generator) -> Trim:
    """Keep each entry with a chance, and divide it by that: the expected update stays.

    With p = 1 - density, the noise has p / (1 - p) times the update's energy.

    Args:
        density: The chance, above 0, up to 1.
        rng: Thrown once for each entry, in the order of rows.

    Source:
        DARE (Yu et al., arXiv:2311.03099), drop and rescale: m ~ Bernoulli(p), (1 - m) δ / (1 - p).
    """

    def trim(block: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        kept = torch.rand(block.shape, generator=rng) < density
        return block.where(kept, 0) / density

    return trim if density < 1 else lambda block: block


def merge_dare(parts: Sequence[LayerPart], context: Context) -> Merged:
    """Drop entries of each weighted update at random, rescale the rest, and add up.

    Source:
        DARE (Yu et al., arXiv:2311.03099), drop and rescale, before a sum or before the
        election and the merge of TIES.
    """
    density = context.number("density")
    return merge_entries(
        parts, context, context.word("space"), lambda _, rng: drop_at_random(density, rng)
    )


METHODS = (
    MergeMethod(
        name="dare",
        summary="The sum of what is left when entries are dropped at random and the rest made up.",
        formula="ΔW = λ Σ wᵢ mᵢ ∘ ΔWᵢ / d, mᵢ ~ Bernoulli(d)",
        source="Yu et al., Language Models are Super Mario (arXiv:2311.03099)",
        merge=merge_dare,
        needs="entries",
        options=(
            density_option(0.9, "The chance that an entry is kept, 1 - p of the paper."),
            election_option("none"),
            REDUCE,
            SCALE,
            space_option("dense"),
        ),
        keeps_one=False,
    ),
)
