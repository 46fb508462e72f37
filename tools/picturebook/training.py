"""What the training runs share: precision, learning rate, averaged weights, checkpoints."""

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT_SECONDS = 180.0
_LOG_EVERY = 50
_AVERAGE_DECAY = 0.998
_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")

logger = logging.getLogger(__name__)


def bf16_is_faster(device: torch.device) -> bool:
    """Time a convolution both ways: some processors run bf16 twice as fast, others far slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(8, 64, 32, 32)
    layer_bf16, x_bf16 = nn.Conv2d(64, 64, 3, padding=1).bfloat16(), x.bfloat16()

    def seconds(run: Callable[[], Tensor]) -> float:
        run()
        start = time.perf_counter()
        for _ in range(5):
            run()
        return time.perf_counter() - start

    with torch.no_grad():
        return seconds(lambda: layer_bf16(x_bf16)) < 0.8 * seconds(lambda: layer(x))


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Return the context to run forward passes in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@dataclass(frozen=True)
class Schedule:
    """Warm up, hold, then decay to zero: until the decay, training can be continued.

    Args:
        peak: The learning rate held between warm-up and decay.
        updates: How many optimizer updates there are in all.
        warmup_updates: How many of them warm up.
        decay_share: The share of the updates at the end over which the rate falls.
    """

    peak: float
    updates: int
    warmup_updates: int = 200
    decay_share: float = 0.25

    @property
    def decay_start(self) -> int:
        """The first update of the decay."""
        return math.floor(self.updates * (1 - self.decay_share))

    def rate(self, update: int) -> float:
        """Return the learning rate of one update, counted from 0."""
        rising = min(1.0, (update + 1) / self.warmup_updates)
        falling = (self.updates - update) / max(1, self.updates - self.decay_start)
        return self.peak * rising * min(1.0, max(0.0, falling))


class AveragedWeights:
    """An exponential moving average of parameters: what is exported.

    Young averages forget faster, so that the first updates' noise does not linger.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = _AVERAGE_DECAY) -> None:
        self.tensors: list[Tensor] = [p.detach().clone() for p in parameters]
        self._decay = decay

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], updates_done: int) -> None:
        """Move the averages towards the parameters after one update."""
        decay = min(self._decay, (1 + updates_done) / (10 + updates_done))
        torch._foreach_lerp_(self.tensors, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: Iterable[nn.Parameter]) -> None:
        """Exchange the averages with the parameters; a second call exchanges them back."""
        for average, parameter in zip(self.tensors, parameters, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)


def seeded(purpose: str, update: int) -> tuple[np.random.Generator, torch.Generator]:
    """Return the random numbers of one update, so that a resumed run repeats them."""
    numpy_rng = np.random.default_rng([*purpose.encode(), update])
    return numpy_rng, torch.Generator().manual_seed(int(numpy_rng.integers(2**62)))


def answer_loss(
    logits: Float[Tensor, "n values"],
    truths: Int[Tensor, "n attributes"],
    answers: dict[str, list[str]],
) -> Float[Tensor, ""]:
    """Sum the cross-entropies of all attributes; each has its list of possible answers."""
    parts = logits.split([len(values) for values in answers.values()], dim=1)
    losses = [
        nn.functional.cross_entropy(part, truth)
        for part, truth in zip(parts, truths.unbind(dim=1), strict=True)
    ]
    return torch.stack(losses).sum()


@dataclass
class Run:
    """One training run: what is trained, how, and where its checkpoints lie.

    Args:
        name: Names the checkpoint files.
        folder: The work folder.
        parameters: What is trained, in a fixed order.
        schedule: The learning rate.
        weight_decay: AdamW's.
    """

    name: str
    folder: Path
    parameters: list[nn.Parameter]
    schedule: Schedule
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        """Set up the optimizer and the averages, and read the newest checkpoint, if any."""
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True
        )
        self.average = AveragedWeights(self.parameters)
        self.updates_done = 0
        self._saved_at = time.monotonic()
        if self.checkpoint_file.exists():
            self._read(self.checkpoint_file)
        self._losses: deque[list[float]] = deque(maxlen=_LOG_EVERY)
        self._started_at, self._done_before = time.monotonic(), self.updates_done

    @property
    def checkpoint_file(self) -> Path:
        """The newest checkpoint."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def constant_file(self) -> Path:
        """The checkpoint from before the learning rate fell: training continues best from here."""
        return self.folder / f"{self.name}-constant.safetensors"

    @property
    def finished(self) -> bool:
        """Whether every update of the schedule is done."""
        return self.updates_done >= self.schedule.updates

    def step(self, loss: Tensor, *parts: Tensor) -> None:
        """Do one update, log now and then, and write a checkpoint every few minutes.

        Args:
            loss: What is minimised.
            parts: What is logged; the loss itself, if nothing is named.
        """
        if self.updates_done == self.schedule.decay_start:
            self._write(self.constant_file)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.updates_done)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.updates_done += 1
        self.average.update(self.parameters, self.updates_done)
        self._losses.append([part.item() for part in parts or (loss,)])
        if self.updates_done % _LOG_EVERY == 0:
            seconds = time.monotonic() - self._started_at
            logger.info(
                "%s %d/%d losses %s, %.3f s an update",
                self.name,
                self.updates_done,
                self.schedule.updates,
                np.round(np.mean(self._losses, axis=0), 4).tolist(),
                seconds / (self.updates_done - self._done_before),
            )
        if self.finished or time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
            self._write(self.checkpoint_file)
            self._saved_at = time.monotonic()

    def _write(self, file: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for i, (parameter, average) in enumerate(
            zip(self.parameters, self.average.tensors, strict=True)
        ):
            tensors[f"{i}.weight"], tensors[f"{i}.average"] = parameter.detach(), average
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{i}.{key}"] = value
        partial = file.with_suffix(".partial")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, {"updates_done": json.dumps(self.updates_done)})
        os.replace(partial, file)

    @torch.no_grad()
    def _read(self, file: Path) -> None:
        with safe_open(file, "pt") as stored:
            self.updates_done = int(json.loads(stored.metadata()["updates_done"]))
            names = set(stored.keys())
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(stored.get_tensor(f"{i}.weight"))
                self.average.tensors[i].copy_(stored.get_tensor(f"{i}.average"))
                # SDXL never reads the first text encoder's last layer: it has no gradient.
                if f"{i}.step" in names:
                    self.optimizer.state[parameter] = {
                        key: stored.get_tensor(f"{i}.{key}") for key in _ADAM_STATE
                    }
