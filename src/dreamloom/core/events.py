"""What happens during a run, as values: library code never prints, it tells an observer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class StageStarted:
    """A stage has begun its work."""

    stage: str
    detail: str = ""


@dataclass(frozen=True)
class StageSkipped:
    """A stage found its record with the same inputs, so nothing was done."""

    stage: str
    detail: str = ""


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units are finished; ``values`` are figures worth showing beside it."""

    stage: str
    task: str
    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """Something the user should know; ``warning`` asks for attention."""

    stage: str
    text: str
    warning: bool = False


@dataclass(frozen=True)
class LossLogged:
    """The loss of one optimizer update; ``prior`` is None without class images."""

    update: int
    total: float
    subject: float
    prior: float | None
    learning_rate: float


@dataclass(frozen=True)
class GradientNoiseMeasured:
    """How noisy the gradients are, as of an update.

    ``signal_to_noise`` is of the update's own gradient, ``noise_scale`` the simple noise scale in
    photos; None where it cannot be told.
    """

    update: int
    signal_to_noise: float | None
    noise_scale: float | None


@dataclass(frozen=True)
class Validated:
    """The loss with fixed noise after some updates; ``held_out`` tells whose photos it is of."""

    update: int
    loss: float
    held_out: bool


@dataclass(frozen=True)
class ValidationSampled:
    """Pictures were drawn with the adapter as it is after some updates, and perhaps scored."""

    update: int
    folder: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestTaken:
    """A running training took what it was asked for, after some updates; see `core.requests`."""

    update: int
    kind: str
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterSaved:
    """The adapter as it is after some updates was written, because somebody asked for it."""

    update: int
    file: str


@dataclass(frozen=True)
class StageDone:
    """A stage has written its record."""

    stage: str
    seconds: float
    detail: str = ""


Event: TypeAlias = (
    StageStarted
    | StageSkipped
    | Progress
    | Note
    | LossLogged
    | GradientNoiseMeasured
    | Validated
    | ValidationSampled
    | RequestTaken
    | AdapterSaved
    | StageDone
)
Observer: TypeAlias = Callable[[Event], None]


OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with how many of how many units are done."""


def no_progress(done: int, total: int) -> None:
    """Count nothing."""


def silent(event: Event) -> None:
    """Observe nothing: the default of every stage."""


def tee(*observers: Observer) -> Observer:
    """Tell several observers of each event, in order."""

    def observe(event: Event) -> None:
        for observer in observers:
            observer(event)

    return observe
