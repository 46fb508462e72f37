"""The rank of a merged LoRA: full, fixed, by energy (SVD), or by a budget of bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import ConfigError

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class RankRequest:
    """What the user asked for.

    Args:
        kind: ``full`` keeps every direction; ``fixed`` as many in each layer; ``energy`` the
            fewest whose squared singular values make up a share of all; ``budget`` those that are
            worth most for their bytes, over all layers together.
        amount: The rank, the share (above 0, up to 1), or the bytes; unused for ``full``.
    """

    kind: Literal["full", "fixed", "energy", "budget"]
    amount: float = 0.0

    def __str__(self) -> str:
        if self.kind == "full":
            return "full"
        if self.kind == "fixed":
            return f"{self.amount:.0f}"
        if self.kind == "energy":
            return f"energy:{self.amount}"
        # So that `parse_rank` reads the very same number.
        for unit in ("GB", "MB", "kB"):
            size = _UNITS[unit.lower()]
            number = f"{self.amount / size:.6g}"
            if self.amount >= size and "e" not in number and float(number) * size == self.amount:
                return f"budget:{number}{unit}"
        return f"budget:{Decimal(self.amount):f}B"


FULL = RankRequest("full")


def parse_rank(text: str) -> RankRequest:
    """Read ``full``, ``32``, ``energy:0.995`` or ``budget:100MB``.

    Raises:
        ConfigError: If it is none of these.
    """
    text = text.strip().lower()
    if text == "full":
        return FULL
    if text.isdigit() and int(text) > 0:
        return RankRequest("fixed", float(text))
    share = re.fullmatch(r"energy:([0-9.eE+-]+)", text)
    if share and _is_share(share[1]):
        return RankRequest("energy", float(share[1]))
    size = re.fullmatch(r"budget:([0-9.]+)\s*([kmg]i?b|b)?", text)
    if size and size[1].count(".") < 2 and float(size[1]) > 0:
        return RankRequest("budget", float(size[1]) * _UNITS.get(size[2] or "b", 1))
    raise ConfigError(
        f"{text!r} is no rank.",
        "Give full, a whole number such as 32, energy:0.995, or budget:100MB.",
    )


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def keep_energy(values: Float[Tensor, " k"], share: float) -> int:
    """The fewest leading directions whose energy, Σσ², reaches a share of all of it.

    Args:
        values: Singular values, descending.
        share: Above 0, up to 1; at 1 every direction stays.
    """
    if len(values) == 0:
        return 0
    if share >= 1:
        return len(values)
    energy = values.double().square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def spend_budget(
    values: Mapping[str, Float[Tensor, " k"]], numbers_per_rank: Mapping[str, int], numbers: float
) -> dict[str, int]:
    """Choose each layer's rank so that all together lose least within a number of parameters.

    The directions of all layers are taken in the order of what they are worth for their length,
    σ² / (outputs + inputs), as long as they fit; once from one direction in each layer, and once
    from the highest rank that fits in all of them. The better choice counts, so no rank that is the
    same everywhere keeps more. Every layer keeps one direction at least.

    Args:
        values: Singular values by layer, descending.
        numbers_per_rank: What one direction costs in each layer: outputs + inputs.
        numbers: How many parameters there may be in all.

    Raises:
        ConfigError: If not even rank 1 fits.

    Source:
        The greedy choice for knapsack problems: Dantzig, Discrete-variable extremum problems
        (Operations Research 5, 1957).
    """
    lengths = {name: len(values[name]) for name in values}
    least = {name: min(1, length) for name, length in lengths.items()}
    needed = _count_numbers(least, numbers_per_rank)
    if needed > numbers:
        raise ConfigError(
            f"The budget has room for {numbers:.0f} numbers, and rank 1 in every layer needs "
            f"{needed}.",
            "Raise the budget.",
        )
    uniform = least
    for rank in range(2, max(lengths.values(), default=0) + 1):
        ranks = {name: min(rank, length) for name, length in lengths.items()}
        if _count_numbers(ranks, numbers_per_rank) > numbers:
            break
        uniform = ranks
    order = _order_by_worth(values, numbers_per_rank)
    filled = [_fill(begun, order, numbers_per_rank, numbers) for begun in (least, uniform)]
    return max(
        filled,
        key=lambda ranks: sum(
            float(values[name][:rank].double().square().sum()) for name, rank in ranks.items()
        ),
    )


def _count_numbers(ranks: Mapping[str, int], numbers_per_rank: Mapping[str, int]) -> int:
    return sum(rank * numbers_per_rank[name] for name, rank in ranks.items())


def _order_by_worth(
    values: Mapping[str, Float[Tensor, " k"]], numbers_per_rank: Mapping[str, int]
) -> list[tuple[str, int]]:
    """All directions, by layer and place there (from 0), the worthiest for their length first."""
    places = [(name, place) for name in values for place in range(len(values[name]))]
    if not places:
        return []
    worth = torch.cat([values[name].double().square() / numbers_per_rank[name] for name in values])
    # Stable, so that layers of equal worth come in the order of their names.
    return [places[i] for i in torch.argsort(worth, descending=True, stable=True).tolist()]


def _fill(
    begun: Mapping[str, int],
    order: Sequence[tuple[str, int]],
    numbers_per_rank: Mapping[str, int],
    numbers: float,
) -> dict[str, int]:
    """Raise ranks by the worthiest directions that are not there yet, as long as they fit."""
    ranks = dict(begun)
    left = numbers - _count_numbers(ranks, numbers_per_rank)
    for name, place in order:
        if place == ranks[name] and numbers_per_rank[name] <= left:
            ranks[name] += 1
            left -= numbers_per_rank[name]
    return ranks


def choose_rank(values: Float[Tensor, " k"], request: RankRequest, full: int | None = None) -> int:
    """Choose one layer's rank; a budget is chosen over all layers by `spend_budget`.

    Args:
        values: The layer's singular values, descending.
        request: What the user asked for.
        full: What ``full`` means; all of ``values`` if not given.
    """
    if request.kind == "fixed":
        return min(int(request.amount), len(values))
    if request.kind == "energy":
        return keep_energy(values, request.amount)
    if request.kind == "full":
        return len(values) if full is None else min(full, len(values))
    raise ValueError("a budget concerns all layers together")
