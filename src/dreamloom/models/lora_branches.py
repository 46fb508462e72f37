"""LoRA branches: adapters' changes beside a model's layers, at weights that follow a schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.models.activation_hooks import apply_as
from dreamloom.models.fuse_adapters import locate
from dreamloom.models.lora_schedule import (
    START,
    Curve,
    LoraSchedule,
    Moment,
    Strength,
    acts_on_text,
)
from dreamloom.models.peftstate import change_of
from dreamloom.models.rank_masks import mask_by_timestep, shape_like

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
        lora_schedule: How strongly the change is applied.
    """

    def __init__(
        self, name: str, module: nn.Module, compute: Compute, lora_schedule: LoraSchedule
    ) -> None:
        self.name = name
        self.lora_schedule = lora_schedule
        self.compute = compute
        self._first_row = 0
        self.set_moment(START)
        self._hook = module.register_forward_hook(self._add)

    def set_moment(self, moment: Moment, unconditional_rows: int = 0) -> None:
        """Take the weight of a moment, and leave the first rows out if the schedule says so."""
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
        change = self.compute(module, inputs[0][first:])
        changed = torch.add(output[first:], change, alpha=self.weight)
        return torch.cat([output[:first], changed]) if first else changed


class LowRank:
    """The change that a LoRA's two factors make, without multiplying them out.

    The factors are balanced by a power of two, which changes no digit, so that neither leaves
    half precision's range where their product does not.

    Args:
        layer: The factors.
        weight: The layer's own.
        least: How many ranks count in pure noise (T-LoRA); None for all.
    """

    def __init__(self, layer: Layer, weight: Tensor, least: int | None = None) -> None:
        self._rank, self._least = layer.rank, least
        self._mask: Tensor | None = None
        shift = _balance(layer.down, layer.up)
        self._down = (layer.down * shift).to(weight.device, weight.dtype)
        self._up = (layer.up / shift).to(weight.device, weight.dtype)

    @property
    def is_t_lora(self) -> bool:
        """Whether the timestep says which ranks count."""
        return self._least is not None

    def set_timesteps(self, timesteps: Float[Tensor, " images"], train_timesteps: int) -> None:
        """Let those ranks count that do at these timesteps: each image's, or one for all."""
        if self._least is not None:
            self._mask = mask_by_timestep(timesteps, train_timesteps, self._rank, self._least)

    def __call__(self, module: nn.Module, rows: Tensor) -> Tensor:
        """Go down to the rank and up again."""
        self._down, self._up = self._down.to(rows.device), self._up.to(rows.device)
        narrow = apply_as(module, rows, self._down)
        if self._mask is not None:
            # Where the first rows do without the change, their masks are the first ones, too.
            mask = self._mask if len(self._mask) == 1 else self._mask[-len(rows) :]
            narrow = narrow * shape_like(mask, narrow).to(narrow.dtype)
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
        return apply_as(module, rows, self._change)


def follow_timesteps(parts: Sequence[tuple[Adapter, Strength]]) -> list[tuple[Adapter, Strength]]:
    """Let T-LoRAs stay beside the layers, where their ranks can follow a drawing's timesteps."""
    return [
        (adapter, LoraSchedule(Curve.constant(strength)))
        if adapter.t_lora_min_rank is not None and not isinstance(strength, LoraSchedule)
        else (adapter, strength)
        for adapter, strength in parts
    ]


