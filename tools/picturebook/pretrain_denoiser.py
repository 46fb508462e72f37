"""Training the denoiser and the text encoders together, on latents made once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTokenizer

from tools.picturebook.captions import CLASS_CAPTION, caption
from tools.picturebook.dataset import PictureStore, read_count, to_signed, write_count
from tools.picturebook.models import LATENT_CHANNELS, LATENT_PX, build_noise_schedule
from tools.picturebook.pretrain_text import TextEncoders, encode_text, tokenize
from tools.picturebook.training import Run, Schedule, autocast, bf16_is_faster, seeded

_LEAST_SNR, _MOST_SNR = 0.1, 5.0
_HEAVIEST = 50.0
_ENCODE_BATCH = 32


@dataclass(frozen=True)
class Share:
    """What a part of each batch is made of.

    Args:
        store: The pictures.
        count: How many of them a batch has.
        least_snr: The floor of the weights' SNR; see `snr_weights`.
        heaviest: What no error of noise weighs more than.
        first_timestep: The least timestep.
        dropped: The share of prompts that are dropped.
        unsaid: The share of captions that are but ``a photo of a person``.
    """

    store: PictureStore
    count: int = 32
    least_snr: float = _LEAST_SNR
    heaviest: float = _HEAVIEST
    first_timestep: int = 0
    dropped: float = 0.1
    unsaid: float = 0.0


def mix_portraits(pictures: PictureStore, portraits: PictureStore) -> tuple[Share, Share]:
    """Make batches in which nearly half of the pictures are what `a photo of a person` may show.

    Prompts are dropped among the other pictures alone, so that without a prompt the model draws
    the world as it is.
    """
    return (
        Share(pictures, 18, dropped=0.15),
        Share(portraits, 14, 0.2, 100.0, first_timestep=250, dropped=0.0, unsaid=0.7),
    )


@torch.no_grad()
def encode_ahead(work: Path, store: PictureStore, model: AutoencoderKL) -> None:
    """Encode every picture to the mean and log-variance of its latents; continues where it was."""
    pixels_drawn = len(store)
    file, done_file = _latents_files(work, store)
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
    alphas_cumprod: Float[Tensor, " steps"],
    timesteps: Int[Tensor, " n"],
    least_snr: float = _LEAST_SNR,
    heaviest: float = _HEAVIEST,
) -> Float[Tensor, " n"]:
    """Weigh noise levels so that neither nearly clean nor nearly hidden pictures are neglected.

    The error of the clean picture that a predicted noise implies is weighed by the SNR, held
    between a floor and a cap. The cap is min-SNR's. Without the floor the noisiest steps, which
    choose who is drawn, hardly count: there even a useless guess at the picture is a good guess
    at the noise. No error of noise weighs more than ``heaviest``, so that the very last steps,
    where nothing can be known, do not drown the others.

    Source:
        Hang et al., Efficient Diffusion Training via Min-SNR Weighting (arXiv:2303.09556), Eq. 8,
        for the cap; the floor is ours.
    """
    signal = alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    return (snr.clamp(least_snr, _MOST_SNR) / snr).clamp(max=heaviest)


def train_denoiser(
    work: Path,
    shares: Sequence[Share],
    parts: tuple[UNet2DConditionModel, TextEncoders],
    tokenizer: CLIPTokenizer,
    plan: tuple[str, Schedule],
    device: torch.device,
) -> Run:
    """Train until all updates are done, continuing from the newest checkpoint.

    Args:
        work: The work folder.
        shares: What each batch is made of.
        parts: What is trained.
        tokenizer: The text encoders'.
        plan: The run's name, which its checkpoints bear, and its learning rate.
        device: Where to train.

    Returns:
        The run; its averages are what to export.
    """
    unet, encoders = parts
    name, schedule = plan
    parameters = prepare_parts(parts, device)
    run = Run(name, work, parameters, schedule)
    noise_schedule = build_noise_schedule()
    alphas_cumprod = noise_schedule.alphas_cumprod
    latents = [np.load(_latents_files(work, one.store)[0], mmap_mode="r") for one in shares]
    bf16 = bf16_is_faster(device)
    while not run.finished:
        rngs = seeded(name, run.updates_done)
        # More may be encoded meanwhile.
        encoded = [read_count(_latents_files(work, one.store)[1]) for one in shares]
        batch = _join(
            [
                _deal(share, stored[:count], alphas_cumprod, *rngs)
                for share, stored, count in zip(shares, latents, encoded, strict=True)
            ]
        )
        clean, timesteps, has_text = (
            one.to(device) for one in (batch.clean, batch.timesteps, batch.has_text)
        )
        noise = torch.randn(batch.clean.shape, generator=rngs[1]).to(device)
        tokens = tokenize(tokenizer, batch.captions)
        with autocast(device, bf16):
            hidden, pooled = encode_text(encoders, tokens.to(device))
            conditions = {
                "text_embeds": pooled * has_text[:, None],
                "time_ids": batch.time_ids.to(device),
            }
            noisy = noise_schedule.add_noise(clean, noise, timesteps)
            predicted = unet(
                noisy, timesteps, hidden * has_text[:, None, None], added_cond_kwargs=conditions
            ).sample
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * batch.weights.to(device)).mean()
        run.step(loss)
    return run


class _Batch(NamedTuple):
    """Pictures to learn from; ``has_text`` is 0 where the prompt is dropped, else 1."""

    clean: Float[Tensor, "n c h w"]
    timesteps: Int[Tensor, " n"]
    weights: Float[Tensor, " n"]
    captions: list[str]
    has_text: Float[Tensor, " n"]
    time_ids: Float[Tensor, "n 6"]


def _deal(
    share: Share,
    latents: Float[np.ndarray, "all c2 h w"],
    alphas_cumprod: Float[Tensor, " steps"],
    rng: np.random.Generator,
    torch_rng: torch.Generator,
) -> _Batch:
    """Choose one share's pictures of a batch, with captions written anew."""
    rows = np.sort(rng.integers(0, len(latents), share.count))
    clean = _sample_latents(torch.from_numpy(latents[rows]).float(), torch_rng)
    timesteps = _spread_timesteps(torch_rng, share.count, share.first_timestep, len(alphas_cumprod))
    words_rng = random.Random(int(rng.integers(2**62)))
    captions = [
        CLASS_CAPTION
        if words_rng.random() < share.unsaid
        else caption(share.store.record(int(row)), words_rng)
        for row in rows
    ]
    return _Batch(
        clean,
        timesteps,
        snr_weights(alphas_cumprod, timesteps, share.least_snr, share.heaviest),
        captions,
        torch.from_numpy(rng.random(share.count) >= share.dropped).float(),
        share.store.time_ids(rows),
    )


def _join(dealt: Sequence[_Batch]) -> _Batch:
    clean, timesteps, weights, captions, has_text, time_ids = zip(*dealt, strict=True)
    return _Batch(
        torch.cat(clean),
        torch.cat(timesteps),
        torch.cat(weights),
        [words for one in captions for words in one],
        torch.cat(has_text),
        torch.cat(time_ids),
    )


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


def _spread_timesteps(rng: torch.Generator, count: int, first: int, end: int) -> Int[Tensor, " n"]:
    """Draw one timestep from each of as many equal ranges as there are pictures.

    Their mean loss varies less between updates than that of independent draws.
    """
    fractions = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    spread = first + fractions[torch.randperm(count, generator=rng)] * (end - first)
    return spread.long().clamp(max=end - 1)


def _latents_files(work: Path, store: PictureStore) -> tuple[Path, Path]:
    """Name the files of a collection's latents and of how many there are."""
    prefix = "" if store.collection == "pictures" else f"{store.collection}-"
    return work / f"{prefix}latents.npy", work / f"{prefix}latents.done"
