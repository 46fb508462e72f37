"""One update's loss: its batches, with their noise and timesteps, through the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import seed_for, send
from dreamloom.models.base import DropoutSeeds, Framing, Latents, Model
from dreamloom.training.batches import Batch, BatchShare, Sample, TrainingBatches
from dreamloom.training.losses import (
    LossParts,
    combine_errors,
    huber_deltas,
    image_errors,
    subject_weights,
    timestep_weights,
)
from dreamloom.training.noise import (
    Rng,
    add_multires_noise,
    draw_noise,
    draw_normal,
    draw_timesteps,
    perturb_noise,
)


@dataclass(frozen=True)
class BatchErrors:
    """How far each picture of a batch was from its target, and how much that counts.

    Args:
        samples: The pictures.
        values: Error per picture.
        weights: Weight of each picture's timestep.
    """

    samples: tuple[Sample, ...]
    values: Float[Tensor, " images"]
    weights: Float[Tensor, " images"]


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


def split_passes(drawn: list[Batch], most: int | Literal["auto"]) -> list[list[Batch]]:
    """Split one batch, drawn in parts of one shape, into passes of at most so many images.

    What one pass keeps for its gradient can be forgotten before the next begins. The whole goes
    at once where it is small enough, and with ``auto``.
    """
    if most == "auto" or most >= sum(len(batch.samples) for batch in drawn):
        return [drawn]
    return [
        [
            Batch(
                samples=batch.samples[rows],
                latents=Latents(batch.latents.mean[rows], batch.latents.deviation[rows]),
                framings=batch.framings[rows],
                prompts=batch.prompts[rows],
                masks=None if batch.masks is None else batch.masks[rows],
            )
        ]
        for batch in drawn
        for rows in (slice(first, first + most) for first in range(0, len(batch.samples), most))
    ]


def add_up_errors(
    parts: list[BatchErrors], config: LoomConfig, batches: TrainingBatches, share: BatchShare
) -> LossParts:
    """Put the errors together as DreamBooth weighs them: a share of an update's loss."""
    photos = share.photos * share.batches
    return combine_errors(
        torch.cat([part.values for part in parts]),
        torch.tensor([sample.is_prior for part in parts for sample in part.samples]),
        prior_weight=config.train.prior_weight,
        weights=torch.cat([part.weights for part in parts]),
        photos_in_all=photos,
        priors_in_all=photos if remembers_by_base(config) else share.priors * share.batches,
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
) -> BatchErrors:
    """Add noise to one batch, let the model predict, and measure each picture's error.

    Args:
        model: The model, with an adapter attached or not.
        batches: Whose batch it is.
        batch: Pictures of one shape.
        update: Which update, from 0: the noise depends on it.
        config: Resolved settings.
    """
    settings = config.objective
    device = model.runtime.device
    numbers = torch.tensor([sample.number for sample in batch.samples])
    rng = Rng(config.seed, update, batch.is_prior, numbers)
    _, channels, height, width = batch.latents.mean.shape
    shape = (channels, height, width)
    drawn = send(draw_normal(rng, "posterior", shape), device)
    latents = batch.latents.mean + batch.latents.deviation * drawn
    noise = add_multires_noise(
        draw_noise(rng, shape, settings.noise_offset),
        rng,
        settings.multires_noise_iterations,
        settings.multires_noise_discount,
    )
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
    elif config.keeps_predictions:
        batch, target = _keep_predictions(model, batches, batch, noisy, target, timesteps)
    prediction = model.predict(
        noisy,
        timesteps,
        batches.conditioning(batch.prompts),
        batch.framings,
        **_drop_out(config, batch, update),
    )
    snr = model.snr(timesteps)
    values = image_errors(
        prediction,
        target,
        settings.loss,
        deltas=_find_deltas(config, timesteps / (model.train_timesteps - 1), snr),
        place_weights=subject_weights(batch.masks, settings.background_weight)
        if batch.masks is not None
        else None,
    )
    if settings.weighting == "auto":
        raise ValueError("settings must be resolved before training")
    weights = timestep_weights(settings.weighting, snr, model.prediction, gamma=settings.snr_gamma)
    return BatchErrors(batch.samples, values, weights)


def _find_deltas(config: LoomConfig, noise_shares: Tensor, snr: Tensor) -> Tensor | None:
    """Say where errors turn from squares to absolute values, if the loss is one that does."""
    settings = config.objective
    if settings.loss not in ("huber", "smooth_l1"):
        return None
    return huber_deltas(settings.huber_schedule, settings.huber_delta, noise_shares, snr)


def _drop_out(config: LoomConfig, batch: Batch, update: int) -> dict[str, DropoutSeeds]:
    """Say from which seeds a pass drops parts of the adapter out, if it does."""
    adapter = config.adapter
    if not (adapter.dropout or adapter.rank_dropout or adapter.module_dropout):
        return {}
    numbers = torch.tensor([sample.number for sample in batch.samples])
    images = Rng(config.seed, update, batch.is_prior, numbers).seeds("dropout")
    of_update = seed_for(config.seed, "module dropout", update)
    return {"dropout": DropoutSeeds(tuple(images), of_update)}


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
    remembered = _predict_untaught(model, batches, noisy, timesteps, prompts, batch.framings)
    remembered = remembered.to(target.dtype)
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


def _keep_predictions(
    model: Model,
    batches: TrainingBatches,
    batch: Batch,
    noisy: Tensor,
    target: Tensor,
    timesteps: Tensor,
) -> tuple[Batch, Tensor]:
    """Let the base model say what is right for class images, and for whatever has no caption.

    A class image's own noise is one draw of what the base model knows on average: trained towards
    it, an adapter learns the few images that there are by heart, and forgets the others. And what
    is predicted for no prompt is subtracted from every picture that guidance draws: moved towards
    the subject, it moves the class away from it.
    """
    rows = [
        row for row, sample in enumerate(batch.samples) if sample.is_prior or sample.drops_caption
    ]
    if not rows:
        return batch, target
    kept = _predict_untaught(
        model,
        batches,
        noisy[rows],
        timesteps[rows],
        tuple(batch.prompts[row] for row in rows),
        tuple(batch.framings[row] for row in rows),
    )
    target = target.clone()
    target[rows] = kept.to(target.dtype)
    if batch.masks is not None:
        # What lies outside the subject is to be kept as well.
        masks = batch.masks.clone()
        masks[rows] = 1
        batch = replace(batch, masks=masks)
    return batch, target


@torch.no_grad()
def _predict_untaught(
    model: Model,
    batches: TrainingBatches,
    noisy: Tensor,
    timesteps: Tensor,
    prompts: tuple[str, ...],
    framings: tuple[Framing, ...],
) -> Tensor:
    with model.disable_adapter():
        return model.predict(noisy, timesteps, batches.conditioning(prompts), framings)
