"""Channels-last convolutions, ordered linear weights: a denoiser's fastest layout to draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import Transformer2DModel
from torch import Tensor, nn

from dreamloom.models.convolutions import pack_convolutions
from dreamloom.models.feedforward import freeze_linears
from dreamloom.models.frozen_attention import freeze_attentions
from dreamloom.models.packed_linear import pick_order, restore_forward

_OUTPUT = "_get_output_for_continuous_inputs"
"""diffusers' method that turns a transformer's tokens into a picture again."""


class _ChannelsLastOutput:
    """That method, without the copy that brings the channels to the front.

    What follows would bring them back to the end, layer by layer.
    """

    def __init__(self, transformer: Transformer2DModel) -> None:
        self._transformer = transformer

    def __call__(
        self, hidden_states: Tensor, residual: Tensor, height: int, width: int, **others: Any
    ) -> Tensor:
        """Compute the transformer's output."""
        del others
        projected: Tensor = self._transformer.proj_out(hidden_states)
        picture: Tensor = projected.unflatten(1, (height, width)).permute(0, 3, 1, 2) + residual
        return picture


@contextmanager
def fastest_layout(denoiser: nn.Module, decoder: nn.Module | None = None) -> Iterator[None]:
    """Lay out what draws for the time of a block in which nothing is trained.

    On a CPU its convolutions read weights whose channels lie last or that are packed, its linear
    layers those of `packed_linear`, and what a prompt becomes is computed once for all steps. The
    values stay as they are. Nothing is done elsewhere and in half precision; in large models only
    what needs no copies, which would cost more than they bring.

    Args:
        denoiser: Its layers may have adapters; those that compute in a way of their own are left.
        decoder: Its convolutions are laid out if the denoiser's are.
    """
    order = pick_order(denoiser)
    if order == "plain":
        yield
        return
    makes_copies = order != "onednn"
    attentions: list[Any] = []
    if makes_copies:
        attentions = freeze_attentions(denoiser.modules(), order)
    held = {layer for one in attentions for layer in (one.to_q, one.to_k, one.to_v)}
    frozen = [
        layer
        for layer in denoiser.modules()
        if type(layer) is nn.Linear
        and layer not in held
        and "forward" not in vars(layer)
        and not layer.weight.requires_grad
    ]
    linears = freeze_linears(denoiser, frozen, order)
    # What is being trained is left: DoRA looks at its factors as rows of their memory.
    convolutions = [
        layer
        for part in (denoiser, decoder)
        if makes_copies and part is not None
        for layer in part.modules()
        if type(layer) is nn.Conv2d and not layer.weight.requires_grad
    ]
    packed = pack_convolutions(convolutions)
    transformers = [
        one
        for one in denoiser.modules()
        if makes_copies and isinstance(one, Transformer2DModel) and one.use_linear_projection
    ]
    own = [layer.weight.data for layer in convolutions]
    try:
        for layer in convolutions:
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        for transformer in transformers:
            vars(transformer)[_OUTPUT] = _ChannelsLastOutput(transformer)
        yield
    finally:
        for transformer in transformers:
            vars(transformer).pop(_OUTPUT, None)
        # The same tensors: a copy may differ in its strides, by which kernels are chosen, and what
        # is trained after a drawing would round otherwise than what is trained without.
        for layer, weight in zip(convolutions, own, strict=True):
            layer.weight.data = weight
        restore_forward([*attentions, *linears, *packed])
