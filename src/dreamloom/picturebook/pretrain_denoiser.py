"""Training the denoiser and the text encoders together, on latents made once."""

import logging
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTokenizer

from dreamloom.picturebook.captions import caption
from dreamloom.picturebook.dataset import PictureStore, read_count, to_signed, write_count
from dreamloom.picturebook.models import LATENT_CHANNELS, LATENT_PX, build_noise_schedule
from dreamloom.picturebook.pretrain_text import TextEncoders, encode_text, tokenize
from dreamloom.picturebook.training import Run, Schedule, autocast, bf16_is_faster, seeded

_BATCH = 32
_PEAK_RATE = 8e-4
_DROPPED_PROMPTS = 0.1
_SNR_RANGE = (0.1, 5.0)
_HEAVIEST = 50.0
_ENCODE_BATCH = 32
_LOG_EVERY = 50

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_ahead(work: Path, store: PictureStore, model: AutoencoderKL) -> None:
    """Encode every picture to the mean and log-variance of its latents; continues where it was."""
    pixels_drawn = len(store)
    file, done_file = work / "latents.npy", work / "latents.done"
    shape = (store.capacity, 2 * LATENT_CHANNELS, LATENT_PX, LATENT_PX)
    if not done_file.exists():
        np.lib.format.open_memmap(file, "w+", np.float16, shape).flush()
        write_count(done_file, 0)
    latents = np.load(file, mmap_mode="r+")
    bf16 = bf16_is_faster(model.device)
    for start in range(read_count(done_file), pixels_drawn, _ENCODE_BATCH):
        stop = min(start + _ENCODE_BATCH, pixels_drawn)
        pictures = to_signed(store.pixels(np.arange(start, stop))).to(model.device)
        with autocast(model.device, bf16):
            posterior = model.encode(pictures).latent_dist
        latents[start:stop] = posterior.parameters.float().cpu().numpy()
        write_count(done_file, stop)


def snr_weights(
    alphas_cumprod: Float[Tensor, " steps"], timesteps: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Weigh noise levels so that neither nearly clean nor nearly hidden pictures are neglected.

    The error of the clean picture that a predicted noise implies is weighed by the SNR, held
    between a floor and a cap. The cap is min-SNR's. Without the floor the noisiest steps, which
    choose who is drawn, hardly count: there even a useless guess at the picture is a good guess
    at the noise. No error of noise weighs more than 50 times, so that the very last steps, where
    nothing can be known, do not drown the others.

    Source:
        Hang et al., Efficient Diffusion Training via Min-SNR Weighting (arXiv:2303.09556), Eq. 8,
        for the cap; the floor is ours.
    """
    kept = alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    return (snr.clamp(*_SNR_RANGE) / snr).clamp(max=_HEAVIEST)


def train_denoiser(
    work: Path,
    store: PictureStore,
    parts: tuple[UNet2DConditionModel, TextEncoders],
    tokenizer: CLIPTokenizer,
    updates: int,
    device: torch.device,
) -> Run:
    """Train until ``updates`` are done, continuing from the newest checkpoint.

    Returns:
        The run; its averages are what to export.
    """
    unet, encoders = parts
    parameters = prepare_parts(parts, device)
    run = Run("denoiser", work, parameters, Schedule(_PEAK_RATE, updates))
    noise_schedule = build_noise_schedule()
    alphas_cumprod = noise_schedule.alphas_cumprod.to(device)
    latents = np.load(work / "latents.npy", mmap_mode="r")
    bf16 = bf16_is_faster(device)
    losses: list[float] = []
    start, started_at = time.monotonic(), run.updates_done
    while not run.finished:
        rng, torch_rng = seeded("denoiser", run.updates_done)
        encoded = read_count(work / "latents.done")
        rows = np.sort(rng.integers(0, encoded, _BATCH))
        clean = _sample_latents(torch.from_numpy(latents[rows]).float(), torch_rng).to(device)
        noise = torch.randn(clean.shape, generator=torch_rng).to(device)
        timesteps = _spread_timesteps(torch_rng, noise_schedule.config.num_train_timesteps).to(
            device
        )
        words_rng = random.Random(int(rng.integers(2**62)))
        tokens = tokenize(tokenizer, [caption(store.record(int(row)), words_rng) for row in rows])
        kept = torch.from_numpy(rng.random(_BATCH) >= _DROPPED_PROMPTS).float().to(device)
        with autocast(device, bf16):
            hidden, pooled = encode_text(encoders, tokens.to(device))
            conditions = {
                "text_embeds": pooled * kept[:, None],
                "time_ids": store.time_ids(rows).to(device),
            }
            noisy = noise_schedule.add_noise(clean, noise, timesteps)
            predicted = unet(
                noisy, timesteps, hidden * kept[:, None, None], added_cond_kwargs=conditions
            ).sample
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * snr_weights(alphas_cumprod, timesteps)).mean()
        run.step(loss)
        losses.append(loss.item())
        if run.updates_done % _LOG_EVERY == 0:
            seconds = (time.monotonic() - start) / (run.updates_done - started_at)
            logger.info(
                "denoiser %d/%d loss %.4f, %.3f s an update",
                run.updates_done,
                updates,
                np.mean(losses[-200:]),
                seconds,
            )
    return run


def prepare_parts(
    parts: tuple[UNet2DConditionModel, TextEncoders], device: torch.device
) -> list[torch.nn.Parameter]:
    """Make the parts ready to train, and return their parameters in the checkpoints' order."""
    unet, encoders = parts
    if device.type == "cpu":
        # The fused attention's backward pass takes four times as long as the plain one's.
        unet.set_attn_processor(AttnProcessor())
        for encoder in encoders:
            encoder.set_attn_implementation("eager")
    parameters: list[torch.nn.Parameter] = []
    for part in (unet, *encoders):
        part.to(device).train()
        parameters += part.parameters()
    return parameters


def _sample_latents(
    posteriors: Float[Tensor, "n c2 h w"], rng: torch.Generator
) -> Float[Tensor, "n c h w"]:
    mean, log_variance = posteriors.chunk(2, dim=1)
    spread = torch.exp(0.5 * log_variance.clamp(-30, 20))
    return mean + spread * torch.randn(mean.shape, generator=rng)


def _spread_timesteps(rng: torch.Generator, steps: int) -> Int[Tensor, " n"]:
    """Draw one timestep from each of as many equal ranges as the batch has pictures.

    Their mean loss varies less between updates than that of independent draws.
    """
    fractions = (torch.arange(_BATCH) + torch.rand(_BATCH, generator=rng)) / _BATCH
    return (fractions[torch.randperm(_BATCH, generator=rng)] * steps).long().clamp(max=steps - 1)
