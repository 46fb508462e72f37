"""Trackers: losses, learning rate and scores sent to TensorBoard and others, by accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreamloom.core.errors import ConfigError
from dreamloom.core.events import (
    Event,
    GradientNoiseMeasured,
    LossLogged,
    Observer,
    Validated,
    ValidationSampled,
    silent,
)
from dreamloom.core.toml_files import offer

AUTO, NONE = "auto", "none"
_EXTRA = 'pip install "dreamloom[trackers]"'


def choose_tracker(name: str) -> str:
    """Turn ``auto`` into a tracker's name or ``none``, and check any other.

    Raises:
        ConfigError: If the tracker is unknown, or its library is not installed.
    """
    if name == AUTO:
        return "tensorboard" if importlib.util.find_spec("tensorboard") else NONE
    if name == NONE:
        return NONE
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(
            f"There is no tracker {name!r}.",
            offer(name, ("none", "auto", *sorted(LOGGER_TYPE_TO_CLASS))),
        )
    if name not in {str(one) for one in get_available_trackers()}:
        raise ConfigError(
            f"The tracker {name} is not installed.",
            f"Install it ({_EXTRA} brings TensorBoard), or use --set validation.tracker=none.",
        )
    return name


@contextmanager
def track(
    tracker: str, run_name: str, folder: Path, settings: Mapping[str, Any]
) -> Iterator[Observer]:
    """Give an observer that sends losses, validations and scores to a tracker.

    Args:
        tracker: From `choose_tracker`.
        run_name: What the tracker calls the run.
        folder: Where trackers that write files write them.
        settings: What the run was made with, by name.
    """
    if tracker == NONE:
        yield silent
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # trackers ask it which process they are in
    kind = LOGGER_TYPE_TO_CLASS[tracker]
    where = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
    made = kind(run_name, **where)
    made.start()
    made.store_init_configuration(
        {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
    )

    def send(event: Event) -> None:
        values, update = describe(event)
        if values:
            made.log(values, step=update)

    try:
        yield send
    finally:
        made.finish()


def describe(event: Event) -> tuple[dict[str, float], int]:
    """Name the figures of an event, and the update that they belong to."""
    match event:
        case LossLogged(update, total, subject, prior, rate):
            values = {"loss/total": total, "loss/subject": subject, "learning_rate": rate}
            return values | ({} if prior is None else {"loss/prior": prior}), update
        case GradientNoiseMeasured(update, signal_to_noise, noise_scale):
            noise = {"signal_to_noise": signal_to_noise, "noise_scale": noise_scale}
            return {f"gradient/{name}": v for name, v in noise.items() if v is not None}, update
        case Validated(update, loss, held_out):
            photos = "held-out photos" if held_out else "photos"
            return {f"validation/{photos}": loss}, update
        case ValidationSampled(update, _, scores):
            return {f"score/{name}": value for name, value in scores.items()}, update
        case _:
            return {}, 0
