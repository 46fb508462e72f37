"""One update's loss, against a plain reference written with diffusers alone."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import generator_for, pick_runtime
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import AdapterSpec, Model
from dreamloom.models.families import load_model
from dreamloom.training.batches import Sample, TrainingBatches
from dreamloom.training.step import measure_batch, share_update
from studio_set import compute_loss, make_lesson, make_sets, small_config

UPDATE = 2


@dataclass
class Studio:
    """A base model taught a little, its file for plain diffusers, photos and class images."""

    folder: Path
    adapter: Path
    model: Model
    photos: PhotoSet
    priors: ClassImageSet


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def studio(request: pytest.FixtureRequest, tiny_sdxl: Path, tmp_path_factory) -> Studio:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    shutil.copytree(tiny_sdxl, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "prediction_type": request.param}))
    model = load_model(str(folder), pick_runtime("cpu"))
    photos, priors = make_sets(model, folder.parent / "sets")
    for weights in model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0)):
        for number, parameter in enumerate(weights.parameters):
            rng = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    adapter = folder.parent / "adapter.safetensors"
    write_adapter(adapter, model.read_adapter())
    return Studio(folder, adapter, model, photos, priors)


class Reference:
    """DreamBooth's loss as its equations say, image by image, with plain diffusers."""

    def __init__(self, studio: Studio, batches: TrainingBatches, config: LoomConfig) -> None:
        self.batches, self.config = batches, config
        self.taught = StableDiffusionXLPipeline.from_pretrained(studio.folder)
        self.taught.load_lora_weights(studio.adapter)
        self.untaught = StableDiffusionXLPipeline.from_pretrained(studio.folder)
        self.schedule = DDPMScheduler.from_pretrained(studio.folder, subfolder="scheduler")

    def rng(self, purpose: str, sample: Sample) -> torch.Generator:
        words = f"{purpose} of class" if sample.is_prior else purpose
        return generator_for(self.config.seed, words, UPDATE, sample.number)

    def pixels(self, sample: Sample) -> torch.Tensor:
        if sample.is_prior:
            image = Image.open(self.batches.priors[sample.picture])
        else:
            photo, (top, left, _) = self.batches.photos[sample.picture], sample.place
            height, width = photo.bucket_px
            image = Image.open(self.batches.folder / photo.file).crop(
                (left, top, left + width, top + height)
            )
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1

    def time_ids(self, sample: Sample) -> list[int]:
        side = self.batches.resolution_px
        if sample.is_prior:
            return [side, side, 0, 0, side, side]
        photo = self.batches.photos[sample.picture]
        return [*photo.original_px, *sample.place[:2], *photo.bucket_px]

    @torch.no_grad()
    def error(self, sample: Sample, as_class: bool = False) -> tuple[float, float]:
        """The error of one image and its timestep's signal-to-noise ratio."""
        vae = self.untaught.vae
        posterior = vae.encode(self.pixels(sample)).latent_dist
        shape = posterior.mean.shape[1:]
        latents = posterior.mean + posterior.std * torch.randn(
            shape, generator=self.rng("posterior", sample)
        )
        latents = latents * vae.config.scaling_factor
        noise = torch.randn(shape, generator=self.rng("noise", sample))[None]
        if self.config.objective.multires_noise_iterations:
            noise = self.add_levels(noise, self.rng("multires noise", sample))
        timestep = torch.randint(1000, (1,), generator=self.rng("timestep", sample))
        noisy = self.schedule.add_noise(latents, noise, timestep)
        target = noise
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timestep)
        prompts = self.batches.prompts
        prompt = prompts[1] if sample.is_prior or as_class else prompts[0]
        time_ids = torch.tensor([self.time_ids(sample)]).float()
        by_base = self.config.train.prior_target == "base_prediction"
        prompt = None if sample.drops_caption else prompt
        if as_class or (by_base and (sample.is_prior or sample.drops_caption)):
            target = self.predict(self.untaught, noisy, timestep, prompt, time_ids)
        guess = self.predict(self.taught, noisy, timestep, prompt, time_ids)
        kept = self.schedule.alphas_cumprod[timestep].item()
        return (guess - target).square().mean().item(), kept / (1 - kept)

    def add_levels(self, noise: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        levels = self.config.objective.multires_noise_iterations
        discount = self.config.objective.multires_noise_discount
        side = noise.shape[-1]
        scale = torch.nn.Upsample(size=(side, side), mode="bilinear")
        for level in range(levels):
            shrink = 2 + 2 * torch.rand((), generator=rng, dtype=torch.float64).item()
            coarse = max(1, int(side / shrink**level))
            drawn = torch.randn(1, noise.shape[1], coarse, coarse, generator=rng)
            noise = noise + discount**level * scale(drawn)
            if coarse == 1:
                break
        return noise / noise.std()

    def predict(self, pipeline, noisy, timestep, prompt, time_ids) -> torch.Tensor:
        tokens, zeros, pooled, zero = pipeline.encode_prompt(
            prompt or "a photo", do_classifier_free_guidance=prompt is None
        )
        if prompt is None:
            tokens, pooled = zeros, zero
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        return pipeline.unet(noisy, timestep, tokens, added_cond_kwargs=conditions).sample

    def weigh(self, error: float, snr: float) -> float:
        if self.config.objective.weighting == "none":
            return error
        gamma = min(snr, self.config.objective.snr_gamma)
        velocity = self.schedule.config.prediction_type == "v_prediction"
        return error * gamma / (snr + 1 if velocity else snr)

    def loss(self) -> tuple[float, float | None]:
        samples = self.batches.draw_samples(UPDATE, share_update(self.config, self.batches))
        photos = [sample for sample in samples if not sample.is_prior]
        subject = np.mean([self.weigh(*self.error(sample)) for sample in photos])
        if self.config.priors.kind == "base":
            return subject, np.mean([self.weigh(*self.error(c, as_class=True)) for c in photos])
        priors = [self.weigh(*self.error(sample)) for sample in samples if sample.is_prior]
        return subject, np.mean(priors) if priors else None


@pytest.mark.parametrize("kind", ["generated", "predicted", "base", "none"])
@pytest.mark.parametrize(("batch", "weighting"), [(1, "none"), (3, "min_snr")])
def test_the_loss_is_the_one_of_the_equations(
    studio: Studio, kind: str, batch: int, weighting: str
) -> None:
    targets = {"predicted": "base_prediction"}
    config = small_config(
        studio.model,
        priors__kind="generated" if kind in targets else kind,
        train__prior_target=targets.get(kind, "images"),
        train__caption_dropout=0.4 if kind in targets else 0.0,
        train__batch_photos=batch,
        train__batch_priors=batch,
        train__prior_weight=0.7,
        objective__weighting=weighting,
        objective__multires_noise_iterations=6 if kind == "none" else 0,
    )
    priors = studio.priors if config.priors.kind == "generated" else None
    batches = make_lesson(studio.model, studio.photos, priors, config)
    mine = compute_loss(studio.model, batches, UPDATE, config)
    subject, prior = Reference(studio, batches, config).loss()
    assert mine.subject.item() == pytest.approx(subject, rel=1e-5)
    if prior is None:
        assert mine.prior is None
        assert mine.total.item() == pytest.approx(subject, rel=1e-5)
    else:
        assert mine.prior is not None
        # The base's own answer is nearly the taught one: rounding is more of their difference.
        close = 3e-5 if kind in ("base", *targets) else 1e-5
        assert mine.prior.item() == pytest.approx(prior, rel=close)
        assert mine.total.item() == pytest.approx(subject + 0.7 * prior, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_what_is_kept_is_kept_outside_the_subject_as_well(studio: Studio, dropout: float) -> None:
    config = small_config(
        studio.model,
        priors__kind="generated",
        train__prior_target="base_prediction",
        train__caption_dropout=dropout,
        objective__background_weight=0.0,
    )
    batches = make_lesson(studio.model, studio.photos, studio.priors, config)
    (batch,) = batches.make_batches(UPDATE, share_update(config, batches))
    masks = torch.zeros(len(batch.samples), *batch.latents.mean.shape[-2:])
    masks[:, 2:5, 1:4] = 1
    plain, masked = (
        measure_batch(studio.model, batches, replace(batch, masks=one), UPDATE, config).values
        for one in (None, masks)
    )
    kept = batch.is_prior | (dropout == 1)
    torch.testing.assert_close(plain[kept], masked[kept])
    assert not torch.isclose(plain[~kept], masked[~kept]).any()
