"""Frozen attention: what a prompt becomes is computed once, not at each step of drawing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dreamloom.models.attention import can_be_fused, mix_heads
from dreamloom.models.lowrank import InputCache
from dreamloom.models.packed_linear import Order, PackedLinear, has_hooks, replace_forward


class FrozenAttention:
    """The forward pass of one attention whose weights stay as they are for a while.

    Projections of one input are one matrix product. Keys and values of a prompt are those of the
    step before. Masks, and hooks on a projection, are left to diffusers' own forward pass.

    Args:
        attention: The layer; see `freeze_attentions`.
        order: How its weights lie beside themselves.
    """

    def __init__(self, attention: Any, order: Order) -> None:
        self._attention = attention
        self._layers = (attention.to_q, attention.to_k, attention.to_v)
        is_cross = attention.is_cross_attention
        self._query = _join(self._layers[:1], order) if is_cross else None
        self._joint = _join(self._layers[1:] if is_cross else self._layers, order)
        self._cache = InputCache()

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Compute the attention's output."""
        attention, query = self._attention, self._query
        if (
            attention_mask is not None
            or (encoder_hidden_states is None) != (query is None)
            or hidden_states.dtype != attention.to_q.weight.dtype
            or has_hooks(*self._layers)
        ):
            theirs: Tensor = type(attention).forward(
                attention, hidden_states, encoder_hidden_states, attention_mask, **others
            )
            return theirs
        if query is None:
            parts = self._joint.apply_to_last(hidden_states).chunk(3, -1)
        else:
            assert encoder_hidden_states is not None
            known = self._cache.find(encoder_hidden_states, self._joint.apply_to_last)
            if known is None:
                known = self._joint.apply_to_last(encoder_hidden_states)
            parts = (query.apply_to_last(hidden_states), *known.chunk(2, -1))
        out: Tensor = attention.to_out[0](mix_heads(parts, attention.heads))
        return out


def _join(layers: tuple[nn.Linear, ...], order: Order) -> PackedLinear:
    """Make one map of layers of one input."""
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([one.bias for one in layers])
    return PackedLinear(torch.cat([one.weight for one in layers]), bias, order)


def freeze_attentions(modules: Iterable[nn.Module], order: Order) -> list[nn.Module]:
    """Let attentions that learn nothing compute so, until `restore_forward`; return them."""
    fitting = (one for one in modules if isinstance(one, Attention) and _can_be_frozen(one))
    return replace_forward(fitting, lambda one: FrozenAttention(one, order))


def _can_be_frozen(attention: Any) -> bool:
    layers = (attention.to_q, attention.to_k, attention.to_v)
    return (
        can_be_fused(attention)
        and "forward" not in vars(attention)
        and attention.to_out[1].p == 0
        and all(type(one) is nn.Linear and "forward" not in vars(one) for one in layers)
        and len({one.bias is None for one in layers}) == 1
        and not any(weight.requires_grad for one in layers for weight in one.parameters())
    )
