"""Element-wise merging of LoRAs, which TIES, DARE, DELLA and SCE share: trim, elect, add.

Every such method works on the weighted updates τᵢ = wᵢ ΔWᵢ, so that a weight of 0.5 is the same as
an adapter half as strong, and a negative weight the same as an adapter turned around. It trims
each τᵢ, lets the adapters elect a sign for each entry, and adds up what agrees with it.

A layer's update has millions of entries, but only a block of rows is multiplied out at a time.
Nothing depends on how large the blocks are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors, norm
from dreamloom.merging.method import Context, LayerPart, Merged, Option
from dreamloom.merging.spaces import Space, enter_space

NUMBERS_PER_BLOCK = 2**18
"""How many entries of one update are multiplied out at a time, about: 2 MiB in float64."""

# Votes that cancel each other out but for the rounding of float32 elect nobody.
_TIE = 1e-5

Trim = Callable[[Float[Tensor, "rows columns"]], Float[Tensor, "rows columns"]]
"""Sets entries of a block to zero, or changes them. Blocks come in order, each once."""


@dataclass(frozen=True)
class Entries:
    """The entries of a weighted update, multiplied out by blocks of rows.

    They are products in float64, rounded once: the same whatever the block and however the update
    is split, but for the rounding of the factors.

    Args:
        update: The weighted update, in float64.
        weight: The weight that is in it.
        number: The adapter's place in the user's list, from 1.
    """

    update: Factors
    weight: float
    number: int

    @property
    def count(self) -> int:
        """How many entries there are."""
        return self.update.shape[0] * self.update.shape[1]

    def slices(self) -> Iterator[slice]:
        """The rows of each block, one at least, in order."""
        outputs, inputs = self.update.shape
        rows = max(1, NUMBERS_PER_BLOCK // inputs)
        for start in range(0, outputs, rows):
            yield slice(start, min(start + rows, outputs))

    def read(self, rows: slice) -> Float[Tensor, "rows columns"]:
        """Multiply some rows out."""
        return (self.update.up[rows] @ self.update.down).float()

    def blocks(self) -> Iterator[Float[Tensor, "rows columns"]]:
        """Multiply all rows out, block by block."""
        return map(self.read, self.slices())


def density_option(default: float, description: str = "The share of entries kept.") -> Option:
    """The option for how many entries stay."""
    return Option("density", default, description, low=0.001, high=1.0)


def election_option(default: str, *, may_skip: bool = True) -> Option:
    """The option for who elects the sign of an entry."""
    return Option(
        "election",
        default,
        "Entries against the elected sign go: weighted votes count as they are merged, unweighted "
        "ones as if all weights were 1 or -1" + ("; none keeps every sign." if may_skip else "."),
        choices=("weighted", "unweighted") + (("none",) if may_skip else ()),
    )


REDUCE = Option(
    "reduce",
    "sum",
    "What becomes of the entries that agree: their sum, their mean, or their sum by the sum of "
    "their weights.",
    choices=("sum", "mean", "weighted_mean"),
)
SCALE = Option("scale", 1.0, "What the result is multiplied by, λ in the papers.")


def merge_entries(
    parts: Sequence[LayerPart],
    context: Context,
    make_trim: Callable[[Entries, Context, torch.Generator], Trim],
    space: str = "",
) -> Merged:
    """Trim each weighted update, elect signs, and add up what agrees.

    Args:
        parts: The layer's updates; those that are all zero are as good as absent.
        context: Its options ``election``, ``reduce`` and ``scale`` are read.
        make_trim: Looks at all entries of a weighted update, and says how to trim a block of them;
            it may read its options, and throw the dice given with them, block by block.
        space: The coordinates that entries are taken in, see `enter_space`; by default those of the
            option ``space``.

    Returns:
        A matrix in the layer's own coordinates, factors in others.
    """
    alive = drop_zeros(parts)
    if not alive:
        return make_nothing(parts)
    coordinates, tables = open_entries(alive, space or context.word("space"))
    trims = [
        make_trim(table, context, rng)
        for table, rng in zip(tables, make_rng(alive, context), strict=True)
    ]
    weights = [table.weight for table in tables]
    merged = torch.empty(tables[0].update.shape)
    for rows in tables[0].slices():
        blocks = [trim(table.read(rows)) for table, trim in zip(tables, trims, strict=True)]
        sign = elect_signs(blocks, weights, context.word("election"))
        agreed = add_agreeing(blocks, weights, sign, context.word("reduce"))
        merged[rows] = agreed * context.number("scale")
    # Where the model's threshold is above all entries, no factors of zeros shall be written.
    if context.thresholds and not merged.any():
        return make_nothing(parts)
    return coordinates.lift(merged)


def make_rng(parts: Sequence[LayerPart], context: Context) -> list[torch.Generator]:
    """Give each adapter dice of its own in a layer.

    They are seeded by the seed, the layer and the adapter's place among the others by the size of
    its update. So the order in which the adapters are named, their file format and how their
    updates are split into factors change nothing.

    Returns:
        One generator on the CPU for each part, in the order of ``parts``.
    """
    sizes = [(norm(part.factors), part.weight) for part in parts]
    order = sorted(range(len(parts)), key=sizes.__getitem__)
    rng = []
    for number in range(len(parts)):
        text = f"{context.seed}/{context.layer}/{order.index(number)}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        rng.append(torch.Generator().manual_seed(seed))
    return rng


def drop_zeros(parts: Sequence[LayerPart]) -> list[LayerPart]:
    """Leave out updates that are all zero: they are the same as absent ones."""
    return [part for part in parts if norm(part.factors) > 0]


def make_nothing(parts: Sequence[LayerPart]) -> Factors:
    """An update of rank 0, of the shape of some."""
    one = parts[0].factors
    return Factors(one.up[:, :0], one.down[:0])


def open_entries(parts: Sequence[LayerPart], space: str) -> tuple[Space, list[Entries]]:
    """Write some updates, weighted and not all zero, in a space."""
    coordinates = enter_space([part.factors.scaled(part.weight) for part in parts], space)
    tables = [
        Entries(update, part.weight, part.number)
        for update, part in zip(coordinates.updates, parts, strict=True)
    ]
    return coordinates, tables


def elect_signs(
    blocks: Sequence[Float[Tensor, "rows columns"]], weights: Sequence[float], election: str
) -> Float[Tensor, "rows columns"] | None:
    """Elect one sign for each entry: 1, -1, or 0 where the votes cancel each other out.

    The sign is that of the sum of votes, so turning all updates around turns the result around.

    Args:
        blocks: Trimmed entries of the weighted updates, one block each.
        weights: The weights that are in them, none 0.
        election: ``weighted``: the entries are the votes; ``unweighted``: without their weights'
            sizes; ``none``: nobody is elected, which is None.

    Source:
        TIES-Merging (Yadav et al., arXiv:2306.01708), elect: γ = sgn(Σ τ̂ᵢ).
    """
    if election == "none":
        return None
    total, size = torch.zeros_like(blocks[0]), torch.zeros_like(blocks[0])
    for block, weight in zip(blocks, weights, strict=True):
        votes = block if election == "weighted" else block / abs(weight)
        total += votes
        size += votes.abs()
    return total.sign().masked_fill_(total.abs() <= _TIE * size, 0)


def add_agreeing(
    blocks: Sequence[Float[Tensor, "rows columns"]],
    weights: Sequence[float],
    sign: Float[Tensor, "rows columns"] | None,
    reduce: str,
) -> Float[Tensor, "rows columns"]:
    """Add up, entry by entry, those that bear the elected sign.

    Args:
        blocks: Trimmed entries of the weighted updates.
        weights: The weights that are in them, none 0.
        sign: What was elected; None lets every entry agree.
        reduce: ``sum``: Σ τ̂ᵢ; ``mean``: divided by how many agree, not counting zeros;
            ``weighted_mean``: divided by the sum of the sizes of their weights.

    Source:
        TIES-Merging (Yadav et al., arXiv:2306.01708), disjoint merge: there, the mean.
    """
    total = torch.zeros_like(blocks[0])
    share = torch.zeros_like(blocks[0])
    for block, weight in zip(blocks, weights, strict=True):
        agreeing = block if sign is None else block.where(block.sign() == sign, 0)
        total += agreeing
        if reduce != "sum":
            share += (agreeing != 0) * (1.0 if reduce == "mean" else abs(weight))
    return total if reduce == "sum" else total / share.where(share > 0, 1)
