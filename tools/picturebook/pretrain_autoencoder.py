"""Training the autoencoder: pictures to latents and back."""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from tools.picturebook.dataset import PICTURE_PX, PictureStore, read_count, to_signed
from tools.picturebook.models import LATENT_CHANNELS, build_autoencoder
from tools.picturebook.training import Run, Schedule, autocast, bf16_is_faster, seeded

_CROP_PX = 64
_BATCH = 12
_WHOLE_PICTURE_BATCH = 6
_WHOLE_PICTURE_SHARE = 0.1
_GRADIENT_WEIGHT = 0.5
_KL_WEIGHT = 1e-4
_ANCHOR_WEIGHT = 0.3
_DECIBEL_WEIGHT = 0.01


def reconstruction_loss(
    redrawn: Float[Tensor, "n 3 h w"], pictures: Float[Tensor, "n 3 h w"]
) -> Float[Tensor, ""]:
    """Compare pixels and the steps between neighbouring pixels, so that edges stay sharp.

    The negative PSNR, in decibels, makes a smooth picture's small errors count as a busy one's.
    """
    error = redrawn - pictures
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    decibels = 10 * error.square().mean(dim=(1, 2, 3)).add(1e-6).log10().mean() + 60  # 0 at best
    return error.abs().mean() + _GRADIENT_WEIGHT * (across + down) + _DECIBEL_WEIGHT * decibels


def train_autoencoder(
    work: Path,
    store: PictureStore,
    updates: int,
    device: torch.device,
    start: AutoencoderKL | None = None,
) -> AutoencoderKL:
    """Train on crops, for it is convolutional and updates matter more than pixels.

    The last tenth is trained on whole pictures, whose borders the crops never show.

    Args:
        work: Where the checkpoints lie.
        store: The pictures.
        updates: How many to do in all.
        device: Where to train.
        start: What to train on; its latents are kept close to what they are, so that a denoiser
            of them has little to learn anew. None begins from nothing.

    Returns:
        The autoencoder with averaged weights and latents of zero mean and unit spread.
    """
    torch.manual_seed(0)
    model = (start or build_autoencoder()).to(device)
    anchor = copy.deepcopy(model).requires_grad_(False) if start else None
    run = Run("autoencoder", work, list(model.parameters()), Schedule(2e-3, updates), 1e-4)
    bf16 = bf16_is_faster(device)
    while not run.finished:
        pictures, noise = _batch(store, run.updates_done, updates)
        pictures, noise = pictures.to(device), noise.to(device)
        with autocast(device, bf16):
            posterior = model.quant_conv(model.encoder(pictures)).float()
            mean, log_variance = posterior.chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            latents = mean + noise * torch.exp(0.5 * log_variance)
            redrawn = model.decoder(model.post_quant_conv(latents)).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction_loss(redrawn, pictures)
        total = loss + _KL_WEIGHT * kl
        if anchor is not None:
            with torch.no_grad(), autocast(device, bf16):
                before = anchor.quant_conv(anchor.encoder(pictures)).float().chunk(2, dim=1)[0]
            total = total + _ANCHOR_WEIGHT * (mean - before).square().mean()
        run.step(total, loss, kl)
    run.average.swap(run.parameters)
    model.eval()
    fold_latent_statistics(model, encode_means(model, store, np.arange(0, len(store), 29)[:512]))
    return model


@torch.no_grad()
def encode_means(
    model: AutoencoderKL, store: PictureStore, indices: np.ndarray
) -> Float[Tensor, "n c h w"]:
    """Encode pictures to the means of their latents, unscaled."""
    device = next(model.parameters()).device
    return torch.cat(
        [
            model.encode(to_signed(store.pixels(part)).to(device)).latent_dist.mean.cpu()
            for part in np.array_split(indices, max(1, len(indices) // 32))
        ]
    )


@torch.no_grad()
def fold_latent_statistics(model: AutoencoderKL, means: Float[Tensor, "n c h w"]) -> None:
    """Give each latent channel zero mean and unit spread, without changing what is decoded.

    Channels come out of training with spreads that differ by a factor of two, which the denoiser
    would have to learn. The two 1x1 convolutions around the latents absorb the change exactly, so
    the scaling factor is 1 and nobody who loads the model needs to know.
    """
    shift, spread = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    shift, spread = shift.to(model.device), spread.to(model.device)
    before, after = model.quant_conv, model.post_quant_conv
    n = LATENT_CHANNELS
    before.weight[:n] /= spread[:, None, None, None]
    before.bias[:n] = (before.bias[:n] - shift) / spread
    before.bias[n:] -= 2 * spread.log()
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight *= spread[None, :, None, None]
    model.register_to_config(scaling_factor=1.0)


def polish_decoder(
    work: Path, store: PictureStore, model: AutoencoderKL, updates: int
) -> AutoencoderKL:
    """Train the decoder on, with the encoder fixed, so that the denoiser's latents stay valid.

    Reads the latents that `encode_ahead` made, so it can run beside the denoiser's training.
    """
    latents = np.load(work / "latents.npy", mmap_mode="r")
    trained = [*model.post_quant_conv.parameters(), *model.decoder.parameters()]
    run = Run("decoder", work, trained, Schedule(1e-3, updates, decay_share=0.5), 1e-4)
    bf16 = bf16_is_faster(model.device)
    while not run.finished:
        update = run.updates_done
        rng, torch_rng = seeded("decoder", update)
        whole = update >= updates * (1 - _WHOLE_PICTURE_SHARE)
        n = _WHOLE_PICTURE_BATCH if whole else _BATCH
        size = PICTURE_PX if whole else _CROP_PX
        rows = np.sort(rng.integers(0, read_count(work / "latents.done"), n))
        tops, lefts = rng.integers(0, (PICTURE_PX - size) // 8 + 1, (2, n))
        posteriors, pixels = torch.from_numpy(latents[rows]).float(), store.pixels(rows)
        places = list(zip(range(n), tops, lefts, strict=True))
        pictures = torch.stack(
            [pixels[i, :, 8 * t : 8 * t + size, 8 * x : 8 * x + size] for i, t, x in places]
        )
        small = size // 8
        posteriors = torch.stack(
            [posteriors[i, :, t : t + small, x : x + small] for i, t, x in places]
        )
        mean, log_variance = posteriors.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=torch_rng)
        codes = (mean + noise * torch.exp(0.5 * log_variance)).to(model.device)
        with autocast(model.device, bf16):
            redrawn = model.decoder(model.post_quant_conv(codes)).float()
        loss = reconstruction_loss(redrawn, to_signed(pictures).to(model.device))
        run.step(loss)
    run.average.swap(run.parameters)
    return model.eval()


def _batch(
    store: PictureStore, update: int, updates: int
) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n c hl wl"]]:
    """Take one update's pictures, and the noise for their latents."""
    rng, torch_rng = seeded("autoencoder", update)
    whole = update >= updates * (1 - _WHOLE_PICTURE_SHARE)
    n = _WHOLE_PICTURE_BATCH if whole else _BATCH
    pixels = store.pixels(np.sort(rng.integers(0, len(store), n)))
    size = PICTURE_PX if whole else _CROP_PX
    tops, lefts = rng.integers(0, PICTURE_PX - size + 1, (2, n))
    cuts = [
        p[:, t : t + size, left : left + size]
        for p, t, left in zip(pixels, tops, lefts, strict=True)
    ]
    pictures = to_signed(torch.stack(cuts))
    if rng.random() < 0.5:
        pictures = pictures.flip(-1)
    noise = torch.randn((n, LATENT_CHANNELS, size // 8, size // 8), generator=torch_rng)
    return pictures, noise
