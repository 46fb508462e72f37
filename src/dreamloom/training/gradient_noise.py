"""Gradient noise: how much of an update's gradient is signal, and which batch would suit it.

The gradient of a batch is the true gradient G plus noise that shrinks with the batch: E|g_B|² =
|G|² + S / B, S the noise of one example. Two sizes of batch tell both.

Source:
    McCandlish et al., An Empirical Model of Large-Batch Training (arXiv:1812.06162), appendix A.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Of the estimates of single updates: their numerator and denominator are averaged, not the ratio.
_DECAY = 0.95
# Of the running mean of successive gradients: as long as 19 equal weights.
_MEAN_DECAY = 0.9


@dataclass(frozen=True)
class NoiseEstimate:
    """What is known of a gradient; both may come out negative where there is next to none.

    Args:
        signal: |G|².
        noise: S, the noise of one batch: the trace of its gradient's covariance.
    """

    signal: float
    noise: float

    @property
    def noise_scale(self) -> float | None:
        """The simple noise scale S / |G|², in batches; None where no signal can be told.

        Updates of far fewer batches are mostly noise; of far more, mostly wasted.
        """
        return max(self.noise, 0.0) / self.signal if self.signal > 0 else None

    def signal_to_noise(self, batches: float) -> float | None:
        """|G|² over the noise of a mean of so many batches; None where no noise can be told."""
        return max(self.signal, 0.0) / (self.noise / batches) if self.noise > 0 else None


def estimate_noise(
    small_square: float, large_square: float, small: float, large: float
) -> NoiseEstimate:
    """Estimate signal and noise from gradients of two batch sizes, without bias.

    |G|² = (B |g_B|² - b |g_b|²) / (B - b) and S = (|g_b|² - |g_B|²) / (1 / b - 1 / B).

    Args:
        small_square: The squared norm of the gradient of ``small`` batches, or the mean of several.
        large_square: That of ``large`` batches.
        small: Above 0.
        large: Above ``small``.

    Raises:
        ValueError: If the sizes do not differ so.

    Example:
        >>> estimate_noise(5.0, 2.0, small=1, large=4)
        NoiseEstimate(signal=1.0, noise=4.0)
    """
    if not 0 < small < large:
        raise ValueError(f"the batch sizes must be rising and above 0, not {small:g} and {large:g}")
    return NoiseEstimate(
        (large * large_square - small * small_square) / (large - small),
        (small_square - large_square) / (1 / small - 1 / large),
    )


def running_mean_size(decay: float, count: int) -> float:
    """Say how many equal weights are as long as those of a running mean.

    The weights w of a mean with this decay over ``count`` values, made to sum to 1, have
    Σw² = (1 - β) (1 + β^t) / ((1 + β) (1 - β^t)); the size is 1 / Σw².

    Example:
        >>> running_mean_size(0.9, 1), round(running_mean_size(0.9, 1000))
        (1.0, 19)
    """
    power = decay**count
    return (1 + decay) * (1 - power) / ((1 - decay) * (1 + power))


class RunningMean:
    """The mean of numbers so far, of which later ones count more; without a bias to 0."""

    def __init__(self, decay: float) -> None:
        self._decay, self._sum, self.count = decay, 0.0, 0

    def add(self, value: float) -> float:
        """Take one more; give the mean."""
        self.count += 1
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        return self._sum / (1 - self._decay**self.count)


class Gradients(Protocol):
    """What is trained, with the gradients that it has gathered; see `TrainableAdapter`."""

    @property
    def loss_scale(self) -> float:
        """By what the gradients are multiplied."""
        ...

    def gradients(self) -> list[Tensor]:
        """The gradients gathered so far."""
        ...


class GradientNoise:
    """Estimates the noise of a training's gradients from what each update computes anyway.

    Where an update adds up several batches, the batches and their mean are the two sizes. Where it
    has one, the mean of the last updates' gradients stands in for the larger size; as the weights
    move meanwhile, what changes of the true gradient is taken for noise, so that the noise scale
    is rather too large. Gradients are read, never changed.

    Args:
        batches: Batches of an update, over all processes.
        wanted: Whether to do anything at all.
    """

    def __init__(self, batches: int, wanted: bool = True) -> None:
        self.batches, self.wanted = batches, wanted
        self.latest: NoiseEstimate | None = None
        self._signal, self._noise = RunningMean(_DECAY), RunningMean(_DECAY)
        self._squares = RunningMean(_MEAN_DECAY)
        self._before: list[Tensor] = []
        self._mean: list[Tensor] = []
        self._count = 0
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add_batch(self, trained: Gradients, more: bool) -> None:
        """Take note of a batch's share of the gradient, once it was added to those before it.

        Args:
            trained: What has been added up so far.
            more: Whether another batch will be added.
        """
        if self.batches == 1 or not self.wanted:
            return
        gradients, scale = trained.gradients(), trained.loss_scale
        own = list(torch._foreach_sub(gradients, self._before)) if self._before else gradients
        square = _square(own) / scale**2
        self._sum = square if self._sum is None else self._sum + square
        self._before = [one.clone() for one in gradients] if more else []

    @property
    def sums(self) -> list[Tensor]:
        """What must be added up over all processes, in place."""
        return [] if self._sum is None else [self._sum]

    @torch.no_grad()
    def finish_update(self, trained: Gradients) -> Tensor | None:
        """Give the one number that the host needs beside the gradient's norm, on the device.

        Args:
            trained: Has the gradients of the whole update, before they are clipped.
        """
        if not self.wanted:
            return None
        if self._sum is not None:
            # Each batch's loss is its share of the update's, so its own gradient is larger.
            square, self._sum = self._sum * self.batches, None
            return square
        gradients, scale = trained.gradients(), trained.loss_scale
        if scale != 1:
            gradients = list(torch._foreach_div(gradients, scale))
            # An overflow, which in fp16 is no fault, would never leave the mean again.
            if not bool(torch.isfinite(_square(gradients))):
                return torch.full((), math.nan)
        if not self._mean:
            self._mean = [torch.zeros_like(one) for one in gradients]
        torch._foreach_lerp_(self._mean, gradients, 1 - _MEAN_DECAY)
        self._count += 1
        return _square(self._mean) / (1 - _MEAN_DECAY**self._count) ** 2

    def read(self, norm: float, square: float | None) -> NoiseEstimate | None:
        """Join an update to the estimate; give that, or None as long as there is none.

        Args:
            norm: The norm of the update's gradient.
            square: What `finish_update` gave.
        """
        if square is None:
            return None
        if not (math.isfinite(norm) and math.isfinite(square)):
            return self.latest
        if self.batches > 1:
            # The mean over batches of each one's squared norm.
            found = estimate_noise(square, norm**2, 1, self.batches)
        else:
            squares = self._squares.add(norm**2)
            size = running_mean_size(_MEAN_DECAY, self._squares.count)
            if self._squares.count == 1:
                return None
            found = estimate_noise(squares, square, 1, size)
        self.latest = NoiseEstimate(self._signal.add(found.signal), self._noise.add(found.noise))
        return self.latest


def _square(tensors: list[Tensor]) -> Tensor:
    """Give the squared norm of several tensors taken together."""
    return torch.stack(list(torch._foreach_norm(tensors))).square().sum()
