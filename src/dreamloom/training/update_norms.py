"""Norms of an adapter's updates, exact and never multiplied out: how large one may be, and a price.

An update s B A has as many numbers as the layer's weight, and its norm is told by two matrices of
the rank's size: ‖s B A‖² = s² ⟨BᵀB, A Aᵀ⟩.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.models.base import WeightGroup
from dreamloom.training.optimizers import AVERAGING_OPTIMIZERS


@dataclass(frozen=True)
class FactorPair:
    """The factors of one layer's update, ``scale`` · up · down; a convolution's as they are."""

    down: Parameter
    up: Parameter
    scale: float

    def squared_norm(self) -> Float[Tensor, ""]:
        """Compute the update's squared Frobenius norm, with gradients.

        A convolution's weight and update are the same matrices, each kernel in a row.
        """
        up, down = self.up.flatten(1), self.down.flatten(1)
        return self.scale**2 * torch.sum((up.T @ up) * (down @ down.T))


def pair_factors(groups: Sequence[WeightGroup]) -> list[FactorPair]:
    """Put the factors of each layer together; see `WeightGroup`."""
    by_role = {group.role: group for group in groups}
    pairs = []
    for role, group in by_role.items():
        if group.scales:
            downs = by_role["text down" if role == "text up" else "down"].parameters
            factors = zip(downs, group.parameters, group.scales, strict=True)
            pairs += [FactorPair(down, up, scale) for down, up, scale in factors]
    return pairs


def sum_squared_norms(pairs: Sequence[FactorPair]) -> Float[Tensor, ""]:
    """Sum the squared Frobenius norms of all updates, with gradients.

    Source:
        Preserve and Personalize (arXiv:2505.19519), where bounding how far a model's output can
        move amounts to weight decay of the update. We differ: theirs is of fully fine-tuned
        weights; here it is the product that is small, not its two factors.
    """
    return torch.stack([pair.squared_norm() for pair in pairs]).sum()


@torch.no_grad()
def limit_norms(pairs: Sequence[FactorPair], limit: float) -> None:
    """Scale back the updates whose Frobenius norm exceeds a limit; leave the others, bit for bit.

    Both factors take the root of the ratio, so that neither of them wanes. Nothing waits for the
    device.

    Args:
        pairs: The updates; their factors change in place.
        limit: The largest norm, above 0.

    Source:
        scale_weight_norms of kohya-ss/sd-scripts, after max-norm regularization (Srivastava et
        al., 2014). We differ: the norm comes from the factors, in float32, not from their product.
    """
    if not pairs:
        return
    # Rounding may leave the square of nothing just below 0.
    norms = torch.stack([pair.squared_norm() for pair in pairs]).clamp(min=0).sqrt()
    factors = (limit / norms).clamp(max=1).sqrt().unbind()
    for of_pairs in ([pair.down.data for pair in pairs], [pair.up.data for pair in pairs]):
        torch._foreach_mul_(of_pairs, factors)


@contextmanager
def scaled_updates(pairs: Sequence[FactorPair], factor: float) -> Iterator[None]:
    """Multiply the updates by a factor for a block; after it they are what they were, bit for bit.

    A training reaches its loss at weight 1 and without guidance. Guidance multiplies the change of
    what is predicted for a prompt, and not of what is predicted for none: where the latter is kept,
    an adapter at weight 1 shows its subject that much too strongly, and overrules other words.
    """
    if factor == 1:
        yield
        return
    ups = [pair.up.data for pair in pairs]
    before = [up.clone() for up in ups]
    torch._foreach_mul_(ups, factor)
    try:
        yield
    finally:
        torch._foreach_copy_(ups, before)


def refuse_unfit_norms(config: LoomConfig) -> None:
    """Refuse a limit, a price or a scale of updates that the factors do not tell.

    Raises:
        ConfigError: If the adapter is no LoRA, begins with a part of the base, or its optimizer
            averages weights that would be limited.
    """
    settings, adapter = config.train, config.adapter
    if settings.final_scale not in ("auto", 1) and (adapter.kind != "lora" or adapter.splits_base):
        begins = f" that begins with {adapter.init_lora_weights}" if adapter.kind == "lora" else ""
        raise ConfigError(
            f"train.final_scale = {settings.final_scale} scales a LoRA's factors, and a "
            f"{adapter.kind}{begins} has none that are its update.",
            "Set train.final_scale=1, and the adapter's weight where it is drawn with.",
        )
    asked = {
        f"train.scale_weight_norms = {settings.scale_weight_norms}": settings.scale_weight_norms,
        f"train.update_penalty = {settings.update_penalty:g}": settings.update_penalty,
    }
    named = " and ".join(text for text, value in asked.items() if value)
    if not named:
        return
    if adapter.kind != "lora":
        raise ConfigError(
            f"{named} needs the norm of a LoRA's updates, which a {adapter.kind} does not tell.",
            "Set adapter.kind=lora, or leave it out.",
        )
    if adapter.splits_base:
        raise ConfigError(
            f"{named} needs factors that are the update, and adapter.init_lora_weights = "
            f"{adapter.init_lora_weights} begins with a part of the base's weights in them.",
            "Set adapter.init_lora_weights=default, or leave it out.",
        )
    if settings.scale_weight_norms and settings.optimizer in AVERAGING_OPTIMIZERS:
        raise ConfigError(
            f"train.scale_weight_norms scales weights of which {settings.optimizer} keeps an "
            "average of its own, which would not be scaled.",
            "Choose another optimizer, such as adamw, or set train.scale_weight_norms to none.",
        )
