"""DELLA: drop entries at random, small ones more often, and make up for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import ConfigError
from dreamloom.merging.entries import (
    REDUCE,
    SCALE,
    Trim,
    density_option,
    election_option,
    merge_entries,
)
from dreamloom.merging.method import Context, LayerPart, Merged, MergeMethod, Option
from dreamloom.merging.spaces import space_option


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


def drop_small_ones(density: float, spread: float, rng: torch.Generator) -> Trim:
    """Keep each entry with its chance, and divide it by that: the expected update stays.

    Args:
        density: The mean chance, above 0, up to 1; at 1 all are kept.
        spread: How much more the largest of a row has, and how much less the smallest.
        rng: Thrown once for each entry, in the order of rows.

    Raises:
        ConfigError: If a chance would be 0 or less, or above 1.

    Source:
        DELLA (Deep et al., arXiv:2406.11617), MagPrune.
    """
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


def merge_della(parts: Sequence[LayerPart], context: Context) -> Merged:
    """Drop entries of each weighted update by their magnitude, elect signs, and add up.

    Source:
        DELLA (Deep et al., arXiv:2406.11617): drop, elect, fuse.
    """
    density, spread = context.number("density"), context.number("spread")
    return merge_entries(
        parts,
        context,
        context.word("space"),
        lambda _, rng: drop_small_ones(density, spread, rng),
    )


METHODS = (
    MergeMethod(
        name="della",
        summary="Like DARE, but small entries are dropped more often; then a sign is elected.",
        formula="ΔW = λ Σ [sgn τ̂ᵢ = γ] τ̂ᵢ, τ̂ᵢ = mᵢ ∘ wᵢ ΔWᵢ / pᵢ, mᵢ ~ Bernoulli(pᵢ), "
        "pᵢ from d - ε to d + ε by rank in the row",
        source="Deep et al., DELLA-Merging (arXiv:2406.11617)",
        merge=merge_della,
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
    ),
)
