"""Stage 3: photos (and class images) in, an adapter out."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import Parameter

from dreamloom.adapters import Adapter, write_adapter
from dreamloom.checkpoints import load_checkpoint, save_checkpoint
from dreamloom.config import LoomConfig, TrainConfig
from dreamloom.errors import RunFolderError, TrainingError
from dreamloom.events import (
    LossLogged,
    Note,
    Observer,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
    silent,
)
from dreamloom.families.base import LoraSpec, Model
from dreamloom.lessons import Lesson, LessonPlan, choose_rows, prepare_lesson
from dreamloom.objective import LossParts, dreambooth_loss, min_snr_weights
from dreamloom.pictures import PhotoSet, PriorSet
from dreamloom.rundir import Record, RunDir, fingerprint
from dreamloom.runtime import generator_for, measure_effort, seed_for


def train_adapter(
    run: RunDir,
    model: Model,
    photos: PhotoSet,
    priors: PriorSet | None,
    config: LoomConfig,
    observe: Observer = silent,
) -> Record:
    """Teach the model one subject and write ``adapter.safetensors``.

    Every random draw is a function of the seed, its purpose and the update, so photos meet the
    same noise with and without class images, and a resumed run repeats the uninterrupted one.
    Ctrl-C and SIGTERM leave a checkpoint that the same call goes on from.

    Args:
        run: Where the adapter, the checkpoint and the record go.
        model: A loaded base model with nothing attached.
        photos: The prepared photos.
        priors: Class images, or None for prior kinds ``base`` and ``none``.
        config: Resolved settings: nothing is ``auto`` any more.
        observe: Told of progress and of every loss.

    Raises:
        TrainingError: If a loss is not finite, the run was stopped, or the checkpoint was made
            from other inputs.
    """
    inputs = _name_inputs(model, photos, priors, config)
    finished = run.finished("train", inputs)
    if finished:
        observe(StageSkipped("train", "already trained"))
        return finished
    _refuse_other_run(run, inputs)
    settings = config.train
    observe(StageStarted("train", f"{settings.updates} updates"))
    with measure_effort(model.runtime) as effort:
        lesson = prepare_lesson(
            model,
            photos,
            priors,
            (config.photo_prompt(), config.class_prompt()),
            LessonPlan(settings.crops_per_photo, settings.flip, config.seed),
            lambda done, total: observe(Progress("train", "encoding pictures", done, total)),
        )
        model.release_encoders()
        weights = model.attach_lora(_spec(config), save_memory=_saves_memory(settings, model))
        try:
            optimizer = torch.optim.AdamW(
                weights, lr=float(settings.learning_rate), weight_decay=settings.weight_decay
            )
            start = _resume(run, weights, optimizer, inputs, observe)
            save = partial(save_checkpoint, _checkpoint_file(run), weights, optimizer, inputs)
            updates = range(start, settings.updates)
            losses = _teach(model, lesson, weights, optimizer, updates, config, save, observe)
            adapter = model.read_lora()
        finally:
            model.detach_lora()
        write_adapter(run.adapter, _sign(adapter, model, photos, config))
    record = Record(
        stage="train",
        inputs=inputs,
        settings=config.train.model_dump(mode="json"),
        outputs=run.hash_outputs(run.adapter),
        results={
            "updates": settings.updates,
            "photo_exposures": settings.updates * settings.batch_photos,
            "class_images": len(priors.files) if priors else 0,
            "parameters": adapter.parameters,
            "mean_loss_last_tenth": _tail_mean(losses),
        },
        base=model.identity.as_dict(),
        seed=config.seed,
        runtime=model.runtime.name,
        seconds=effort.seconds,
        peak_mib=effort.peak_mib,
    )
    run.write_record(record)
    _checkpoint_file(run).unlink(missing_ok=True)
    observe(StageDone("train", effort.seconds, str(run.adapter)))
    return record


def _name_inputs(
    model: Model, photos: PhotoSet, priors: PriorSet | None, config: LoomConfig
) -> dict[str, str]:
    return {
        "base": model.identity.fingerprint,
        "photos": photos.fingerprint,
        "class images": priors.made_from + f":{len(priors.files)}"
        if priors
        else config.priors.kind,
        "prompts": fingerprint(config.photo_prompt(), config.class_prompt()),
        "settings": fingerprint(config.train.model_dump(exclude={"checkpoint_every"})),
        "seed": str(config.seed),
    }


def _refuse_other_run(run: RunDir, inputs: dict[str, str]) -> None:
    earlier = run.read_record("train")
    if earlier is None or not run.adapter.exists():
        return
    differing = sorted(
        k for k in {*earlier.inputs, *inputs} if earlier.inputs.get(k) != inputs.get(k)
    )
    if differing:
        raise RunFolderError(
            f"{run.path} already holds an adapter made with other {', '.join(differing)}.",
            "Name another --out; the finished run stays as it is.",
        )


def _spec(config: LoomConfig) -> LoraSpec:
    settings = config.train
    if settings.reach == "auto" or settings.alpha == "auto":
        raise ValueError("settings must be resolved before training")
    return LoraSpec(
        rank=settings.rank,
        alpha=settings.alpha,
        reach=settings.reach,
        seed=seed_for(config.seed, "adapter"),
    )


def _saves_memory(settings: TrainConfig, model: Model) -> bool:
    if settings.save_memory == "auto":
        return model.runtime.device.type == "cuda"
    return settings.save_memory


def _teach(
    model: Model,
    lesson: Lesson,
    weights: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    updates: range,
    config: LoomConfig,
    save: Callable[[int], None],
    observe: Observer,
) -> list[float]:
    """The training loop; ``save`` keeps the state after a number of updates. Returns the losses."""
    settings = config.train
    losses: list[float] = []
    began = time.perf_counter()
    with _watch_for_stop() as stop_asked:
        for update in updates:
            rate = float(settings.learning_rate) * rate_factor(update, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = compute_loss(model, lesson, update, config)
            optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, settings.clip_norm)
            _check_finite(loss, norm, update)
            optimizer.step()

            losses.append(loss.total.item())
            _tell(
                observe, loss, update, rate, settings, (time.perf_counter() - began) / len(losses)
            )
            done = update + 1
            if stop_asked.is_set() or (
                done % settings.checkpoint_every == 0 and done < updates.stop
            ):
                save(done)
            if stop_asked.is_set():
                raise TrainingError(
                    f"Stopped after update {done} of {updates.stop}; nothing is lost.",
                    "Run the same command again to go on from there.",
                )
    return losses


def compute_loss(model: Model, lesson: Lesson, update: int, config: LoomConfig) -> LossParts:
    """Compute the loss of one update; a pure function of the model, the lesson and the update."""
    settings = config.train
    batch_priors = settings.batch_priors if settings.prior_weight > 0 else 0
    rows, is_prior = choose_rows(lesson, update, settings.batch_photos, batch_priors, config.seed)
    prompt_rows = lesson.prompt_rows[rows]
    from_base = config.priors.kind == "base" and settings.prior_weight > 0
    if from_base:
        # The base model's own answers to the class prompt, on the same noisy photos, stand in
        # for class images.
        rows = torch.cat([rows, rows])
        prompt_rows = torch.cat([prompt_rows, torch.full_like(prompt_rows, lesson.class_row)])
        is_prior = torch.cat([is_prior, ~is_prior])
    device = model.runtime.device
    mean, deviation = lesson.latents.mean[rows], lesson.latents.deviation[rows]
    latents = mean + deviation * _noise_like(mean, config.seed, "posterior", update, is_prior)
    noise = _noise_like(mean, config.seed, "noise", update, is_prior)
    timesteps = _choose_timesteps(model, config.seed, update, is_prior).to(device)
    if from_base:
        half = len(rows) // 2
        latents, noise = latents[:half].repeat(2, 1, 1, 1), noise[:half].repeat(2, 1, 1, 1)
        timesteps = timesteps[:half].repeat(2)
    noisy = model.add_noise(latents, noise, timesteps)
    conditioning = lesson.conditioning.take(prompt_rows)
    framings = [lesson.framings[row] for row in rows.tolist()]
    target = model.target(latents, noise, timesteps)
    if from_base:
        with torch.no_grad(), model.lora_off():
            remembered = model.predict(noisy, timesteps, conditioning, framings)
        target = torch.where(is_prior.to(device)[:, None, None, None], remembered, target)
    gamma = settings.min_snr_gamma
    return dreambooth_loss(
        model.predict(noisy, timesteps, conditioning, framings),
        target,
        is_prior.to(device),
        prior_weight=settings.prior_weight,
        timestep_weights=min_snr_weights(model.snr(timesteps), gamma) if gamma else None,
    )


def _noise_like(
    latents: Float[Tensor, "images channels height width"],
    seed: int,
    purpose: str,
    update: int,
    is_prior: Bool[Tensor, " images"],
) -> Float[Tensor, "images channels height width"]:
    """Draw noise on the CPU, per image: a photo's noise is the same with or without priors."""
    drawn = torch.empty(latents.shape)
    for place, (prior, number) in enumerate(_number(is_prior)):
        dice = generator_for(seed, f"{purpose}{' of class' if prior else ''}", update, number)
        drawn[place] = torch.randn(latents.shape[1:], generator=dice)
    return drawn.to(latents.device, latents.dtype)


