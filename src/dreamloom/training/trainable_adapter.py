"""The adapter's weights while they are trained: optimizer, learning rates, EMA, fp16 scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Parameter

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.config.training import TrainConfig
from dreamloom.core.device import Runtime
from dreamloom.core.errors import ConfigError, TrainingError
from dreamloom.core.events import Note, Observer
from dreamloom.models.base import WeightGroup
from dreamloom.models.target_modules import assign_by_pattern
from dreamloom.training.checkpoints import Stateful
from dreamloom.training.ema import EmaWeights, weights_to_use
from dreamloom.training.flat_adamw import FlatAdamW
from dreamloom.training.lr_scheduler import rate_factor, set_rates
from dreamloom.training.optimizers import (
    AVERAGING_OPTIMIZERS,
    group_weights,
    make_optimizer,
    usable_optimizer,
)
from dreamloom.training.update_norms import (
    limit_norms,
    pair_factors,
    scaled_updates,
    sum_squared_norms,
)

# The scale begins at 2^16 and halves with each update that overflows; at 1 there is no help left.
_MOST_SKIPPED = 16


class TrainableAdapter:
    """What is trained.

    Args:
        weights: From `Model.attach_adapter`.
        config: Resolved settings.
        runtime: Where the weights lie; on a GPU in fp16 the loss is scaled.
        observe: Told what was replaced and what was skipped.

    Raises:
        ConfigError: If the optimizer is unknown, its library missing, or it contradicts another
            setting.
    """

    def __init__(
        self,
        weights: Sequence[WeightGroup],
        config: LoomConfig,
        runtime: Runtime,
        observe: Observer,
    ) -> None:
        settings = config.train
        self._settings = settings
        self._observe = observe
        self.parameters: list[Parameter] = [p for one in weights for p in one.parameters]
        self._pairs = pair_factors(weights)
        name, note = usable_optimizer(settings.optimizer, runtime.device)
        if note:
            observe(Note("train", note, warning=True))
        groups = group_weights(
            [(one.role, one.parameters) for one in weights],
            float(settings.learning_rate),
            text_rate=float(settings.text_learning_rate),
            own_rates=assign_rates(weights, settings),
            token_rate=float(settings.token_learning_rate),
            loraplus_lr_ratio=config.adapter.loraplus_lr_ratio,
        )
        self.optimizer = make_optimizer(name, groups, settings.weight_decay)
        decay = settings.ema_decay
        if decay is not None and name in AVERAGING_OPTIMIZERS:
            raise ConfigError(
                f"{name} averages the adapter itself, so train.ema_decay has no place.",
                "Set train.ema_decay to none, or choose another optimizer.",
            )
        self.average = EmaWeights(self.parameters, decay) if decay is not None else None
        half = runtime.device.type == "cuda" and runtime.dtype == torch.float16
        self._scaler = torch.amp.GradScaler(runtime.device.type, enabled=half)
        self._skipped = 0
        self._is_fused = bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))
        # It averages over the whole training, which a falling rate would undo.
        self._schedule = "constant" if name in AVERAGING_OPTIMIZERS else settings.lr_scheduler
        self._rate = 0.0

    @property
    def rate(self) -> float:
        """The denoiser's learning rate: where the optimizer estimates one, that times ours."""
        return self._rate * float(self.optimizer.param_groups[0].get("d", 1.0))

    @property
    def others(self) -> dict[str, Stateful]:
        """What has a state beside weights and optimizer, for checkpoints."""
        found: dict[str, Stateful] = {"average": self.average} if self.average else {}
        if self._scaler.is_enabled():
            found["scaler"] = self._scaler
        return found

    def set_rates(self, update: int) -> None:
        """Set the learning rates of one update."""
        settings = self._settings
        factor = rate_factor(
            update,
            self._schedule,
            settings.warmup_steps,
            settings.steps,
            cycles=settings.lr_num_cycles,
            power=settings.lr_power,
        )
        set_rates(self.optimizer, factor)
        self._rate = float(settings.learning_rate) * factor

    def zero_grad(self) -> None:
        """Begin an update."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add one batch's gradient."""
        self._scaler.scale(loss).backward()

    def add_penalty(self) -> Tensor | float:
        """Add the gradient of what the updates' size costs; return that term of the loss."""
        if not self._settings.update_penalty:
            return 0.0
        penalty = self._settings.update_penalty * sum_squared_norms(self._pairs)
        self.backward(penalty)
        return penalty.detach()

    def gradients(self) -> list[Tensor]:
        """The gradients gathered so far, in an order that is the same in every process."""
        if isinstance(self.optimizer, FlatAdamW):
            return self.optimizer.gather_gradients()
        for parameter in self.parameters:
            # Every process must send the same tensors, also where a weight was not used.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @property
    def loss_scale(self) -> float:
        """By what the loss, and so the gradients gathered, are multiplied: 1 but in fp16."""
        return float(self._scaler.get_scale())

    def clip_and_step(self, are_finite: Bool[Tensor, " samples"]) -> Float[Tensor, ""]:
        """Change the weights once, unless an error or the gradient is not finite.

        Args:
            are_finite: Whether each picture's error is.

        Returns:
            The gradient's norm before it was clipped, on the device: reading it would wait for it.
        """
        self._scaler.unscale_(self.optimizer)
        gradients = self.gradients()
        # A thousand small tensors: asked for all at once, their norms cost half.
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self._scaler.is_enabled():
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters, self._settings.max_grad_norm, norm
            )
            self._scaler.step(self.optimizer)
            self._scaler.update()
        elif self._is_fused:
            # One kernel clips the gradient, changes the weights and leaves out what is not sound:
            # so does torch's gradient scaler speak to fused optimizers.
            fused: Any = self.optimizer
            fused.grad_scale = (norm / self._settings.max_grad_norm).clamp(min=1)
            fused.found_inf = (~(torch.isfinite(norm) & are_finite.all())).float()
            try:
                fused.step()
            finally:
                del fused.grad_scale, fused.found_inf
        # Other optimizers cannot leave an update out by themselves, so here somebody must ask.
        elif bool(torch.isfinite(norm) & are_finite.all()):
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters, self._settings.max_grad_norm, norm
            )
            self.optimizer.step()
        self._limit_norms()
        if self.average:
            self.average.update()
        return norm

    def _limit_norms(self) -> None:
        if self._settings.scale_weight_norms is not None:
            limit_norms(self._pairs, self._settings.scale_weight_norms)

    def refuse_broken(self, update: int, norm: float, name_photos: Callable[[], str]) -> None:
        """Say that a gradient was not finite; in fp16 that may be mended by itself.

        Args:
            update: Which update, from 0.
            norm: What `clip_and_step` gave.
            name_photos: Names the photos of the update, for a message.

        Raises:
            TrainingError: If it is not finite, or overflowed in fp16 again and again.
        """
        if math.isfinite(norm):
            self._skipped = 0
            return
        # In fp16 an overflow only says that the scale is too large yet: the scaler leaves the
        # update out and halves it.
        self._skipped += 1
        if self._scaler.is_enabled() and self._skipped <= _MOST_SKIPPED:
            self._observe(Note("train", f"update {update + 1} overflowed in fp16 and is left out"))
            return
        raise TrainingError(
            f"The gradient is not finite at update {update + 1}, with {name_photos()}; the last "
            "checkpoint and everything before it are unharmed.",
            "Lower train.learning_rate, or use --set precision=bf16 or fp32.",
        )

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Use the weights as they would be saved now: the average, if there is one, and scaled."""
        with weights_to_use(self.optimizer, self.average):
            if self.average:
                # The product of averages is not the average of products.
                self._limit_norms()
            with scaled_updates(self._pairs, float(self._settings.final_scale)):
                yield


def assign_rates(weights: Sequence[WeightGroup], settings: TrainConfig) -> dict[Parameter, float]:
    """Say which weights learn at other rates than their kind, and how fast (before LoRA+).

    Raises:
        ConfigError: If a pattern matches no layer that changes.
    """
    layers = {
        weight: layer
        for group in weights
        for weight, layer in zip(group.parameters, group.layers, strict=False)
    }
    rates = {}
    second = settings.text_encoder_2_learning_rate
    if second not in ("auto", settings.text_learning_rate):
        rates = dict.fromkeys(
            (weight for weight, layer in layers.items() if layer.startswith("text_encoder_2.")),
            float(second),
        )
    patterns = settings.learning_rate_pattern
    by_layer = assign_by_pattern(patterns, layers.values(), "train.learning_rate_pattern")
    return rates | {w: by_layer[layer] for w, layer in layers.items() if layer in by_layer}
