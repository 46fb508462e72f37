"""Compute the changes of adapters beside a model's layers, at weights that follow a drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.models.lora_fold import locate
from dreamloom.models.lora_schedule import START, LoraSchedule, Moment, acts_on_text
from dreamloom.models.peftstate import change_of

Compute: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""A layer's change of its output, from the layer itself and some rows of its input."""


class Branch:
    """One adapter's change of one layer, added to the layer's output at a weight of its own.

    The layer's own weight is never touched. At weight 0 nothing is computed, and the output is
    that of the base, bit for bit.

    Args:
        name: The layer's name in the adapter.
        module: The layer.
        compute: Its change.
        lora_schedule: How strongly the change is worn.
    """

    def __init__(
        self, name: str, module: nn.Module, compute: Compute, lora_schedule: LoraSchedule
    ) -> None:
        self.name = name
        self.lora_schedule = lora_schedule
        self._compute = compute
        self._first_row = 0
        self.turn_to(START)
        self._hook = module.register_forward_hook(self._add)

    def turn_to(self, moment: Moment, unconditional_rows: int = 0) -> None:
        """Take the weight of a moment, and leave the first rows out if the pace says so."""
        self.weight = self.lora_schedule.weight(self.name, moment)
        self._first_row = unconditional_rows if self.lora_schedule.conditional_only else 0

    @property
    def acts_on_text(self) -> bool:
        """Whether the layer is a text encoder's."""
        return acts_on_text(self.name)

    def remove(self) -> None:
        """Leave the layer as it was."""
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.weight == 0:
            return None
        first = self._first_row
        change = self._compute(module, inputs[0][first:])
        changed = torch.add(output[first:], change, alpha=self.weight)
        return torch.cat([output[:first], changed]) if first else changed


class LowRank:
    """The change that a LoRA's two factors make, without multiplying them out.

    The factors are balanced by a power of two, which changes no digit, so that neither leaves
    half precision's range where their product does not.
    """

    def __init__(self, layer: Layer, weight: Tensor) -> None:
        shift = _balance(layer.down, layer.up)
        self._down = (layer.down * shift).to(weight.device, weight.dtype)
        self._up = (layer.up / shift).to(weight.device, weight.dtype)

    def __call__(self, module: nn.Module, rows: Tensor) -> Tensor:
        """Go down to the rank and up again."""
        self._down, self._up = self._down.to(rows.device), self._up.to(rows.device)
        narrow = _apply(module, rows, self._down)
        if isinstance(module, nn.Conv2d):
            return conv2d(narrow, self._up)
        return linear(narrow, self._up)


def _balance(down: Tensor, up: Tensor) -> float:
    """The power of two by which ``down`` grows and ``up`` shrinks to be about as large."""
    largest = float(down.abs().max()), float(up.abs().max())
    if not all(0 < size < math.inf for size in largest):
        return 1.0
    return 2.0 ** round(math.log2(largest[1] / largest[0]) / 2)


class Dense:
    """A change that is no product of small factors: a second weight of the layer's own size."""

    def __init__(self, change: Tensor, weight: Tensor) -> None:
        self._change = change.to(weight.device, weight.dtype)

    def __call__(self, module: nn.Module, rows: Tensor) -> Tensor:
        """Apply the layer's kind of map with the changed weight."""
        self._change = self._change.to(rows.device)
        return _apply(module, rows, self._change)


def _apply(module: nn.Module, rows: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(module, nn.Conv2d):
        return linear(rows, weight)
    return conv2d(
        rows,
        weight,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
    )


@contextmanager
def lora_branches(
    components: Mapping[str, nn.Module],
    parts: Sequence[tuple[Adapter, LoraSchedule]],
    base_name: str,
) -> Iterator[list[Branch]]:
    """Compute adapters' changes beside the layers for a block, each at its pace.

    A half-precision weight would round small changes away; beside it they keep their digits. A
    LoRA costs two thin products a layer; of other kinds each changed layer costs its own memory
    and time once more. The weights stand as at the first step until they are turned.

    Yields:
        The branches, to turn to a moment.
    """
    placed = [
        (locate(components, adapter, base_name), adapter, lora_schedule)
        for adapter, lora_schedule in parts
    ]
    branches: list[Branch] = []
    try:
        for modules, adapter, lora_schedule in placed:
            for name, module in modules.items():
                branches.append(Branch(name, module, _change(adapter, name, module), lora_schedule))
        yield branches
    finally:
        for branch in branches:
            branch.remove()


def _change(adapter: Adapter, name: str, module: nn.Module) -> Compute:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if adapter.peft is None:
        return LowRank(adapter.layers[name], weight)
    return Dense(change_of(adapter.peft, name, weight, module), weight)


def find_moment(timestep: Any, timesteps: Tensor) -> Moment:
    """Say at which step of a drawing the denoiser is called.

    Steps are told apart by the scheduler's timesteps, not by counting calls: PNDM calls twice at
    its second timestep, Heun twice at each but the first.

    Args:
        timestep: The one that the denoiser is told.
        timesteps: All that the scheduler will call it with, in any order.
    """
    distinct = timesteps.unique(sorted=True)
    nearest = int((distinct - torch.as_tensor(timestep, device=distinct.device)).abs().argmin())
    return Moment(len(distinct) - 1 - nearest, len(distinct))
