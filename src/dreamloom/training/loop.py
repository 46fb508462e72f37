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
from typing import NamedTuple

import torch
from torch import Tensor

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.distributed import Processes
from dreamloom.core.errors import TrainingError
from dreamloom.core.events import (
    AdapterSaved,
    GradientNoiseMeasured,
    LossLogged,
    Note,
    Observer,
    Progress,
    RequestTaken,
    Validated,
)
from dreamloom.core.requests import take_requests
from dreamloom.models.base import Model
from dreamloom.training.async_logging import AsyncLossLog, StepOutcome
from dreamloom.training.batches import BatchShare, Sample, TrainingBatches
from dreamloom.training.checkpoints import Checkpoints
from dreamloom.training.gradient_noise import GradientNoise, NoiseEstimate
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


@dataclass(frozen=True)
class LoopResult:
    """What a training came to.

    Args:
        updates_done: How many updates there were.
        losses: The losses of all that are known.
        why_stopped: Why it ended before its last update; empty where it did not.
        noise: What is known of its gradients' noise; None where nobody asked.
    """

    updates_done: int
    losses: list[float]
    why_stopped: str = ""
    noise: NoiseEstimate | None = None


def run_training_loop(
    context: TrainContext,
    trainable: TrainableAdapter,
    checkpoints: Checkpoints,
    validation: ValidationSampler,
    first: int,
    earlier: Sequence[float] = (),
) -> LoopResult:
    """Do the updates from ``first`` to the last; ``earlier`` are the losses of those before.

    Raises:
        TrainingError: If a loss or gradient is not finite, or somebody asked to stop.
    """
    model, config, processes = context.model, context.config, context.processes
    steps = config.train.steps
    losses, began = list(earlier), time.perf_counter()
    batches_in_all = config.train.gradient_accumulation_steps * processes.count
    noise = GradientNoise(batches_in_all, config.train.log_gradient_noise)

    def report(outcome: StepOutcome) -> None:
        _refuse_broken(context, trainable, outcome)
        losses.append(outcome.total)
        done_here = len(losses) - len(earlier)
        _report_progress(context, outcome, (time.perf_counter() - began) / done_here, noise)

    def save(done: int) -> None:
        loss_log.flush()
        if processes.is_main:
            checkpoints.save(done, losses)
        processes.wait()

    loss_log = AsyncLossLog(model.runtime.device, report)
    with _watch_for_stop() as stop_asked, _without_garbage_searches():
        for update in range(first, steps):
            if update - first == _WARM_UPDATES:
                gc.freeze()
            if validation.is_due(update):
                loss_log.flush()
                if why_stopped := _validate(context, trainable, validation, update):
                    save(update)
                    return LoopResult(update, losses, why_stopped, noise.latest)
            trainable.set_rates(update)
            trainable.zero_grad()
            made = _compute_gradient(context, trainable, update, noise)
            square = noise.finish_update(trainable)
            # Each process adds it to the sum over all.
            made.terms[0] += trainable.add_penalty()
            norm = trainable.clip_and_step(made.are_finite)
            loss_log.write(
                update, trainable.rate, made.samples, made.are_finite, made.terms, norm, square
            )
            done = update + 1
            asked = _take_requests(context, validation, done, stop_asked.is_set())
            # The last one too: what comes after it can fail for want of room on the disk. So can
            # what somebody asks for.
            if any(asked) or done % config.train.checkpointing_steps == 0 or done == steps:
                save(done)
            _grant(context, trainable, validation, asked, done)
            if asked.stop:
                raise TrainingError(
                    f"Stopped after update {done} of {steps}; nothing is lost.",
                    "Run the same command again to go on from there.",
                )
    if validation.is_due(steps):
        _validate(context, trainable, validation, steps)
    return LoopResult(max(first, steps), losses, noise=noise.latest)


class _Asked(NamedTuple):
    """What a training was asked for, and all its processes agree on."""

    stop: bool
    sample: bool
    save: bool


def _take_requests(
    context: TrainContext, validation: ValidationSampler, done: int, stop: bool
) -> _Asked:
    """Take what was asked since the last update; ``stop`` says whether this process was.

    New prompts are the first process's affair alone, for it draws.
    """
    kinds = set()
    if context.processes.is_main:
        for one in take_requests(
            validation.run, lambda text: context.observe(Note("train", text, warning=True))
        ):
            context.observe(RequestTaken(done, one.kind, one.prompts))
            kinds.add(one.kind)
            if one.kind == "prompts":
                validation.change_prompts(one.prompts)
    said = (stop or "stop" in kinds, "sample" in kinds, "save" in kinds)
    return _Asked(*context.processes.any_say(said, context.model.runtime.device))


