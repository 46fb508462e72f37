"""Candidates of a weight search: the merge weights tried, as block weights and requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging.blocks import NO_BLOCKS, parse_blocks
from dreamloom.merging.merging import MergeRequest

GROUPS = ("down", "mid", "up")
"""Blocks that may have weights of their own, as `blocks.parse_blocks` calls them."""

BETWEEN = (0.3, 1.5)
"""Weights that a search tries, by default."""

_DIGITS = 2  # of a weight: what is printed is what was worn


@dataclass(frozen=True)
class MergeWeights:
    """Weights for both adapters.

    Args:
        subject: One weight for the subject's adapter, or one for each of `GROUPS`.
        style: The same for the style's; as many.
    """

    subject: tuple[float, ...]
    style: tuple[float, ...]

    @property
    def name(self) -> str:
        """A name for people and for folders, such as ``0.80-1.00``."""
        sides = (self.subject, self.style)
        return "-".join("_".join(f"{weight:.{_DIGITS}f}" for weight in side) for side in sides)

    @property
    def spelled(self) -> str:
        """The weights in words, such as ``0.8 and 1``."""
        sides = (self.subject, self.style)
        return " and ".join("/".join(f"{weight:g}" for weight in side) for side in sides)

    @property
    def sides(self) -> tuple[Side, Side]:
        """The subject's weights and the style's, as a merge takes them."""
        return _read_side(self.subject), _read_side(self.style)

    def request(self) -> MergeRequest:
        """How to merge two adapters as this candidate wears them."""
        blocks = [parse_blocks(side.blocks) if side.blocks else NO_BLOCKS for side in self.sides]
        return MergeRequest([side.weight for side in self.sides], blocks=blocks)

    def weigh(self, subject: Adapter, style: Adapter) -> list[tuple[Adapter, float]]:
        """Both adapters with their weights, to be worn without a merge; those of 0 are left out."""
        weighed = []
        for adapter, side in zip((subject, style), self.sides, strict=True):
            if side.blocks:
                weights = parse_blocks(side.blocks)
                layers = {
                    name: Layer(layer.down, layer.up * weights.of(name))
                    for name, layer in adapter.layers.items()
                }
                adapter = Adapter(layers, adapter.metadata, adapter.tokens)
            weighed.append((adapter, side.weight))
        return [(adapter, weight) for adapter, weight in weighed if weight != 0]


@dataclass(frozen=True)
class Side:
    """One adapter's weights as a merge takes them.

    Args:
        weight: Of the whole adapter.
        blocks: What it is multiplied by in single blocks, as typed; empty is 1 everywhere.
    """

    weight: float
    blocks: str = ""


def spread(subject: float, style: float, by_block: bool) -> MergeWeights:
    """The same weight in all blocks of an adapter."""
    count = len(GROUPS) if by_block else 1
    return MergeWeights((subject,) * count, (style,) * count)


def _read_side(weights: Sequence[float]) -> Side:
    """Layers outside the groups have the mean of the groups' weights."""
    if len(set(weights)) == 1:
        return Side(weights[0])
    mean = sum(weights) / len(weights)
    own = zip(("all", *GROUPS), (mean, *weights), strict=True)
    return Side(1.0, ", ".join(f"{name}={weight:.4g}" for name, weight in own))


def has_blocks(adapter: Adapter) -> bool:
    """Whether an adapter changes layers in each of `GROUPS`."""
    return all(
        any(parse_blocks(f"all=0, {group}=1").of(name) for name in adapter.layers)
        for group in GROUPS
    )


def draw_design(
    count: int,
    by_block: bool,
    between: tuple[float, float],
    seed: int,
    always: Sequence[MergeWeights],
) -> list[MergeWeights]:
    """Spread the first candidates evenly over all weights, some that are always tried first.

    Args:
        count: How many there shall be, those of ``always`` among them.
        by_block: Whether each of `GROUPS` has a weight of its own.
        between: The least and the greatest weight.
        seed: The same seed gives the same candidates.
        always: Candidates that come first.

    Source:
        Scrambled Sobol points: Owen, Scrambling Sobol' and Niederreiter-Xing Points (1998).
    """
    dimensions = 2 * (len(GROUPS) if by_block else 1)
    rng = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed % 2**31)
    chosen = list(dict.fromkeys(always))[:count]
    while len(chosen) < count:
        point = rng.draw(1)[0].tolist()
        made = _place(point, between)
        if made not in chosen:
            chosen.append(made)
    return chosen


def propose_near(
    leaders: Sequence[MergeWeights],
    count: int,
    known: Sequence[MergeWeights],
    between: tuple[float, float],
    seed: int,
) -> list[MergeWeights]:
    """Propose candidates around the leaders, as far from them as the first ones lie apart.

    Args:
        leaders: The best so far, the best one first; each in turn is departed from.
        count: How many to propose.
        known: What was tried already, and is not proposed again.
        between: The least and the greatest weight.
        seed: The same seed proposes the same.
    """
    low, high = between
    rng = torch.Generator().manual_seed(seed)
    dimensions = 2 * len(leaders[0].subject)
    apart = 1 / max(2.0, len(known) ** (1 / dimensions))
    proposed: list[MergeWeights] = []
    # A narrow range of weights has few of two digits, and all may be known.
    for attempt in range(100 * count):
        if len(proposed) == count:
            break
        leader = leaders[attempt % len(leaders)]
        steps = (2 * torch.rand(dimensions, generator=rng) - 1) * apart
        start = [(w - low) / (high - low) for w in (*leader.subject, *leader.style)]
        point = [
            min(1.0, max(0.0, at + step)) for at, step in zip(start, steps.tolist(), strict=True)
        ]
        made = _place(point, between)
        if made not in known and made not in proposed:
            proposed.append(made)
    return proposed


def _place(point: Sequence[float], between: tuple[float, float]) -> MergeWeights:
    low, high = between
    weights = tuple(round(low + (high - low) * share, _DIGITS) for share in point)
    half = len(weights) // 2
    return MergeWeights(weights[:half], weights[half:])


def count_candidates(by_block: bool, between: tuple[float, float]) -> float:
    """How many different candidates there are between two weights."""
    dimensions = 2 * (len(GROUPS) if by_block else 1)
    return math.pow(math.floor((between[1] - between[0]) * 10**_DIGITS + 1e-9) + 1, dimensions)
