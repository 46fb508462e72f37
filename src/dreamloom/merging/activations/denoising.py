"""Denoising steps of the base model on some prompts, whose activations a merge records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamloom.core.device import generator_for
from dreamloom.models.base import Conditioning, Framing, Model

BATCH = 4
"""How many prompts are drawn at once."""


@dataclass(frozen=True)
class DenoisingStep:
    """One step of some drawings.

    Args:
        rows: Which of the prompts are drawn.
        noisy: What the model was given.
        timesteps: At which timestep.
        prediction: What it said, in float32.
    """

    rows: Int[Tensor, " images"]
    noisy: Float[Tensor, "images channels height width"]
    timesteps: Int[Tensor, " images"]
    prediction: Float[Tensor, "images channels height width"]


@torch.no_grad()
def denoise_steps(
    model: Model, conditioning: Conditioning, steps: int, seed: int
) -> Iterator[DenoisingStep]:
    """Draw every prompt in a few steps, without guidance, and tell of each.

    So the layers see what they see in the conditional half of a drawing, from pure noise to the
    last step. The first noise of a prompt depends on the seed and its place alone: adapters that
    are asked in turn meet the same noise.

    Args:
        model: As it shall be looked at: what it wears is worn.
        conditioning: The prompts, encoded.
        steps: 1 or more, spread evenly over the training's timesteps from the last one down: 999,
            749, 500, 250. 1 looks at noise only.
        seed: Of the noise.
    """
    device = model.runtime.device
    side = model.advice.resolution_px
    _, *shape = model.encode_images(torch.zeros(1, 3, side, side)).mean.shape
    for start in range(0, len(conditioning), BATCH):
        rows = torch.arange(start, min(start + BATCH, len(conditioning)))
        noise = [
            torch.randn(shape, generator=generator_for(seed, "calibration", row))
            for row in rows.tolist()
        ]
        noisy = torch.stack(noise).to(device)
        last = model.train_timesteps - 1
        times = [round(last * (1 - number / steps)) for number in range(steps)]
        for number, time in enumerate(times):
            timesteps = torch.full((len(rows),), time, device=device)
            if number == 0:
                noisy = model.add_noise(torch.zeros_like(noisy), noisy, timesteps)
            prediction = predict(model, noisy, timesteps, conditioning.take(rows))
            yield DenoisingStep(rows, noisy, timesteps, prediction)
            if number + 1 < len(times):
                after = torch.full_like(timesteps, times[number + 1])
                noisy = step_down(model, noisy, prediction, timesteps, after)


def predict(
    model: Model, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Float[Tensor, "images channels height width"]:
    """Let the model predict for whole pictures of its own size, in float32."""
    side = model.advice.resolution_px
    framings = [Framing((side, side))] * len(noisy)
    return model.predict(noisy, timesteps, conditioning, framings).float()


def step_down(
    model: Model,
    noisy: Float[Tensor, "images channels height width"],
    prediction: Float[Tensor, "images channels height width"],
    timesteps: Int[Tensor, " images"],
    after: Int[Tensor, " images"],
) -> Float[Tensor, "images channels height width"]:
    """Go from one timestep to a lower one along the model's own prediction.

    Noisy latents are α x + σ ε, and a prediction is a x + b ε, whatever the base predicts; the four
    numbers come from the model. They give the picture x and the noise ε, which are mixed again for
    the other timestep.

    Source:
        Song et al., Denoising Diffusion Implicit Models (arXiv:2010.02502), Eq. 12 without noise.
    """
    one, zero = torch.ones_like(noisy), torch.zeros_like(noisy)
    alpha, sigma = (model.add_noise(*pair, timesteps) for pair in ((one, zero), (zero, one)))
    a, b = (model.target(*pair, timesteps) for pair in ((one, zero), (zero, one)))
    both = alpha * b - sigma * a
    picture = (b * noisy - sigma * prediction) / both
    noise = (alpha * prediction - a * noisy) / both
    return model.add_noise(picture, noise, after)
