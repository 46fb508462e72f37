"""DARE and DELLA: drop entries at random, and rescale the rest to make up for it."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import ConfigError
from dreamloom.merging.elementwise import (
    REDUCE,
    SCALE,
    Entries,
    Trim,
    density_option,
    election_option,
    merge_entries,
)
from dreamloom.merging.method import Context, MergeMethod, Option
from dreamloom.merging.spaces import space_option


def drop_at_random(entries: Entries, context: Context, rng: torch.Generator) -> Trim:
    """Keep each entry with a chance, and divide it by that: the expected update stays.

    With p = 1 - density, the noise has p / (1 - p) times the update's energy. The dice are thrown
    once for each entry, in the order of rows.

    Source:
        DARE (Yu et al., arXiv:2311.03099), drop and rescale: m ~ Bernoulli(p), (1 - m) δ / (1 - p).
    """
    del entries  # all have the same chance
    density = context.number("density")

    def trim(block: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        kept = torch.rand(block.shape, generator=rng) < density
        return block.where(kept, 0) / density

    return trim if density < 1 else lambda block: block


def keep_chances(
    block: Float[Tensor, "rows columns"], density: float, spread: float
) -> Float[Tensor, "rows columns"]:
    """The chance of each entry: it rises with its rank in its row by equal steps.

    The smallest of a row has density - spread, the largest density + spread; a single one density.

    Source:
        DELLA (Deep et al., arXiv:2406.11617), MagPrune with ranks by row; steps of 2 ε / (n - 1),
        so that both ends are reached.
    """
    columns = block.shape[1]
    order = block.abs().argsort(dim=1, stable=True)
    steps = torch.linspace(density - spread, density + spread, columns) if columns > 1 else density
    chances = torch.empty_like(block)
    return chances.scatter_(1, order, torch.as_tensor(steps).expand(block.shape))


def drop_small_ones(entries: Entries, context: Context, rng: torch.Generator) -> Trim:
    """Keep each entry with its chance, and divide it by that: the expected update stays.

    The mean chance is ``density``; at 1 all are kept. ``spread`` is how much more the largest of a
    row has, and how much less the smallest. The dice are thrown once for each entry, in the order
    of rows.

    Raises:
        ConfigError: If a chance would be 0 or less, or above 1.

    Source:
        DELLA (Deep et al., arXiv:2406.11617), MagPrune.
    """
    del entries  # chances are those of a row
    density, spread = context.number("density"), context.number("spread")
    if density >= 1:
        return lambda block: block
    if density <= spread or density + spread > 1:
        raise ConfigError(
            f"A density of {density:g} with a spread of {spread:g} asks for chances from "
            f"{density - spread:g} to {density + spread:g}.",
            "They must be above 0 and at most 1: lower the spread.",
        )

    def trim(block: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        chances = keep_chances(block, density, spread)
        kept = torch.rand(block.shape, generator=rng) < chances
        return block.where(kept, 0) / chances

    return trim


METHODS = (
    MergeMethod(
        name="dare",
        summary="The sum of what is left when entries are dropped at random and the rest made up.",
        formula="ΔW = λ Σ wᵢ mᵢ ∘ ΔWᵢ / d, mᵢ ~ Bernoulli(d)",
        source="Yu et al., Language Models are Super Mario (arXiv:2311.03099)",
        merge=partial(merge_entries, make_trim=drop_at_random),
        needs="entries",
        options=(
            density_option(0.9, "The chance that an entry is kept, 1 - p of the paper."),
            election_option("none"),
            REDUCE,
            SCALE,
            space_option("dense"),
        ),
        keeps_one=False,
        throws_dice=True,
    ),
    MergeMethod(
        name="della",
        summary="Like DARE, but small entries are dropped more often; then a sign is elected.",
        formula="ΔW = λ Σ [sgn τ̂ᵢ = γ] τ̂ᵢ, τ̂ᵢ = mᵢ ∘ wᵢ ΔWᵢ / pᵢ, mᵢ ~ Bernoulli(pᵢ), "
        "pᵢ from d - ε to d + ε by rank in the row",
        source="Deep et al., DELLA-Merging (arXiv:2406.11617)",
        merge=partial(merge_entries, make_trim=drop_small_ones),
        needs="entries",
        options=(
            density_option(0.9, "The mean chance that an entry is kept."),
            Option(
                "spread",
                0.1,
                "How much the chance of the largest entry of a row is above the mean.",
                low=0.0,
                high=0.5,
            ),
            election_option("weighted"),
            REDUCE,
            SCALE,
            space_option("dense"),
        ),
        keeps_one=False,
        throws_dice=True,
    ),
)
