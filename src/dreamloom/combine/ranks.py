"""How thin a merged update may be: all of it, a rank, a share of its energy, or a file's size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.errors import ConfigError

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class RankWish:
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
        return f"{self.kind}:{self.amount:g}" + ("B" if self.kind == "budget" else "")


FULL = RankWish("full")


def parse_rank(text: str) -> RankWish:
    """Read ``full``, ``32``, ``energy:0.995`` or ``budget:100MB``.

    Raises:
        ConfigError: If it is none of these.
    """
    text = text.strip().lower()
    if text == "full":
        return FULL
    if text.isdigit() and int(text) > 0:
        return RankWish("fixed", float(text))
    share = re.fullmatch(r"energy:([0-9.eE+-]+)", text)
    if share and _is_share(share[1]):
        return RankWish("energy", float(share[1]))
    size = re.fullmatch(r"budget:([0-9.]+)\s*([kmg]i?b|b)?", text)
    if size and size[1].count(".") < 2 and float(size[1]) > 0:
        return RankWish("budget", float(size[1]) * _UNITS.get(size[2] or "b", 1))
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
    values: Mapping[str, Float[Tensor, " k"]],
    numbers_per_rank: Mapping[str, int],
    numbers: float,
) -> dict[str, int]:
    """Choose each layer's rank so that all together lose least within a number of parameters.

    The directions of all layers are taken in the order of what they are worth for their length,
    σ² / (outputs + inputs), until the next one would not fit. Every layer keeps one at least.

    Args:
        values: Singular values by layer, descending.
        numbers_per_rank: What one direction costs in each layer: outputs + inputs.
        numbers: How many parameters there may be in all.

    Raises:
        ConfigError: If not even rank 1 fits.
    """
    names = [name for name in values if len(values[name])]
    ranks = {name: min(1, len(values[name])) for name in values}
    left = numbers - sum(numbers_per_rank[name] for name in names)
    if left < 0:
        least = sum(numbers_per_rank[name] for name in names)
        raise ConfigError(
            f"The budget has room for {numbers:.0f} numbers, and rank 1 in every layer needs "
            f"{least}.",
            "Raise the budget.",
        )
    worth = torch.cat(
        [values[name][1:].double().square() / numbers_per_rank[name] for name in names]
    )
    owners = [name for name in names for _ in range(len(values[name]) - 1)]
    # Stable, so that layers of equal worth come in the order of their names.
    for index in torch.argsort(worth, descending=True, stable=True).tolist():
        left -= numbers_per_rank[owners[index]]
        if left < 0:
            break
        ranks[owners[index]] += 1
    return ranks


def choose_rank(values: Float[Tensor, " k"], wish: RankWish, full: int | None = None) -> int:
    """Choose one layer's rank; a budget is chosen over all layers by `spend_budget`.

    Args:
        values: The layer's singular values, descending.
        wish: What the user asked for.
        full: What ``full`` means; all of ``values`` if not given.
    """
    if wish.kind == "fixed":
        return min(int(wish.amount), len(values))
    if wish.kind == "energy":
        return keep_energy(values, wish.amount)
    if wish.kind == "full":
        return len(values) if full is None else min(full, len(values))
    raise ValueError("a budget concerns all layers together")


def check_rank(wish: RankWish, existing: Sequence[int]) -> None:
    """Refuse a rank above what exists in every layer.

    Args:
        wish: What the user asked for.
        existing: The rank that each layer's merged update has.

    Raises:
        ConfigError: If ``wish`` is a rank that no layer has.
    """
    highest = max(existing, default=0)
    if wish.kind == "fixed" and wish.amount > highest:
        raise ConfigError(
            f"Rank {wish.amount:.0f} is above what exists: the merged update has rank {highest} "
            "at most.",
            f"Ask for {highest} or less, or for full.",
        )
