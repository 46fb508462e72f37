"""Asynchronous logging of the loss: read once the device has it, for asking makes it wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.training.batches import Sample


@dataclass(frozen=True)
class StepOutcome:
    """What one update came to.

    Args:
        update: Which update, from 0.
        rate: Its learning rate.
        broken: Samples of this process whose error is not finite.
        samples: How many samples this process had.
        total: The loss over all batches and processes.
        subject: Its part from the photos.
        prior: Its part from class images; None without.
        norm: The gradient's norm before it was clipped.
        noise: What `GradientNoise.finish_update` gave; None where nobody asked.
    """

    update: int
    rate: float
    broken: tuple[Sample, ...]
    samples: int
    total: float
    subject: float
    prior: float | None
    norm: float
    noise: float | None = None


@dataclass
class _Line:
    """An update that may not be finished yet; ``numbers`` are on the CPU when ``ready`` says so."""

    update: int
    rate: float
    samples: Sequence[Sample]
    numbers: Tensor
    ready: torch.cuda.Event | None
    has_noise: bool


class AsyncLossLog:
    """Hands on what updates came to, in their order, a little later where that saves waiting.

    On a CUDA GPU the numbers of an update travel while the next ones are computed, and are read
    when they are there, at the latest ``behind`` updates later. Elsewhere they are read at once.

    Args:
        device: Where training runs.
        hand_on: Called with each update's outcome; may raise.
        behind: Most updates that may be unread, 0 or more.
    """

    def __init__(
        self, device: torch.device, hand_on: Callable[[StepOutcome], None], behind: int = 4
    ) -> None:
        self._travels = device.type == "cuda"
        self._behind = behind if self._travels else 0
        self._hand_on = hand_on
        self._lines: deque[_Line] = deque()

    def write(
        self,
        update: int,
        rate: float,
        samples: Sequence[Sample],
        are_finite: Bool[Tensor, " samples"],
        terms: Float[Tensor, " terms"],
        norm: Float[Tensor, ""],
        noise: Float[Tensor, ""] | None = None,
    ) -> None:
        """Write an update down, and hand on what has arrived.

        Args:
            update: Which update, from 0.
            rate: Its learning rate.
            samples: The samples of this process.
            are_finite: Whether each sample's error is.
            terms: Total loss, subject's and, where there is one, prior's.
            norm: The gradient's norm.
            noise: From `GradientNoise.finish_update`, where it is asked for.
        """
        singles = [one.reshape(1).float() for one in (norm, noise) if one is not None]
        numbers = torch.cat([*singles, terms.float(), are_finite.float()])
        ready = None
        if self._travels:
            arriving = torch.empty(numbers.shape, pin_memory=True)
            numbers = arriving.copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._lines.append(_Line(update, rate, samples, numbers, ready, noise is not None))
        while self._lines:
            ready = self._lines[0].ready
            if len(self._lines) <= self._behind and not (ready is not None and ready.query()):
                break
            self._read()

    def flush(self) -> None:
        """Hand on everything that was written down: before weights are looked at or saved."""
        while self._lines:
            self._read()

    def _read(self) -> None:
        line = self._lines.popleft()
        if line.ready is not None:
            line.ready.synchronize()
        norm, *rest = line.numbers.tolist()
        noise = rest.pop(0) if line.has_noise else None
        terms, finite = rest[: -len(line.samples)], rest[-len(line.samples) :]
        self._hand_on(
            StepOutcome(
                update=line.update,
                rate=line.rate,
                broken=tuple(c for c, one in zip(line.samples, finite, strict=True) if not one),
                samples=len(line.samples),
                total=terms[0],
                subject=terms[1],
                prior=terms[2] if len(terms) > 2 else None,
                norm=norm,
                noise=noise,
            )
        )
