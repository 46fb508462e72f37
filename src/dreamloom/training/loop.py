"""The training loop: batches, loss, backward, optimizer step, logs, checkpoints, validation."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.distributed import Processes
from dreamloom.core.errors import TrainingError
from dreamloom.core.events import LossLogged, Observer, Progress, Validated
from dreamloom.models.base import Model
from dreamloom.training.async_logging import AsyncLossLog, StepOutcome
from dreamloom.training.batches import BatchShare, Sample, TrainingBatches
from dreamloom.training.checkpoints import Checkpoints
from dreamloom.training.step import (
    BatchErrors,
    add_up_errors,
    measure_batch,
    share_update,
    split_passes,
)
from dreamloom.training.trainable_adapter import TrainableAdapter
from dreamloom.training.validation_samples import ValidationSampler

# After so many updates everything is compiled and remembered that will be.
_WARM_UPDATES = 3
# Seeds of validation: no update has a negative number.
_VALIDATION_DRAWS = (-1, -2, -3, -4)
_DROPOUTS = ("dropout", "rank_dropout", "module_dropout")


@dataclass(frozen=True)
class TrainContext:
    """Everything that stays the same from update to update."""

    model: Model
    batches: TrainingBatches
    config: LoomConfig
    processes: Processes
    observe: Observer

    def shares(self) -> list[BatchShare]:
        """List the batches of an update, over all processes."""
        count = self.config.train.gradient_accumulation_steps * self.processes.count
        return [share_update(self.config, self.batches, count, index) for index in range(count)]

    def own_shares(self) -> list[BatchShare]:
        """List those batches of an update that this process works on."""
        return self.shares()[self.processes.index :: self.processes.count]


def run_training_loop(
    context: TrainContext,
    trainable: TrainableAdapter,
    checkpoints: Checkpoints,
    validation: ValidationSampler,
    first: int,
    earlier: Sequence[float] = (),
) -> list[float]:
    """Do the updates from ``first`` to the last; return the losses of all, ``earlier`` ones too.

    Raises:
        TrainingError: If a loss or gradient is not finite, or somebody asked to stop.
    """
    model, batches, config = context.model, context.batches, context.config
    processes, steps = context.processes, config.train.steps
    losses, began = list(earlier), time.perf_counter()

    def report(outcome: StepOutcome) -> None:
        _refuse_broken(context, trainable, outcome)
        losses.append(outcome.total)
        done_here = len(losses) - len(earlier)
        _report_progress(context, outcome, (time.perf_counter() - began) / done_here)

    loss_log = AsyncLossLog(model.runtime.device, report)
    with _watch_for_stop() as stop_asked, _without_garbage_searches():
        for update in range(first, steps):
            if update - first == _WARM_UPDATES:
                gc.freeze()
            if validation.is_due(update):
                loss_log.flush()
                _validate(context, trainable, validation, update)
            trainable.set_rates(update)
            trainable.zero_grad()
            errors, terms = list[BatchErrors](), list[Tensor]()
            for share in context.own_shares():
                drawn = batches.make_batches(update, share)
                for one_pass in split_passes(drawn, config.memory.micro_batch_size):
                    found = [measure_batch(model, batches, one, update, config) for one in one_pass]
                    loss = add_up_errors(found, config, batches, share)
                    trainable.backward(loss.total)
                    terms.append(torch.stack(loss.terms).detach())
                    errors += found
            added = torch.stack(terms).sum(dim=0)  # total, the subject's and, with any, the prior's
            # Once an update, over however many passes and processes it is spread.
            added[0] += trainable.add_penalty(processes.is_main)
            if processes.count > 1:
                processes.add_up([*trainable.gradients(), added])
            are_finite = torch.isfinite(torch.cat([one.values.detach() for one in errors]))
            norm = trainable.clip_and_step(are_finite)
            seen = tuple(sample for one in errors for sample in one.samples)
            loss_log.write(update, trainable.rate, seen, are_finite, added, norm)
            done = update + 1
            stop = processes.any_says(stop_asked.is_set(), model.runtime.device)
            # The last one too: what comes after it can fail for want of room on the disk.
            if stop or done % config.train.checkpointing_steps == 0 or done == steps:
                loss_log.flush()
                if processes.is_main:
                    checkpoints.save(done, losses)
                processes.wait()
            if stop:
                raise TrainingError(
                    f"Stopped after update {done} of {steps}; nothing is lost.",
                    "Run the same command again to go on from there.",
                )
    if validation.is_due(steps):
        _validate(context, trainable, validation, steps)
    return losses


def _refuse_broken(
    context: TrainContext, trainable: TrainableAdapter, outcome: StepOutcome
) -> None:
    """Stop where a loss or, but for an overflow in fp16, a gradient is not finite."""
    batches = context.batches
    if outcome.broken:
        names = ", ".join(dict.fromkeys(batches.name(sample) for sample in outcome.broken))
        every_one = len(outcome.broken) == outcome.samples
        advice = "Lower train.learning_rate; in fp16, use bf16 or fp32."
        raise TrainingError(
            f"The loss is not finite at update {outcome.update + 1}, for {names}; the last "
            "checkpoint and everything before it are unharmed.",
            advice if every_one else f"Look at that picture. If it is as it should be: {advice}",
        )

    def name_photos() -> str:
        shares = context.shares()
        drawn = (one for share in shares for one in batches.draw_samples(outcome.update, share))
        return ", ".join(dict.fromkeys(batches.name(one) for one in drawn if not one.is_prior))

    trainable.refuse_broken(outcome.update, outcome.norm, name_photos)


def list_samples(context: TrainContext) -> list[Sample]:
    """List every picture that this process will train on, each with its crop."""
    shares = context.own_shares()
    return [
        sample
        for update in range(context.config.train.steps)
        for share in shares
        for sample in context.batches.draw_samples(update, share)
    ]


def _validate(
    context: TrainContext, trainable: TrainableAdapter, validation: ValidationSampler, update: int
) -> None:
    """Measure the error on the photos' centres and draw validation samples after some updates.

    No update draws the noise of validation, and each validation the same, so that the values of
    one run may be compared; what only makes training robust is left out. The photos are the
    held-out ones, where there are any.
    """
    model, batches, config = context.model, context.batches, context.config
    robust = {
        **{"noise_offset": 0.0, "multires_noise_iterations": 0, "input_perturbation": 0.0},
        **{"weighting": "none", "loss": "l2"},
    }
    plain = config.model_copy(
        update={
            "objective": config.objective.model_copy(update=robust),
            "priors": config.priors.model_copy(update={"kind": "none"}),
            "adapter": config.adapter.model_copy(update=dict.fromkeys(_DROPOUTS, 0.0)),
        }
    )
    with trainable.finished():
        with torch.no_grad():
            values = [
                measure_batch(model, batches, batch, draw, plain).values
                for draw in _VALIDATION_DRAWS
                for batch in batches.validation()
            ]
            loss = float(torch.cat(values).mean())
        context.observe(Validated(update, loss, held_out=bool(batches.held_out)))
        if context.processes.is_main:
            validation.run_validation(update)
    model.release_encoders()
    context.processes.wait()


def _report_progress(context: TrainContext, outcome: StepOutcome, step_seconds: float) -> None:
    device, updates = context.model.runtime.device, context.config.train.steps
    done = outcome.update + 1
    context.observe(LossLogged(done, outcome.total, outcome.subject, outcome.prior, outcome.rate))
    values = {"loss": outcome.total, "s/update": step_seconds}
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
def _without_garbage_searches() -> Iterator[None]:
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
