"""The training loop, and what must hold around it."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.distributed import Processes
from dreamloom.core.errors import TrainingError
from dreamloom.core.events import LossLogged, Observer, Progress, Validated
from dreamloom.models.base import Model
from dreamloom.training.async_logging import AsyncLossLog, StepOutcome
from dreamloom.training.batches import BatchShare, Sample, TrainingBatches
from dreamloom.training.optimization import TrainableAdapter
from dreamloom.training.step import (
    Errors,
    add_up_errors,
    measure_batch,
    measure_passes,
    share_update,
)

# After so many updates everything is compiled and remembered that will be.
_WARM_UPDATES = 3
# Seeds of validation: no update has a negative number.
_VALIDATION_DRAWS = (-1, -2, -3, -4)


@dataclass(frozen=True)
class TrainContext:
    """Everything that stays the same from update to update."""

    model: Model
    batches: TrainingBatches
    config: LoomConfig
    processes: Processes
    observe: Observer


@dataclass(frozen=True)
class TrainHooks:
    """What happens between updates.

    Args:
        save: Keeps the state after a number of updates.
        run_validation: Looks at the adapter after a number of updates.
        is_validation_due: Whether to look after a number of updates.
    """

    save: Callable[[int], None]
    run_validation: Callable[[int], None]
    is_validation_due: Callable[[int], bool]


def run_training_loop(
    context: TrainContext, trainable: TrainableAdapter, updates: range, hooks: TrainHooks
) -> list[float]:
    """Do the updates of a range; return their losses.

    Raises:
        TrainingError: If a loss or gradient is not finite, or somebody asked to stop.
    """
    losses: list[float] = []
    began = time.perf_counter()

    def hand_on(outcome: StepOutcome) -> None:
        _refuse_broken(outcome, context.batches)
        trainable.refuse_broken(
            outcome.update, outcome.norm, partial(_name_photos, context, outcome.update)
        )
        losses.append(outcome.total)
        _tell(context, outcome, (time.perf_counter() - began) / len(losses))

    loss_log = AsyncLossLog(context.model.runtime.device, hand_on)
    with _watch_for_stop() as stop_asked, _settled_memory():
        for update in updates:
            if update - updates.start == _WARM_UPDATES:
                gc.freeze()
            if hooks.is_validation_due(update):
                loss_log.flush()
                hooks.run_validation(update)
            trainable.set_rates(update)
            gathered = _gather_gradients(context, trainable, update)
            norm = trainable.step(gathered.are_finite)
            loss_log.write(
                update, trainable.rate, gathered.samples, gathered.are_finite, gathered.terms, norm
            )
            done = update + 1
            stop = context.processes.any_says(stop_asked.is_set(), context.model.runtime.device)
            # The last one too: what comes after it can fail for want of room on the disk.
            if stop or done % context.config.train.checkpointing_steps == 0 or done == updates.stop:
                loss_log.flush()
                hooks.save(done)
            if stop:
                raise TrainingError(
                    f"Stopped after update {done} of {updates.stop}; nothing is lost.",
                    "Run the same command again to go on from there.",
                )
    return losses


@dataclass(frozen=True)
class _Gathered:
    """What is known of an update before the weights change; the tensors lie on the device.

    Args:
        samples: The pictures of this process.
        are_finite: Whether each one's error is.
        terms: The loss over all batches and processes: total, subject and, if there is one, prior.
    """

    samples: tuple[Sample, ...]
    are_finite: Bool[Tensor, " cards"]
    terms: Float[Tensor, " terms"]


def _gather_gradients(context: TrainContext, trainable: TrainableAdapter, update: int) -> _Gathered:
    """Add up the gradients of all batches of an update, over all processes."""
    config, batches = context.config, context.batches
    sums: list[Tensor] = []
    parts: list[Errors] = []
    trainable.forget_gradients()
    for share in _own_shares(context):
        for errors in measure_passes(context.model, batches, update, config, share):
            loss = add_up_errors(errors, config, batches, share)
            trainable.add_gradient(loss.total)
            terms = [loss.total, loss.subject, *([] if loss.prior is None else [loss.prior])]
            sums.append(torch.stack(terms).detach())
            parts += errors
    added = torch.stack(sums).sum(dim=0)
    if context.processes.count > 1:
        context.processes.add_up([*trainable.gradients(), added])
    return _Gathered(
        samples=tuple(sample for part in parts for sample in part.samples),
        are_finite=torch.isfinite(torch.cat([part.values.detach() for part in parts])),
        terms=added,
    )


def _shares(context: TrainContext) -> list[BatchShare]:
    """List the batches of an update, over all processes."""
    count = context.config.train.gradient_accumulation_steps * context.processes.count
    return [share_update(context.config, context.batches, count, index) for index in range(count)]


def _own_shares(context: TrainContext) -> list[BatchShare]:
    """List those batches of an update that this process works on."""
    return _shares(context)[context.processes.index :: context.processes.count]


def _refuse_broken(outcome: StepOutcome, batches: TrainingBatches) -> None:
    if not outcome.broken:
        return
    names = ", ".join(dict.fromkeys(batches.name(sample) for sample in outcome.broken))
    every_one = len(outcome.broken) == outcome.samples
    advice = "Lower train.learning_rate; in fp16, use bf16 or fp32."
    raise TrainingError(
        f"The loss is not finite at update {outcome.update + 1}, for {names}; the last "
        "checkpoint and everything before it are unharmed.",
        advice if every_one else f"Look at that picture. If it is as it should be: {advice}",
    )


def list_samples(context: TrainContext) -> list[Sample]:
    """List every picture that this process will deal, each with its cut."""
    mine = _own_shares(context)
    return [
        sample
        for update in range(context.config.train.steps)
        for share in mine
        for sample in context.batches.draw_samples(update, share)
    ]


def _name_photos(context: TrainContext, update: int) -> str:
    """Name the photos of an update, for a message."""
    drawn = (
        sample
        for share in _shares(context)
        for sample in context.batches.draw_samples(update, share)
    )
    return ", ".join(dict.fromkeys(context.batches.name(c) for c in drawn if not c.is_prior))


@torch.no_grad()
def validate(context: TrainContext, updates_done: int) -> float:
    """Measure the error on the photos' centres, with noise that no update throws.

    The same dice are thrown at each call, so that the values of one run may be compared. The
    photos are the held-out ones, where there are any.
    """
    plain = _plain(context.config)
    values = [
        measure_batch(context.model, context.batches, batch, draw, plain).values
        for draw in _VALIDATION_DRAWS
        for batch in context.batches.validation()
    ]
    loss = float(torch.cat(values).mean())
    context.observe(Validated(updates_done, loss, held_out=bool(context.batches.held_out)))
    return loss


def _plain(config: LoomConfig) -> LoomConfig:
    """The same settings without what only makes training robust."""
    objective = config.objective.model_copy(
        update={"noise_offset": 0.0, "input_perturbation": 0.0, "weighting": "none", "loss": "l2"}
    )
    priors = config.priors.model_copy(update={"kind": "none"})
    return config.model_copy(update={"objective": objective, "priors": priors})


def _tell(context: TrainContext, outcome: StepOutcome, pace_seconds: float) -> None:
    device, updates = context.model.runtime.device, context.config.train.steps
    done = outcome.update + 1
    context.observe(LossLogged(done, outcome.total, outcome.subject, outcome.prior, outcome.rate))
    values = {"loss": outcome.total, "s/update": pace_seconds}
    if device.type == "cuda":
        values["GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    context.observe(Progress("train", "teaching", done, updates, values))


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


@contextmanager
def _settled_memory() -> Iterator[None]:
    """Keep Python from searching models and libraries for garbage again and again.

    They stay until the end anyway, and walking through them took a twentieth of a small model's
    training. What updates leave behind is still collected.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def tail_mean(losses: Sequence[float]) -> float | None:
    """The mean of the last tenth."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail and all(map(math.isfinite, tail)) else None
