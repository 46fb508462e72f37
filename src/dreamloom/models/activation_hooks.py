"""Activation hooks: see what a model's layers are given, or add to their outputs, for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, unfold

Hook: TypeAlias = Callable[[str, nn.Module, Tensor], None]
"""Called with a layer's name, the layer and its input, before the layer answers."""

AddedChange: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""What is added to a layer's output, from the layer and its input."""


@contextmanager
def hook_activations(layers: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Call ``hook`` with every input of some layers, in the order in which they are asked."""

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, inputs: hook(name, layer, inputs[0])

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(make_hook(name)).remove)
        yield


@contextmanager
def add_changes(
    layers: Mapping[str, nn.Module], changes: Mapping[str, AddedChange]
) -> Iterator[None]:
    """Add a change to the output of each layer that has one; gradients flow through it."""

    def make_hook(change: AddedChange) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        return lambda layer, inputs, output: output + change(layer, inputs[0])

    with ExitStack() as stack:
        for name, change in changes.items():
            stack.callback(layers[name].register_forward_hook(make_hook(change)).remove)
        yield


def apply_as(layer: nn.Module, rows: Tensor, weight: Tensor) -> Tensor:
    """Apply another weight, of the layer's own kind, the way the layer applies its own."""
    if not isinstance(layer, nn.Conv2d):
        return linear(rows, weight)
    return conv2d(
        rows,
        weight,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


def go_down(layer: nn.Module, rows: Tensor, down: Float[Tensor, "rank inputs"]) -> Tensor:
    """Apply a flattened factor the way the layer applies its own weight.

    Returns:
        (…, rank) for a linear layer, (images, rank, height, width) for a convolution.
    """
    if isinstance(layer, nn.Conv2d):
        down = down.view(down.shape[0], -1, *layer.kernel_size)
    return apply_as(layer, rows, down)


def go_up(layer: nn.Module, narrow: Tensor, up: Float[Tensor, "outputs rank"]) -> Tensor:
    """Apply the other factor to what `go_down` made."""
    if isinstance(layer, nn.Conv2d):
        return conv2d(narrow, up[:, :, None, None])
    return linear(narrow, up)


def list_places(layer: nn.Module, maps: Tensor) -> Float[Tensor, "places features"]:
    """List what stands at each place of a layer's output: a token, or a pixel of a convolution."""
    if isinstance(layer, nn.Conv2d):
        return maps.movedim(1, -1).flatten(0, -2)
    return maps.flatten(0, -2)


def list_inputs(layer: nn.Module, rows: Tensor) -> Float[Tensor, "places inputs"]:
    """List what the layer's flattened weight is multiplied with at each place of its output."""
    if not isinstance(layer, nn.Conv2d):
        return rows.flatten(0, -2)
    if isinstance(layer.padding, str):
        raise ValueError(f"the padding {layer.padding!r} of a convolution is not a number")
    patches = unfold(
        rows,
        layer.kernel_size,
        dilation=layer.dilation,
        padding=layer.padding,
        stride=layer.stride,
    )
    return patches.movedim(1, -1).flatten(0, 1)


def gram_of(rows: Float[Tensor, "places features"]) -> Float[Tensor, "features features"]:
    """Sum the outer products of rows with themselves, in float32 or better."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.T @ rows
