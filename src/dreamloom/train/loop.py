"""The training loop, and what must hold around it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dreamloom.config import LoomConfig
from dreamloom.errors import TrainingError
from dreamloom.events import LossLogged, Observer, Progress, Validated
from dreamloom.families.base import Model
from dreamloom.lessons import Lesson, Share
from dreamloom.processes import Processes
from dreamloom.train.student import Student
from dreamloom.train.update import (
    Errors,
    add_up_errors,
    measure_batch,
    measure_errors,
    share_update,
)

# Dice of validation: no update has a negative number.
_VALIDATION_DRAWS = (-1, -2, -3, -4)


@dataclass(frozen=True)
class Course:
    """Everything that stays the same from update to update."""

    model: Model
    lesson: Lesson
    config: LoomConfig
    processes: Processes
    observe: Observer


@dataclass(frozen=True)
class Interrupts:
    """What happens between updates.

    Args:
        save: Keeps the state after a number of updates.
        look: Looks at the adapter after a number of updates, where one is due.
    """

    save: Callable[[int], None]
    look: Callable[[int], None]


def teach(course: Course, student: Student, updates: range, interrupts: Interrupts) -> list[float]:
    """Do the updates of a range; return their losses.

    Raises:
        TrainingError: If a loss or gradient is not finite, or somebody asked to stop.
    """
    losses: list[float] = []
    began = time.perf_counter()
    with _watch_for_stop() as stop_asked:
        for update in updates:
            interrupts.look(update)
            student.set_rates(update)
            loss = _gather_gradients(course, student, update)
            student.step(update, partial(_name_photos, course, update))
            losses.append(loss.total)
            _tell(course, loss, update, student.rate, (time.perf_counter() - began) / len(losses))
            done = update + 1
            stop = course.processes.any_says(stop_asked.is_set(), course.model.runtime.device)
            # The last one too: what comes after it can fail for want of room on the disk.
            if stop or done % course.config.train.checkpoint_every == 0 or done == updates.stop:
                interrupts.save(done)
            if stop:
                raise TrainingError(
                    f"Stopped after update {done} of {updates.stop}; nothing is lost.",
                    "Run the same command again to go on from there.",
                )
    return losses


@dataclass(frozen=True)
class _Loss:
    """An update's loss over all batches and processes."""

    total: float
    subject: float
    prior: float | None


def _gather_gradients(course: Course, student: Student, update: int) -> _Loss:
    """Add up the gradients of all batches of an update, over all processes."""
    config, lesson = course.config, course.lesson
    sums: list[Tensor] = []
    student.forget_gradients()
    for share in _shares(course)[course.processes.index :: course.processes.count]:
        errors = measure_errors(course.model, lesson, update, config, share)
        _refuse_broken(errors, lesson, update)
        loss = add_up_errors(errors, config, lesson, share)
        student.add_gradient(loss.total)
        terms = [loss.total, loss.subject, *([] if loss.prior is None else [loss.prior])]
        sums.append(torch.stack(terms).detach())
    parts = torch.stack(sums).sum(dim=0)
    course.processes.add_up([*student.gradients(), parts])
    total, subject, *prior = parts.tolist()
    return _Loss(total, subject, prior[0] if prior else None)


def _shares(course: Course) -> list[Share]:
    """List the batches of an update, over all processes."""
    batches = course.config.train.accumulate * course.processes.count
    return [share_update(course.config, course.lesson, batches, index) for index in range(batches)]


def _refuse_broken(errors: Sequence[Errors], lesson: Lesson, update: int) -> None:
    found = [
        (lesson.name(card), bad)
        for part in errors
        for card, bad in zip(part.cards, (~torch.isfinite(part.values)).tolist(), strict=True)
    ]
    broken = dict.fromkeys(name for name, bad in found if bad)
    if not broken:
        return
    every_one = all(bad for _, bad in found)
    advice = "Lower train.learning_rate; in fp16, use bf16 or fp32."
    raise TrainingError(
        f"The loss is not finite at update {update + 1}, for {', '.join(broken)}; the last "
        "checkpoint and everything before it are unharmed.",
        advice if every_one else f"Look at that picture. If it is as it should be: {advice}",
    )


def _name_photos(course: Course, update: int) -> str:
    """Name the photos of an update, for a message."""
    dealt = (card for share in _shares(course) for card in course.lesson.deal_cards(update, share))
    return ", ".join(dict.fromkeys(course.lesson.name(c) for c in dealt if not c.is_prior))


@torch.no_grad()
def validate(course: Course, updates_done: int) -> float:
    """Measure the error on the photos' centres, with noise that no update throws.

    The same dice are thrown at each call, so that the values of one run may be compared. The
    photos are the held-out ones, where there are any.
    """
    plain = _plain(course.config)
    values = [
        measure_batch(course.model, course.lesson, batch, draw, plain).values
        for draw in _VALIDATION_DRAWS
        for batch in course.lesson.validation()
    ]
    loss = float(torch.cat(values).mean())
    course.observe(Validated(updates_done, loss, held_out=bool(course.lesson.held_out)))
    return loss


def _plain(config: LoomConfig) -> LoomConfig:
    """The same settings without what only makes training robust."""
    objective = config.objective.model_copy(
        update={"noise_offset": 0.0, "input_perturbation": 0.0, "weighting": "none", "loss": "l2"}
    )
    priors = config.priors.model_copy(update={"kind": "none"})
    return config.model_copy(update={"objective": objective, "priors": priors})


def _tell(course: Course, loss: _Loss, update: int, rate: float, pace_seconds: float) -> None:
    device, updates = course.model.runtime.device, course.config.train.updates
    course.observe(LossLogged(update + 1, loss.total, loss.subject, loss.prior, rate))
    values = {"loss": loss.total, "s/update": pace_seconds}
    if device.type == "cuda":
        values["GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    course.observe(Progress("train", "teaching", update + 1, updates, values))


@contextmanager
def _watch_for_stop() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into a wish that the loop can grant between two updates."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    earlier = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def tail_mean(losses: Sequence[float]) -> float | None:
    """The mean of the last tenth."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail and all(map(math.isfinite, tail)) else None
