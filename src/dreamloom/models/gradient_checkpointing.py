"""Gradient checkpointing: recompute activations in the backward pass, level by level of a U-Net.

A level is what a U-Net computes at one size: SDXL at 1024 px has 128 × 128, 64 × 64 and 32 × 32
latents. The lowest level has most of the layers, and the high ones have the largest activations,
so either can be worth recomputing alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dreamloom.models.base import Checkpointing

_SWITCH = "gradient_checkpointing"


def set_gradient_checkpointing(
    unet: nn.Module, levels: Checkpointing, recompute: Callable[..., Any] | None = None
) -> None:
    """Recompute these levels of a U-Net from now on, and no others.

    What is computed does not change, nor do gradients: the same operations run once more on the
    same inputs.

    Args:
        unet: A U-Net of diffusers, with blocks down, in the middle and up.
        levels: Which levels.
        recompute: Calls a part with its inputs, and again in the backward pass; None is torch's
            own way.
    """
    network: Any = unet
    if levels == "none":
        network.disable_gradient_checkpointing()
        network.eval()
        return
    network.enable_gradient_checkpointing(recompute)
    # Some versions of diffusers recompute in training mode only; SDXL has no dropout to mind.
    network.train()
    if levels == "full":
        return
    chosen = set(_lowest_level(network) if levels == "low" else _high_levels(network))
    blocks = {*_lowest_level(network), *_high_levels(network)}
    for block in blocks - chosen:
        parts: list[Any] = [part for part in block.modules() if hasattr(part, _SWITCH)]
        for part in parts:
            part.gradient_checkpointing = False


def _lowest_level(unet: Any) -> list[nn.Module]:
    middle = [] if unet.mid_block is None else [unet.mid_block]
    return [unet.down_blocks[-1], *middle, unet.up_blocks[0]]


def _high_levels(unet: Any) -> list[nn.Module]:
    return [*unet.down_blocks[:-1], *unet.up_blocks[1:]]
