"""Packed frozen convolutions: their weights in the order that oneDNN reads.

Where pictures are small, bringing a convolution's weights into that order takes a third of its
time. What order that is depends on the pictures' shape, so that each shape has copies of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d

from dreamloom.models.packed_linear import replace_forward, run_packed

_PLACES = [[1, 1], [1, 1], [1, 1], 1]
"""Padding, stride, dilation and groups of those that can be packed."""


class PackedConvolution:
    """The forward pass of a frozen convolution that keeps the pictures' size.

    The way back is a convolution, too: with the kernel turned round, and inputs and outputs
    exchanged.

    Args:
        layer: The layer; see `can_be_packed`. Its own weights stay as they are.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer
        self._packed: dict[tuple[torch.Size, bool], Any] = {}

    def __call__(self, x: Float[Tensor, "images channels height width"]) -> Tensor:
        """Compute the layer's output."""
        layer = self.layer
        if not self.suits(x):
            return conv2d(x, layer.weight, layer.bias, 1, 1)
        return run_packed(x, self)

    def suits(self, x: Tensor) -> bool:
        """Say whether packed weights can be used for an input."""
        is_plain = type(x) is Tensor and x.dtype == torch.float32
        return is_plain and not torch.compiler.is_compiling()

    def apply(self, x: Tensor) -> Tensor:
        """Compute the outputs."""
        return _convolve(x, self.pack(x.shape), self.layer.bias)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Compute the inputs' gradient from that of the outputs."""
        return _convolve(gradient, self.pack(gradient.shape, back=True), None)

    def pack(self, shape: torch.Size, *, back: bool = False) -> Any:
        """Return the weights for inputs of a shape, or going back, for gradients of one."""
        if (shape, back) not in self._packed:
            weight = self.layer.weight.detach()
            if back:
                weight = weight.flip(2, 3).transpose(0, 1).contiguous()
            self._packed[shape, back] = torch.ops.mkldnn._reorder_convolution_weight(
                weight, *_PLACES, list(shape)
            )
        return self._packed[shape, back]


def _convolve(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, *_PLACES, "none", [], ""
    )
    return result


def pack_convolutions(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Let those of them that can be packed compute so, until `restore_forward`; return them."""
    return replace_forward((one for one in modules if can_be_packed(one)), PackedConvolution)


def can_be_packed(layer: nn.Module) -> bool:
    """Say whether a layer is a frozen convolution that `PackedConvolution` can stand in for."""
    return (
        type(layer) is nn.Conv2d
        and "forward" not in vars(layer)
        and not any(weight.requires_grad for weight in layer.parameters())
        and layer.kernel_size == (3, 3)
        and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    )
