"""Fused feed-forward layers that never learn, each a single node of autograd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from dreamloom.models.packed_linear import (
    Order,
    PackedLinear,
    has_hooks,
    order_layers,
    replace_forward,
)


class FusedFeedForward:
    """The forward pass of one gated feed-forward layer with packed weights.

    A compiler, and hooks on what is inside, are left to diffusers' own forward pass.

    Args:
        layer: The layer; its own weights stay as they are.
        order: How they lie beside themselves.
    """

    def __init__(self, layer: FeedForward, order: Order) -> None:
        self._layer = layer
        self._dtype = layer.net[2].weight.dtype
        self._inner = (layer.net[0].proj, layer.net[2])
        self._maps = tuple(PackedLinear(one.weight, one.bias, order) for one in self._inner)

    def __call__(self, hidden_states: Tensor, *args: Any, **others: Any) -> Tensor:
        """Compute the layer's output."""
        if (
            torch.compiler.is_compiling()
            or hidden_states.dtype != self._dtype
            or has_hooks(*self._inner)
        ):
            theirs: Tensor = FeedForward.forward(self._layer, hidden_states, *args, **others)
            return theirs
        ours: Tensor = _Gated.apply(hidden_states, *self._maps)  # type: ignore[no-untyped-call]
        return ours


class _Gated(torch.autograd.Function):
    """y = W₂ (h ⊙ gelu(g)), where h and g are the halves of W₁ x.

    Source:
        Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202), GEGLU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, widen: PackedLinear, narrow: PackedLinear) -> Tensor:
        both: Float[Tensor, "rows twice"] = widen.apply(x.reshape(-1, x.shape[-1]))
        hidden, gate = both.chunk(2, dim=-1)
        bent = gelu(gate)
        ctx.save_for_backward(both, bent)
        ctx.widen, ctx.narrow = widen, narrow
        return narrow.apply(bent * hidden).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        both, bent = ctx.saved_tensors
        hidden, gate = both.chunk(2, dim=-1)
        inner = ctx.narrow.pull_back(gradient.reshape(-1, gradient.shape[-1]))
        into = torch.empty_like(both)
        of_hidden, of_gate = into.chunk(2, dim=-1)
        torch.mul(inner, bent, out=of_hidden)
        torch.ops.aten.gelu_backward.grad_input(inner.mul_(hidden), gate, grad_input=of_gate)
        return ctx.widen.pull_back(into).view(*gradient.shape[:-1], -1), None, None


def fuse_feed_forwards(
    owner: nn.Module, frozen: Iterable[nn.Linear], order: Order
) -> list[FeedForward]:
    """Let a component's layers that never learn be single nodes, until `restore_forward`."""
    never_learn = set(frozen)

    def can_be_one_node(layer: Any) -> bool:
        first, *rest = layer.net
        return (
            "forward" not in vars(layer)
            and type(first) is GEGLU
            and len(rest) == 2
            and rest[0].p == 0
            and {first.proj, rest[1]} <= never_learn
        )

    layers = (one for one in owner.modules() if type(one) is FeedForward)
    fused = filter(can_be_one_node, layers)
    return replace_forward(fused, lambda layer: FusedFeedForward(layer, order))


def freeze_linears(owner: nn.Module, frozen: Iterable[nn.Linear], order: Order) -> list[nn.Module]:
    """Let linear layers that never learn compute so, those of a gated feed-forward layer as one.

    Returns:
        What has another forward pass until `restore_forward`.
    """
    layers = list(frozen)
    fused = fuse_feed_forwards(owner, layers, order)
    held = {layer for one in fused for layer in (one.net[0].proj, one.net[2])}
    return [*fused, *order_layers((one for one in layers if one not in held), order)]
