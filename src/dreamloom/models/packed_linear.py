"""Packed frozen linear layers: their weights in the form that the processor multiplies fastest.

On a CPU a matrix product spends part of its time bringing the weight into the order that its
kernel reads. A frozen weight can be brought into that order once. On Intel's processors that is
its transpose, for MKL and the forward pass; on others oneDNN's own order, once for each way, by
the ops that torch's compiler uses for frozen models. The copies cost memory, so large models do
without; on others' processors oneDNN then reads the weights as they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from dreamloom.models.matrix_products import multiply_by_onednn, prefers_onednn

_Layer = TypeVar("_Layer", bound=nn.Module)

MOST_COPIED_BYTES = 2**30
"""Components with larger weights than this keep the one copy that they have."""

Order = Literal["plain", "onednn", "turned", "packed"]
"""How frozen weights lie beside themselves: not at all, whether torch multiplies them by its own
choice or oneDNN does; transposed; or packed by oneDNN."""


class PackedLinear:
    """x Wᵀ + b and its way back, for weights that do not change.

    Args:
        weight: Never trained.
        bias: The same, or None.
        order: Which copies of the weight are kept; see `pick_order`.
    """

    def __init__(
        self,
        weight: Float[Tensor, "outputs inputs"],
        bias: Float[Tensor, " outputs"] | None,
        order: Order,
    ) -> None:
        self.weight, self.bias = weight, bias
        self._is_packed = order == "packed"
        self._transposed = weight.detach().t().contiguous() if order == "turned" else None
        # The same op reads packed weights and those that lie as the layer has them.
        self._forth: Any = weight if order == "onednn" else None
        if self._is_packed:
            self._forth = _pack(weight)
        # Made when it is first needed: whoever only draws never goes back.
        self._back: Any = None

    def apply(self, rows: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """Compute the outputs."""
        if self._forth is not None:
            return multiply_by_onednn(rows, self._forth, self.bias)
        if self._transposed is None:
            return linear(rows, self.weight, self.bias)
        if self.bias is None:
            return rows @ self._transposed
        return torch.addmm(self.bias, rows, self._transposed)

    def apply_to_last(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Compute the outputs of what has more than rows."""
        return self.apply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def pull_back(self, gradient: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows inputs"]:
        """Compute the inputs' gradient from that of the outputs."""
        if self._forth is None:
            return gradient @ self.weight
        if self._is_packed and self._back is None:
            self._back = _pack(self.weight.t().contiguous())
        back = self._back if self._is_packed else self.weight.t()
        return multiply_by_onednn(gradient, back, None)


def _pack(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def pick_order(owner: nn.Module) -> Order:
    """Choose how a component's frozen weights shall lie, so that it is fastest."""
    weights = [layer.weight for layer in owner.modules() if type(layer) is nn.Linear]
    if any(one.device.type != "cpu" or one.dtype != torch.float32 for one in weights):
        return "plain"
    # All weights count, those of convolutions and those in fewer bits as well.
    held = [*owner.parameters(), *owner.buffers()]
    is_large = sum(one.numel() * one.element_size() for one in held) > MOST_COPIED_BYTES
    if prefers_onednn():
        return "onednn" if is_large else "packed"
    return "turned" if torch.backends.mkl.is_available() and not is_large else "plain"


class PackedForward(Protocol):
    """The forward pass of a layer that is linear in its input and never learns."""

    def apply(self, x: Tensor) -> Tensor:
        """Compute the outputs."""

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Compute the input's gradient from that of the outputs."""


def run_packed(x: Tensor, own: PackedForward) -> Tensor:
    """Compute a frozen layer's output as one node of autograd, which keeps no tensor."""
    result: Tensor = _Frozen.apply(x, own)  # type: ignore[no-untyped-call]
    return result


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: PackedForward) -> Tensor:
        ctx.own = own
        return own.apply(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.own.pull_back(gradient), None


class OrderedForward:
    """The forward pass of a frozen linear layer whose weights lie in another order, too.

    Args:
        layer: The layer; its own weights stay as they are.
        order: That order.
    """

    def __init__(self, layer: nn.Linear, order: Order) -> None:
        self._layer = layer
        self._map = PackedLinear(layer.weight, layer.bias, order)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer's output."""
        if torch.compiler.is_compiling() or x.dtype != self._layer.weight.dtype:
            return linear(x, self._layer.weight, self._layer.bias)
        return run_packed(x, self)

    def apply(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Compute the outputs."""
        return self._map.apply_to_last(x)

    def pull_back(self, gradient: Float[Tensor, "... outputs"]) -> Float[Tensor, "... inputs"]:
        """Compute the inputs' gradient from that of the outputs."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        return self._map.pull_back(rows).view(*gradient.shape[:-1], -1)


def replace_forward(layers: Iterable[_Layer], make: Callable[[Any], object]) -> list[_Layer]:
    """Give layers another forward pass, made from each, until `restore_forward`; return them."""
    replaced = list(layers)
    for layer in replaced:
        vars(layer)["forward"] = make(layer)
    return replaced


def order_layers(layers: Iterable[nn.Linear], order: Order) -> list[nn.Linear]:
    """Let frozen layers compute with ordered weights, until `restore_forward`; return them."""
    return replace_forward(layers, lambda layer: OrderedForward(layer, order))


def has_hooks(*layers: nn.Module) -> bool:
    """Say whether somebody looks at, or adds to, what layers are given or answer."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def restore_forward(layers: Iterable[nn.Module]) -> None:
    """Give layers their own forward pass back."""
    for layer in layers:
        vars(layer).pop("forward", None)