@contextmanager
def lora_branches(
    components: Mapping[str, nn.Module],
    parts: Sequence[tuple[Adapter, LoraSchedule]],
    base_name: str,
) -> Iterator[list[Branch]]:
    """Compute adapters' changes beside the layers for a block, each on its schedule.

    A half-precision weight would round small changes away; beside it they keep their digits. A
    LoRA costs two thin products a layer; of other kinds each changed layer costs its own memory
    and time once more. The weights stand as at the first step until a moment is set.

    Yields:
        The branches, to set a moment of.
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
        least = None if acts_on_text(name) else adapter.t_lora_min_rank
        return LowRank(adapter.layers[name], weight, least)
    return Dense(change_of(adapter.peft, name, weight), weight)


class ScheduledBranches:
    """The adapters of a pipeline whose weights follow the steps of a drawing.

    Args:
        pipeline: An SDXL pipeline.
        components: Its denoiser under ``unet`` and its text encoders under their names.
        base_name: What the user calls the base model.
    """

    def __init__(self, pipeline: Any, components: Mapping[str, nn.Module], base_name: str) -> None:
        self._pipeline, self._components, self._base_name = pipeline, components, base_name
        self._branches: list[Branch] = []

    @contextmanager
    def added(self, parts: Sequence[tuple[Adapter, LoraSchedule]]) -> Iterator[None]:
        """Add adapters to those that follow the steps, for a block."""
        with lora_branches(self._components, parts, self._base_name) as branches:
            earlier = self._branches
            self._branches = [*earlier, *branches]
            changes = [branch.compute for branch in branches]
            narrow = [one for one in changes if isinstance(one, LowRank) and one.is_t_lora]

            def tell_timesteps(unet: nn.Module, inputs: tuple[Any, ...]) -> None:
                del unet
                times = torch.as_tensor(inputs[1], device=inputs[0].device).reshape(-1)
                for change in narrow:
                    change.set_timesteps(
                        times, int(self._pipeline.scheduler.config.num_train_timesteps)
                    )

            unet = self._components["unet"]
            hook = unet.register_forward_pre_hook(tell_timesteps) if narrow else None
            try:
                yield
            finally:
                self._branches = earlier
                if hook is not None:
                    hook.remove()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Set each step's weights while the pipeline draws."""

        def follow(unet: nn.Module, inputs: tuple[Any, ...]) -> None:
            del unet
            moment = find_moment(inputs[1], self._pipeline.scheduler.timesteps)
            # The pipeline puts the unconditional half before the other.
            is_guided = self._pipeline.do_classifier_free_guidance
            self._set_moment(moment, len(inputs[0]) // 2 if is_guided else 0)

        if not self._branches:
            yield
            return
        hook = self._pipeline.unet.register_forward_pre_hook(follow)
        try:
            yield
        finally:
            hook.remove()
            self._set_moment(START)

    @contextmanager
    def off_in_unconditional_text(self) -> Iterator[None]:
        """Switch off, while text is encoded, what belongs to the conditional half only."""
        active = [b for b in self._branches if b.lora_schedule.conditional_only and b.acts_on_text]
        for branch in active:
            branch.weight = 0.0
        yield
        if active:
            self._set_moment(START)

    def _set_moment(self, moment: Moment, unconditional_rows: int = 0) -> None:
        for branch in self._branches:
            branch.set_moment(moment, unconditional_rows)


@contextmanager
def peft_branches(
    pipeline: Any,
    components: Mapping[str, nn.Module],
    parts: Sequence[tuple[Adapter, float]],
    base_name: str,
) -> Iterator[None]:
    """Load LoRAs beside the weights for a block, as diffusers does."""
    for adapter, _ in parts:
        locate(components, adapter, base_name)
    names = [f"part{i}" for i in range(len(parts))]
    try:
        with warnings.catch_warnings():
            # PEFT warns whenever a second adapter joins the first, which is meant here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name, (adapter, _) in zip(names, parts, strict=True):
                factors = {
                    f"{layer}.{factor}.weight": tensor
                    for layer, one in adapter.layers.items()
                    for factor, tensor in (("lora_A", one.down), ("lora_B", one.up))
                }
                pipeline.load_lora_weights(factors, adapter_name=name)
        if names:
            pipeline.set_adapters(names, [weight for _, weight in parts])
        yield
    finally:
        if names:
            pipeline.unload_lora_weights()


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
