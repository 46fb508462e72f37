"""Exact selection by magnitude: which one stands at a place among entries read in blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor


def find_magnitudes(
    read: Callable[[], Iterable[Float[Tensor, "rows columns"]]], places: Sequence[int]
) -> list[float]:
    """Find what magnitudes stand at some places when all entries are sorted; exactly.

    Args:
        read: Gives all entries in blocks, one at least, the same each time it is called.
        places: From 1, the largest, to the number of entries.
    """
    return find_magnitudes_of_each(lambda: ((0, block) for block in read()), lambda _: places)[0]


def find_magnitudes_of_each(
    read: Callable[[], Iterable[tuple[int, Float[Tensor, "rows columns"]]]],
    choose_places: Callable[[int], Sequence[int]],
) -> dict[int, list[float]]:
    """Find what magnitudes stand at some places in each of several sets of entries; exactly.

    Bits of positive floats are ordered as the floats are. So the upper half of the bits is counted
    in a first pass over the entries, and the lower half of those that share the upper one in a
    second; no copy of all entries is made or sorted. Counts add up, so neither how entries are cut
    into blocks nor in what order these come changes anything.

    Args:
        read: Gives all entries in blocks, each with the number of its set, and the same each time
            it is called.
        choose_places: From the number of entries of a set, the places that are asked for: from 1,
            the largest, to that number.

    Returns:
        The magnitudes by the number of their set; sets of which no block came are absent.

    Source:
        Sorting by distribution, of which only the bin in question is looked at: Knuth, The Art of
        Computer Programming 3, section 5.2.5.
    """
    upper: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2**15, dtype=torch.int64))
    for number, block in read():
        upper[number] += torch.bincount(_to_bits(block) >> 16, minlength=2**15)
    or_above = {number: _count_down(counts) for number, counts in upper.items()}
    places = {number: choose_places(int(counts[0])) for number, counts in or_above.items()}
    halves = {
        number: [_find_place(or_above[number], place) for place in places[number]]
        for number in places
    }
    lower = {
        (number, half): torch.zeros(2**16, dtype=torch.int64)
        for number in halves
        for half in halves[number]
    }
    for number, block in read():
        bits = _to_bits(block)
        for half in set(halves[number]):
            counts = torch.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=2**16)
            lower[number, half] += counts
    return {
        number: [
            _to_float(half, lower[number, half], place - int(or_above[number][half + 1]))
            for half, place in zip(halves[number], places[number], strict=True)
        ]
        for number in places
    }


def _to_bits(block: Float[Tensor, "rows columns"]) -> Integer[Tensor, " entries"]:
    return block.abs().flatten().view(torch.int32)


def _to_float(upper: int, lower: Integer[Tensor, " bins"], place: int) -> float:
    """The float with these upper bits whose lower ones stand at a place among some."""
    bits = upper << 16 | _find_place(_count_down(lower), place)
    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))


def _count_down(counts: Integer[Tensor, " bins"]) -> Integer[Tensor, " bins_and_one"]:
    """How many there are in each bin or above it; none above the last."""
    return torch.cat([counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1)])


def _find_place(or_above: Integer[Tensor, " bins"], place: int) -> int:
    """The bin of what stands at a place, counted from the top bin down."""
    return int((or_above >= place).sum()) - 1
