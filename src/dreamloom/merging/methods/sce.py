"""SCE: where the adapters differ most, weighted by their energy there, without the minority."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.elementwise import (
    SCALE,
    Entries,
    add_agreeing,
    density_option,
    drop_zeros,
    elect_signs,
    make_nothing,
    open_entries,
)
from dreamloom.merging.factors import norm
from dreamloom.merging.magnitudes import find_magnitudes
from dreamloom.merging.method import Context, LayerPart, Merged, MergeMethod
from dreamloom.merging.spaces import space_option

Blocks = list[Float[Tensor, "rows columns"]]

# Entries that differ less than this share of the usual one differ by the rounding of float32.
_ALIKE = 1e-5


def spread_of(blocks: Blocks, least: float) -> Float[Tensor, "rows columns"]:
    """The standard deviation of each entry over the updates; 0 where it is no more than least."""
    mean = torch.stack(blocks).mean(dim=0)
    squares = torch.zeros_like(mean)
    for block in blocks:
        squares += (block - mean).square_()
    spread = (squares / len(blocks)).sqrt_()
    return spread.masked_fill_(spread <= least, 0)


def select_differing(tables: Sequence[Entries], density: float) -> Callable[[slice], Blocks]:
    """Keep, in all updates alike, the share of entries that differ most between them.

    Entries that differ equally stay or go together, so if none differ all stay.

    Returns:
        What gives the rows of a slice, multiplied out and selected.
    """

    def read(rows: slice) -> Blocks:
        return [table.read(rows) for table in tables]

    if density >= 1:
        return read
    count = tables[0].count
    alike = _ALIKE * max(norm(table.update) for table in tables) / count**0.5

    def spreads() -> Iterator[Float[Tensor, "rows columns"]]:
        return (spread_of(read(rows), alike) for rows in tables[0].slices())

    (least,) = find_magnitudes(spreads, [max(1, round(density * count))])

    def select(rows: slice) -> Blocks:
        blocks = read(rows)
        kept = spread_of(blocks, alike) >= least
        return [block.where(kept, 0) for block in blocks]

    return select


def merge_sce(parts: Sequence[LayerPart], context: Context) -> Merged:
    """Select entries of large variance, calculate weights, erase the minority, take the mean.

    The weights ηᵢ = ‖τ̂ᵢ‖² / Σ ‖τ̂ⱼ‖² are the shares of the weighted updates in the energy of what
    was selected; a user's weight counts there and in what is averaged. One adapter alone has no
    variance, and passes whole.

    Source:
        SCE (Wan et al., FuseChat, arXiv:2408.07990): select, calculate, erase.
    """
    alive = drop_zeros(parts)
    if not alive:
        return make_nothing(parts)
    coordinates, tables = open_entries(alive, context.word("space"))
    select = select_differing(tables, context.number("density"))
    energies = torch.zeros(len(tables), dtype=torch.float64)
    for rows in tables[0].slices():
        energies += torch.stack([block.double().square().sum() for block in select(rows)])
    shares = (energies / energies.sum()).tolist()
    merged = torch.empty(tables[0].update.shape)
    for rows in tables[0].slices():
        blocks = select(rows)
        sign = elect_signs(blocks, shares, "weighted")
        shared = [block * share for block, share in zip(blocks, shares, strict=True)]
        agreed = add_agreeing(shared, shares, sign, "weighted_mean")
        merged[rows] = agreed * context.number("scale")
    return coordinates.lift(merged)


METHODS = (
    MergeMethod(
        name="sce",
        summary="The mean of what agrees, by energy, where the adapters differ most.",
        formula="ΔW = λ Σ [sgn τ̂ᵢ = γ] ηᵢ τ̂ᵢ / Σ [sgn τ̂ᵢ = γ] ηᵢ, τ̂ᵢ = s ∘ wᵢ ΔWᵢ, "
        "s: top variance, ηᵢ = ‖τ̂ᵢ‖² / Σ ‖τ̂ⱼ‖², γ = sgn Σ τ̂ᵢ",
        source="Wan et al., FuseChat (arXiv:2408.07990): select, calculate, erase",
        merge=merge_sce,
        needs="entries",
        options=(
            density_option(0.9, "The share of entries, those that differ most, that is kept."),
            SCALE,
            space_option("knots"),
        ),
    ),
)