def _grant(
    context: TrainContext,
    trainable: TrainableAdapter,
    validation: ValidationSampler,
    asked: _Asked,
    done: int,
) -> None:
    """Write and draw what was asked for; no update depends on it."""
    if asked.save and context.processes.is_main:
        with trainable.finished():
            file = validation.save_adapter(done)
        context.observe(AdapterSaved(done, str(file)))
    # Where a validation is due anyway it comes next, unless the training stops here.
    if asked.sample and (asked.stop or not validation.is_due(done)):
        _validate(context, trainable, validation, done)
    elif asked.save:
        context.processes.wait()


@dataclass(frozen=True)
class _Gradient:
    """What an update's gradient was computed from.

    Args:
        terms: Its loss over all processes: total, the subject's and, with any, the prior's.
        are_finite: Whether each sample's error is.
        samples: The samples of this process.
    """

    terms: Tensor
    are_finite: Tensor
    samples: tuple[Sample, ...]


def _compute_gradient(
    context: TrainContext, trainable: TrainableAdapter, update: int, noise: GradientNoise
) -> _Gradient:
    """Add up the gradient of an update over its batches and all processes."""
    model, batches, config = context.model, context.batches, context.config
    errors, terms, shares = list[BatchErrors](), list[Tensor](), context.own_shares()
    for number, share in enumerate(shares, start=1):
        drawn = batches.make_batches(update, share)
        for one_pass in split_passes(drawn, config.memory.micro_batch_size):
            found = [measure_batch(model, batches, one, update, config) for one in one_pass]
            loss = add_up_errors(found, config, batches, share)
            trainable.backward(loss.total)
            terms.append(torch.stack(loss.terms).detach())
            errors += found
        noise.add_batch(trainable, more=number < len(shares))
    added = torch.stack(terms).sum(dim=0)
    if context.processes.count > 1:
        context.processes.add_up([*trainable.gradients(), added, *noise.sums])
    are_finite = torch.isfinite(torch.cat([one.values.detach() for one in errors]))
    return _Gradient(added, are_finite, tuple(s for one in errors for s in one.samples))


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
) -> str:
    """Measure the error on the photos' centres and draw validation samples after some updates.

    No update draws the noise of validation, and each validation the same, so that the values of
    one run may be compared; what only makes training robust is left out. The photos are the
    held-out ones, where there are any.

    Returns:
        Why the training should end here, see `ValidationSampler.find_reason_to_stop`; empty where
        it should not.
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
    if config.validation.patience is None or update == config.train.steps:
        return ""
    if not validation.is_due(update):
        return ""  # somebody asked for it, which ends nothing
    reason = validation.find_reason_to_stop(update) if context.processes.is_main else ""
    ends = context.processes.any_says(bool(reason), model.runtime.device)
    return reason or ("the first process ended it" if ends else "")


def _report_progress(
    context: TrainContext, outcome: StepOutcome, step_seconds: float, noise: GradientNoise
) -> None:
    device, updates = context.model.runtime.device, context.config.train.steps
    done = outcome.update + 1
    context.observe(LossLogged(done, outcome.total, outcome.subject, outcome.prior, outcome.rate))
    values = {"loss": outcome.total, "s/update": step_seconds}
    if estimate := noise.read(outcome.norm, outcome.noise):
        told = describe_noise(estimate, noise.batches, context.config)
        context.observe(GradientNoiseMeasured(done, *told))
        names = ("SNR", "noise scale")
        values |= {n: v for n, v in zip(names, told, strict=True) if v is not None}
    if device.type == "cuda":
        values["GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    context.observe(Progress("train", "teaching", done, updates, values))


def describe_noise(
    estimate: NoiseEstimate, batches: int, config: LoomConfig
) -> tuple[float | None, float | None]:
    """Give an update's signal-to-noise ratio, and the noise scale in photos.

    Each photo comes with its share of class images, which are no photos of their own.
    """
    scale = estimate.noise_scale
    in_photos = None if scale is None else scale * config.train.batch_photos
    return estimate.signal_to_noise(batches), in_photos


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