def _choose_timesteps(
    model: Model, seed: int, update: int, is_prior: Bool[Tensor, " images"]
) -> Int[Tensor, " images"]:
    chosen = []
    for prior, number in _number(is_prior):
        dice = generator_for(seed, f"timestep{' of class' if prior else ''}", update, number)
        chosen.append(int(torch.randint(model.train_timesteps, (1,), generator=dice)))
    return torch.tensor(chosen)


def _number(is_prior: Bool[Tensor, " images"]) -> Iterator[tuple[bool, int]]:
    """Number photos and class images each from 0."""
    seen = {False: 0, True: 0}
    for prior in is_prior.tolist():
        yield prior, seen[prior]
        seen[prior] += 1


def rate_factor(update: int, settings: TrainConfig) -> float:
    """The learning rate of an update as a share of the full one, above 0 and up to 1."""
    if update < settings.warmup_updates:
        return (update + 1) / settings.warmup_updates
    if settings.schedule == "constant":
        return 1.0
    span = max(1, settings.updates - settings.warmup_updates)
    return 0.5 * (1 + math.cos(math.pi * (update - settings.warmup_updates) / span))


def _check_finite(loss: LossParts, norm: Tensor, update: int) -> None:
    if not math.isfinite(loss.total.item()) or not math.isfinite(norm.item()):
        raise TrainingError(
            f"The loss or its gradient is not finite at update {update + 1}; the last checkpoint "
            "and everything before it are unharmed.",
            "Lower train.learning_rate, or use --precision fp32 or bf16.",
        )


