"""Quantized layers: a frozen model's linear layers in 16, 8 or 4 bits, computing as before."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamloom.models.matrix_products import multiply
from dreamloom.models.quantization import Quantization, QuantizedTensor, dequantize, quantize

# They are few, small, and every picture depends on them at each step.
_LEFT_WHOLE = ("time_embedding", "add_embedding", "text_projection")


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in fewer bits and turned back for each use.

    The backward pass turns the weight back once more, so nothing of it is kept in between.

    Args:
        layer: The layer as it is; its bias stays whole.
        kind: bf16, fp8, int8 or nf4.
        device: Where to turn it, and where it then lies; None leaves it where it is.
    """

    codes: Tensor
    scales: Tensor
    superscales: Tensor
    levels: Tensor

    def __init__(
        self, layer: nn.Linear, kind: Quantization, device: torch.device | None = None
    ) -> None:
        # nn.Linear's own initialisation would make a whole weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype = kind, layer.weight.dtype
        quantized = quantize(layer.weight.detach().to(device), kind)
        for name in ("codes", "scales", "superscales", "levels"):
            self.register_buffer(name, getattr(quantized, name))
        self.bias = (
            None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), False)
        )

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:  # type: ignore[override]
        """The weight turned back, made anew each time: writing into it changes nothing."""
        return dequantize(self.quantized, self.dtype)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored."""
        shape = (self.out_features, self.in_features)
        return QuantizedTensor(
            self.kind, shape, self.codes, self.scales, self.superscales, self.levels
        )

    def forward(self, inputs: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Multiply by the stored weight and add the bias."""
        output: Tensor = _Multiply.apply(inputs, self)  # type: ignore[no-untyped-call]
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        # Codes are no numbers to be cast: only where they lie may change.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device))
        self.dtype = probe.dtype
        for name, part in self._buffers.items():
            self._buffers[name] = None if part is None else part.to(probe.device)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def extra_repr(self) -> str:
        """Say what is stored."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _Multiply(torch.autograd.Function):
    """y = x Wᵀ + b, with W turned back in both passes; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        weight = layer.weight.to(inputs.dtype)
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        return multiply(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return multiply(gradient, ctx.layer.weight.to(gradient.dtype).t()), None


def quantize_linears(
    module: nn.Module, kind: Quantization, device: torch.device | None = None
) -> int:
    """Store every linear layer of a frozen module in fewer bits, one after the other.

    Layers that are few and small and that everything depends on stay whole.

    Args:
        module: The denoiser or a text encoder.
        kind: How; ``whole`` leaves it as it is.
        device: Where to turn each layer, which is quicker on a GPU; they stay there.

    Returns:
        How many layers were stored.
    """
    if kind == "whole":
        return 0
    found = [
        (parent, name)
        for full_name, parent in module.named_modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
        and not set(f"{full_name}.{name}".split(".")).intersection(_LEFT_WHOLE)
    ]
    for parent, name in found:
        # No name is left for the layer: its whole weight goes before the next one is turned.
        setattr(parent, name, QuantizedLinear(getattr(parent, name), kind, device))
    return len(found)
