"""One update's loss: what was dealt, with its noise, through the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import send
from dreamloom.models.base import Latents, Model
from dreamloom.training.batches import Batch, BatchShare, Sample, TrainingBatches
from dreamloom.training.losses import (
    LossParts,
    combine_errors,
    huber_deltas,
    image_errors,
    subject_weights,
    timestep_weights,
)
from dreamloom.training.noise import Rng, draw_noise, draw_normal, draw_timesteps, perturb_noise


@dataclass(frozen=True)
class Errors:
    """How far each picture of a batch was from its target, and how much that counts.

    Args:
        samples: The pictures.
        values: Error per picture.
        weights: Weight of each picture's timestep.
    """

    samples: tuple[Sample, ...]
    values: Float[Tensor, " images"]
    weights: Float[Tensor, " images"]

    @property
    def is_prior(self) -> Bool[Tensor, " images"]:
        """True for class images."""
        return torch.tensor([sample.is_prior for sample in self.samples])


def share_update(
    config: LoomConfig, batches: TrainingBatches, count: int = 1, index: int = 0
) -> BatchShare:
    """Say which part of an update one of its batches is."""
    with_priors = config.train.prior_weight > 0 and bool(batches.priors)
    return BatchShare(
        photos=config.train.batch_photos,
        priors=config.train.batch_priors if with_priors else 0,
        batches=count,
        index=index,
    )


def compute_loss(
    model: Model,
    batches: TrainingBatches,
    update: int,
    config: LoomConfig,
    share: BatchShare | None = None,
) -> LossParts:
    """Compute one batch's share of an update's loss; without a share, the whole of it.

    A pure function of the model, the lesson and the update.
    """
    return add_up_errors(
        measure_errors(model, batches, update, config, share), config, batches, share
    )


def measure_passes(
    model: Model, batches: TrainingBatches, update: int, config: LoomConfig, share: BatchShare
) -> Iterator[list[Errors]]:
    """Measure the errors of one batch, in passes of ``memory.micro_batch_size``.

    What one pass keeps for its gradient can be forgotten before the next begins.
    """
    most = config.memory.micro_batch_size
    if most == "auto" or most >= share.photos + share.priors:
        yield measure_errors(model, batches, update, config, share)
        return
    for batch in batches.make_batches(update, share):
        for start in range(0, len(batch.samples), most):
            yield [measure_batch(model, batches, _cut(batch, start, most), update, config)]


def _cut(batch: Batch, start: int, count: int) -> Batch:
    rows = slice(start, start + count)
    return Batch(
        samples=batch.samples[rows],
        latents=Latents(batch.latents.mean[rows], batch.latents.deviation[rows]),
        framings=batch.framings[rows],
        prompts=batch.prompts[rows],
        masks=None if batch.masks is None else batch.masks[rows],
    )


def measure_errors(
    model: Model,
    batches: TrainingBatches,
    update: int,
    config: LoomConfig,
    share: BatchShare | None = None,
) -> list[Errors]:
    """Measure the errors of one batch, in parts of one shape each."""
    share = share or share_update(config, batches)
    return [
        measure_batch(model, batches, batch, update, config)
        for batch in batches.make_batches(update, share)
    ]


def add_up_errors(
    parts: list[Errors],
    config: LoomConfig,
    batches: TrainingBatches,
    share: BatchShare | None = None,
) -> LossParts:
    """Put the errors together as DreamBooth weighs them."""
    share = share or share_update(config, batches)
    photos = share.photos * share.batches
    from_base = remembers_by_base(config)
    return combine_errors(
        torch.cat([part.values for part in parts]),
        torch.cat([part.is_prior for part in parts]),
        prior_weight=config.train.prior_weight,
        weights=torch.cat([part.weights for part in parts]),
        photos_in_all=photos,
        priors_in_all=photos if from_base else share.priors * share.batches,
    )


def remembers_by_base(config: LoomConfig) -> bool:
    """Say whether the base model's own answers stand in for class images."""
    return config.priors.kind == "base" and config.train.prior_weight > 0


def measure_batch(
    model: Model,
    batches: TrainingBatches,
    batch: Batch,
    update: int,
    config: LoomConfig,
) -> Errors:
    """Add noise to one batch, let the model predict, and measure each picture's error.

    Args:
        model: The model, with an adapter attached or not.
        batches: Whose batch it is.
        batch: Pictures of one shape.
        update: Which update, from 0: the dice depend on it.
        config: Resolved settings.
    """
    settings = config.objective
    device = model.runtime.device
    rng = _throw(batch, update, config.seed)
    _, channels, height, width = batch.latents.mean.shape
    shape = (channels, height, width)
    drawn = send(draw_normal(rng, "posterior", shape), device)
    latents = batch.latents.mean + batch.latents.deviation * drawn
    noise = draw_noise(rng, shape, settings.noise_offset)
    mixed = noise
    if settings.input_perturbation:
        mixed = perturb_noise(noise, rng, settings.input_perturbation)
    noise, mixed = send(noise, device), send(mixed, device)
    timesteps = send(
        draw_timesteps(
            rng, model.train_timesteps, settings.timesteps, span=settings.timestep_range
        ),
        device,
    )
    noisy = model.add_noise(latents, mixed, timesteps)
    target = model.target(latents, noise, timesteps)
    if remembers_by_base(config):
        batch, noisy, target, timesteps = _remember(model, batches, batch, noisy, target, timesteps)
    prediction = model.predict(
        noisy, timesteps, batches.conditioning(batch.prompts), batch.framings
    )
    snr = model.snr(timesteps)
    values = image_errors(
        prediction,
        target,
        settings.loss,
        deltas=huber_deltas(
            settings.huber_schedule,
            settings.huber_delta,
            timesteps / (model.train_timesteps - 1),
            snr,
        )
        if settings.loss in ("huber", "smooth_l1")
        else None,
        place_weights=subject_weights(batch.masks, settings.background_weight)
        if batch.masks is not None
        else None,
    )
    if settings.weighting == "auto":
        raise ValueError("settings must be resolved before training")
    weights = timestep_weights(settings.weighting, snr, model.prediction, gamma=settings.snr_gamma)
    return Errors(batch.samples, values, weights)


def _throw(batch: Batch, update: int, seed: int) -> Rng:
    return Rng(seed, update, batch.is_prior, torch.tensor([c.number for c in batch.samples]))


def _remember(
    model: Model,
    batches: TrainingBatches,
    batch: Batch,
    noisy: Tensor,
    target: Tensor,
    timesteps: Tensor,
) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """Add the same noisy photos under the class prompt; the base model says what is right there."""
    prompts = (batches.prompts[1],) * len(batch.samples)
    with torch.no_grad(), model.disable_adapter():
        remembered = model.predict(
            noisy, timesteps, batches.conditioning(prompts), batch.framings
        ).to(target.dtype)
    doubled = replace(
        batch,
        samples=(
            *batch.samples,
            *(replace(sample, kind="class image") for sample in batch.samples),
        ),
        framings=batch.framings * 2,
        prompts=batch.prompts + prompts,
        # What lies outside the subject is to be remembered as well.
        masks=torch.cat([batch.masks, torch.ones_like(batch.masks)])
        if batch.masks is not None
        else None,
    )
    return doubled, noisy.repeat(2, 1, 1, 1), torch.cat([target, remembered]), timesteps.repeat(2)