def _tell(
    observe: Observer,
    loss: LossParts,
    update: int,
    rate: float,
    settings: TrainConfig,
    pace_seconds: float,
) -> None:
    prior = loss.prior.item() if loss.prior is not None else None
    observe(LossLogged(update + 1, loss.total.item(), loss.subject.item(), prior, rate))
    values = {"loss": loss.total.item(), "s/update": pace_seconds}
    observe(Progress("train", "teaching", update + 1, settings.updates, values))


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


def _checkpoint_file(run: RunDir) -> Path:
    return run.checkpoints / "latest.safetensors"


def _resume(
    run: RunDir,
    weights: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, str],
    observe: Observer,
) -> int:
    path = _checkpoint_file(run)
    if not path.is_file():
        return 0
    start = load_checkpoint(path, weights, optimizer, inputs)
    observe(Note("train", f"goes on after update {start}, from {path}"))
    return start


def _sign(adapter: Adapter, model: Model, photos: PhotoSet, config: LoomConfig) -> Adapter:
    """Write into the file how it was made: found alone in a folder, it can still tell."""
    return adapter.with_metadata(
        **{
            "dreamloom.kind": "subject",
            "dreamloom.subject": config.subject.phrase,
            "dreamloom.class_noun": config.subject.class_noun,
            "dreamloom.photo_prompt": config.photo_prompt(),
            "dreamloom.photos": photos.fingerprint,
            "dreamloom.prior": config.priors.kind,
            "dreamloom.base": model.identity.name,
            "dreamloom.base_fingerprint": model.identity.fingerprint,
            "dreamloom.base_revision": model.identity.revision,
            "dreamloom.seed": str(config.seed),
            "dreamloom.settings": json.dumps(config.train.model_dump(mode="json")),
        }
    )


def _tail_mean(losses: Sequence[float]) -> float | None:
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else None
