"""EMA: the moving average of an adapter's weights, and which weights to draw with and to save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class EmaWeights:
    """A running average of weights: steadier than the weights themselves.

    After each update the average moves to the weights by 1 − d, where d rises from 0.18 with the
    n-th update as (1 + n) / (10 + n), until it is ``decay``: else the first weights, which know
    nothing, would stay in the average for long.

    Args:
        weights: What is averaged, in a fixed order.
        decay: The final d, 0 to below 1; 0.999 averages over about the last 1000 updates.

    Raises:
        ValueError: If ``decay`` is out of range.

    Source:
        Polyak and Juditsky (1992); the rise as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, weights: Sequence[Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be from 0 to below 1, got {decay}")
        self._weights = tuple(weights)
        self._decay = decay
        self._updates = 0
        self._averages = [weight.detach().clone() for weight in self._weights]
        self._is_active = False

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after one more update into the average."""
        self._refuse_when_applied()
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.lerp_(weight, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the weights' place for the time of a block; after it all is back."""
        self._refuse_when_applied()
        before = [weight.detach().clone() for weight in self._weights]
        try:
            self._is_active = True
            _copy(self._averages, self._weights)
            yield
        finally:
            _copy(before, self._weights)
            self._is_active = False

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of updates, for a checkpoint."""
        self._refuse_when_applied()
        return {"updates": self._updates, "averages": list(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._refuse_when_applied()
        self._updates = int(state["updates"])
        _copy(state["averages"], self._averages)

    def _refuse_when_applied(self) -> None:
        if self._is_active:
            raise ValueError("the weights are the average now: leave the block `applied` first")


@contextmanager
def weights_to_use(optimizer: Optimizer, average: EmaWeights | None = None) -> Iterator[None]:
    """Let the weights be those meant to be used, for drawing and for the adapter file.

    For the time of a block they are the average, where there is one; those of an optimizer that
    averages by itself, where it does; and else what they are. Afterwards they are what they were,
    bit for bit, so that a training which stops to draw goes on like one which does not.

    Raises:
        ValueError: If the optimizer averages by itself and there is another average.
    """
    switches = any("train_mode" in group for group in optimizer.param_groups)
    if average is not None:
        if switches:
            raise ValueError(f"{type(optimizer).__name__} averages the weights itself")
        with average.applied():
            yield
        return
    if not switches:
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    try:
        optimizer.eval()  # type: ignore[attr-defined]
        yield
    finally:
        # Its own way back rounds; the copies do not.
        optimizer.train()  # type: ignore[attr-defined]
        _copy(before, weights)


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
