"""Channels-last convolutions, ordered linear weights: a denoiser's fastest layout to draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dreamloom.models.packed_linear import order_layers, pick_order, restore_forward


@contextmanager
def fastest_layout(denoiser: nn.Module) -> Iterator[None]:
    """Lay out a denoiser's weights for the time of a block in which nothing is trained.

    On a CPU its convolutions read weights whose channels lie last, and its linear layers those of
    `frozen`. The values stay as they are. Elsewhere, in half precision, and in large models nothing
    is done: there the copies would cost more than they bring.

    Args:
        denoiser: Its layers may have adapters; those that compute in a way of their own are left.
    """
    order = pick_order(denoiser)
    if order == "plain":
        yield
        return
    plain = (layer for layer in denoiser.modules() if type(layer) is nn.Linear)
    ordered = order_layers(
        (one for one in plain if "forward" not in vars(one) and not one.weight.requires_grad), order
    )
    # What is being trained is left: DoRA looks at its factors as rows of their memory.
    convolutions = [
        layer
        for layer in denoiser.modules()
        if type(layer) is nn.Conv2d and not layer.weight.requires_grad
    ]
    try:
        for layer in convolutions:
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for layer in convolutions:
            layer.weight.data = layer.weight.data.contiguous()
        restore_forward(ordered)
