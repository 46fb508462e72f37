"""Linear layers whose weights stay as they are, in the form that the processor multiplies fastest.

On a CPU a matrix product spends part of its time bringing the weight into the order that its
kernel reads. A frozen weight can be brought into that order once, for the forward pass and, turned
round, for the backward pass. oneDNN does so; the ops are those that torch's compiler uses for
frozen models. The copies cost twice the weights' memory, so large models do without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

MOST_PACKED_BYTES = 2**30
"""Components with larger linear weights than this keep the one copy that they have."""


class FrozenMap:
    """x Wᵀ + b and its way back, for weights that do not change.

    Args:
        weight: Never trained.
        bias: The same, or None.
        packed: Whether to keep copies of the weight in the kernels' own order.
    """

    def __init__(
        self,
        weight: Float[Tensor, "outputs inputs"],
        bias: Float[Tensor, " outputs"] | None,
        packed: bool,
    ) -> None:
        self.weight, self.bias = weight, bias
        self._forth: Any = _pack(weight) if packed else None
        # Made when it is first needed: whoever only draws never goes back.
        self._back: Any = None

    def apply(self, rows: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """Compute the outputs."""
        if self._forth is None:
            return linear(rows, self.weight, self.bias)
        return _multiply(rows, self._forth, self.bias)

    def pull_back(self, gradient: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows inputs"]:
        """Compute the inputs' gradient from that of the outputs."""
        if self._forth is None:
            return gradient @ self.weight
        if self._back is None:
            self._back = _pack(self.weight.t().contiguous())
        return _multiply(gradient, self._back, None)


def _pack(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _multiply(rows: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return result


def pays_to_pack(owner: nn.Module) -> bool:
    """Say whether packed copies make a component faster and are small enough."""
    weights = [layer.weight for layer in owner.modules() if type(layer) is nn.Linear]
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and all(one.device.type == "cpu" and one.dtype == torch.float32 for one in weights)
        and sum(one.numel() * one.element_size() for one in weights) <= MOST_PACKED_BYTES
    )


class _Frozen(torch.autograd.Function):
    """`FrozenMap` as a node of autograd that keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: FrozenMap) -> Tensor:
        ctx.own = own
        return own.apply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        return ctx.own.pull_back(rows).view(*gradient.shape[:-1], -1), None


class PackedForward:
    """The forward pass of a frozen linear layer with packed weights.

    Args:
        layer: The layer; its own weights stay as they are.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._map = FrozenMap(layer.weight, layer.bias, packed=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer's output."""
        if torch.compiler.is_compiling() or x.dtype != self._layer.weight.dtype:
            return linear(x, self._layer.weight, self._layer.bias)
        result: Tensor = _Frozen.apply(x, self._map)  # type: ignore[no-untyped-call]
        return result


def pack_layers(layers: Iterable[nn.Linear]) -> list[nn.Linear]:
    """Let frozen layers compute with packed weights, until `unpack_layers`; return them."""
    packed = list(layers)
    for layer in packed:
        vars(layer)["forward"] = PackedForward(layer)
    return packed


def unpack_layers(layers: Iterable[nn.Linear]) -> None:
    """Give layers their own forward pass back."""
    for layer in layers:
        vars(layer).pop("forward", None)
