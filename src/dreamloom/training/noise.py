"""Training noise: which noise each image meets, and at which timestep.

Every draw has its own generator, seeded from the run's seed, the purpose, the update and the
image's number among the photos, or among the class images, of the whole update. So a photo meets
the same noise with and without class images, in batches of any size, in any grouping and on any
number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from dreamloom.core.device import seed_for

TimestepKind = Literal["uniform", "logit_normal", "mode", "cubic"]
"""How timesteps are drawn; see `draw_timesteps`."""

# One of the scales in table 1 of the paper: SD3 (arXiv:2403.03206).
_MODE_SCALE = 1.29


@dataclass(frozen=True)
class Rng:
    """The random numbers of the images of one update.

    Args:
        seed: The run's seed.
        update: Which update, from 0.
        is_prior: True for class images, False for photos.
        numbers: Each image's number among all photos, or among all class images, of the update.
    """

    seed: int
    update: int
    is_prior: Bool[Tensor, " images"]
    numbers: Int[Tensor, " images"]

    def seeds(self, purpose: str) -> list[int]:
        """Make one seed for each image."""
        pairs = zip(self.is_prior.tolist(), self.numbers.tolist(), strict=True)
        return [
            seed_for(self.seed, f"{purpose} of class" if prior else purpose, self.update, number)
            for prior, number in pairs
        ]

    def generators(self, purpose: str) -> list[Generator]:
        """Make one CPU generator for each image."""
        return [Generator("cpu").manual_seed(seed) for seed in self.seeds(purpose)]


def draw_normal(rng: Rng, purpose: str, shape: tuple[int, ...]) -> Float[Tensor, "images ..."]:
    """Draw standard normal numbers of one shape for each image, in float32 on the CPU."""
    drawn = [torch.randn(shape, generator=one) for one in rng.generators(purpose)]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


def draw_noise(
    rng: Rng, shape: tuple[int, int, int], offset: float = 0.0
) -> Float[Tensor, "images channels height width"]:
    """Draw the noise that the images are mixed with and the model learns to tell.

    Args:
        rng: Whose noise.
        shape: Channels, height and width of the latents.
        offset: Deviation of a constant for each image and channel that is added to the noise, so
            that the model also learns to change an image's overall light and colour; 0 for none,
            0.05 to 0.1 is usual. It changes nothing else that is drawn.

    Source:
        Guttenberg, Diffusion with Offset Noise (crosslabs.org, 2023).
    """
    noise = draw_normal(rng, "noise", shape)
    if offset:
        noise = noise + offset * draw_normal(rng, "noise offset", (shape[0], 1, 1))
    return noise


def add_multires_noise(
    noise: Float[Tensor, "images channels height width"],
    rng: Rng,
    iterations: int,
    discount: float,
) -> Float[Tensor, "images channels height width"]:
    """Add coarser and coarser noise, so that large forms are moved as much as small ones (pyramid).

    With U scaling up to the full size, bilinearly, and the k-th ξ standard normal at sides of
    ⌊side / rₖᵏ⌋, or 1, each rₖ drawn evenly from 2 to 4, an image's noise becomes

        ε' = (ε + Σₖ discountᵏ U(ξₖ)) / s,  k = 0 … iterations − 1,

    where s is the deviation of the numerator over the image, so that the variance stays 1. The
    coarsest level is the first with a side of 1: no later one is drawn.

    Args:
        noise: What `draw_noise` gave, of two numbers or more an image.
        rng: The same images.
        iterations: Levels, 0 or more; 0 changes nothing, and 1 adds noise of the same fineness,
            which leaves white noise. 6 to 10 are usual.
        discount: Share of each level in the one before, 0 to 1; 0.1 to 0.3 is usual for LoRAs.

    Raises:
        ValueError: If ``iterations`` is negative or ``discount`` out of range.

    Source:
        Whitaker, Multi-Resolution Noise for Diffusion Model Training (wandb.ai, 2023), with the
        levels as in kohya's sd-scripts, whose sides are shares of the full one. There all images
        of a batch have the same rₖ and the same s; here each has its own, so that nothing depends
        on the batch.
    """
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, got {iterations}")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be 0 to 1, got {discount}")
    if not iterations or not len(noise):
        return noise
    channels, height, width = noise.shape[1:]
    rows = []
    for row, one in zip(noise, rng.generators("multires noise"), strict=True):
        summed = row.float()
        for level in range(iterations):
            shrink = (2 + 2 * torch.rand((), generator=one, dtype=torch.float64).item()) ** level
            sides = max(1, int(height / shrink)), max(1, int(width / shrink))
            coarse = torch.randn(1, channels, *sides, generator=one).to(row.device)
            scaled = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
            summed = summed + discount**level * scaled[0]
            if min(sides) == 1:
                break
        rows.append(summed / summed.std())
    return torch.stack(rows).to(noise.dtype)


def perturb_noise(
    noise: Float[Tensor, "images channels height width"], rng: Rng, strength: float
) -> Float[Tensor, "images channels height width"]:
    """Make the noise that the model's input is mixed with; the target keeps the first one.

    Sampling meets inputs that are a little off, because each step starts from the last one's
    guess; so does training then.

    Args:
        noise: What `draw_noise` gave.
        rng: The same images.
        strength: Deviation of what is added, 0 or more; the paper takes 0.1.

    Returns:
        ε + strength ξ, on the device and in the precision of ``noise``.

    Raises:
        ValueError: If ``strength`` is negative.

    Source:
        Ning et al. (arXiv:2301.11706), algorithm 1.
    """
    if strength < 0:
        raise ValueError(f"strength must be 0 or more, got {strength}")
    if not strength:
        return noise
    shape = (noise.shape[1], noise.shape[2], noise.shape[3])
    extra = draw_normal(rng, "input perturbation", shape)
    return noise + strength * extra.to(noise.device, noise.dtype)


def draw_timesteps(
    rng: Rng,
    train_timesteps: int,
    kind: TimestepKind = "uniform",
    *,
    span: tuple[float, float] = (0.0, 1.0),
    mean: float = 0.0,
    deviation: float = 1.0,
) -> Int[Tensor, " images"]:
    """Draw a timestep for each image.

    With u uniform and z standard normal, the share of the way from clean (0) to noise (1) is

    - ``uniform``: u,
    - ``logit_normal``: 1 / (1 + exp(−(mean + deviation z))), most often in the middle,
    - ``mode``: 1 − u − s (cos²(π u / 2) − 1 + u) with s = 1.29, also in the middle, but with all
      of the ends left in,
    - ``cubic``: 1 − u³, most often near noise, where a picture's layout is made.

    Args:
        rng: Whose timesteps.
        train_timesteps: How many timesteps the base model has.
        kind: The distribution.
        span: First share and the share to stop before: the distribution is squeezed into
            [low, high). (0, 1) is all timesteps.
        mean: For ``logit_normal``; above 0 leans to noise, below to clean images.
        deviation: For ``logit_normal``, above 0.

    Raises:
        ValueError: If the span is not within [0, 1] or holds no timestep, or the deviation is
            not above 0.

    Source:
        SD3, Esser et al. (arXiv:2403.03206), Eqs. 19 and 20; ``cubic``: T2I-Adapter, Mou et al.
        (arXiv:2302.08453), section 3.4.
    """
    low, high = (round(train_timesteps * share) for share in span)
    if not (0 <= span[0] < span[1] <= 1 and low < high):
        raise ValueError(
            f"span must hold at least one of {train_timesteps} timesteps between 0 and 1, "
            f"got {span[0]} to {span[1]}"
        )
    if deviation <= 0:
        raise ValueError(f"deviation must be above 0, got {deviation}")
    generators = rng.generators("timestep")
    if kind == "uniform":
        drawn = [int(torch.randint(low, high, (1,), generator=one)) for one in generators]
    else:
        share = _share_drawer(kind, mean, deviation)
        last = high - low - 1
        drawn = [low + min(int(share(one) * (high - low)), last) for one in generators]
    return torch.tensor(drawn, dtype=torch.long)


def _share_drawer(
    kind: TimestepKind, mean: float, deviation: float
) -> Callable[[Generator], float]:
    """Make the function from a generator to a share in [0, 1]."""

    def logit_normal(rng: Generator) -> float:
        z = torch.randn((), generator=rng, dtype=torch.float64)
        return torch.sigmoid(mean + deviation * z).item()

    def mode(rng: Generator) -> float:
        u = torch.rand((), generator=rng, dtype=torch.float64).item()
        return 1 - u - _MODE_SCALE * (math.cos(math.pi * u / 2) ** 2 - 1 + u)

    def cubic(rng: Generator) -> float:
        return 1 - torch.rand((), generator=rng, dtype=torch.float64).item() ** 3

    return {"logit_normal": logit_normal, "mode": mode, "cubic": cubic}[kind]
