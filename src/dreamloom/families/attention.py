"""A diffusers attention whose projections are in their lean form, without what it does not use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dreamloom.families.lowrank import LowRankMap


class LeanAttention:
    """The forward pass of one attention.

    diffusers reads the signature of its processor at each call, divides by a factor of 1 and asks
    for masks and norms that SDXL does not have. A mask, a compiler or an adapter that is switched
    off are left to diffusers' own forward pass.

    Args:
        attention: The layer; see `can_be_lean`.
        joint: Query, key and value of one input; or key and value where the prompt is their input.
        query: The query's own map where it reads another input than the others.
    """

    def __init__(self, attention: Any, joint: LowRankMap, query: LowRankMap | None) -> None:
        self._attention = attention
        self._joint, self._query = joint, query
        self._switch = joint.group[0].layer
        self._is_dropping = attention.to_out[1].p > 0

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
            or self._switch.disable_adapters
            or torch.compiler.is_compiling()
        ):
            result: Tensor = type(attention).forward(
                attention, hidden_states, encoder_hidden_states, attention_mask, **others
            )
            return result
        if query is None:
            parts = self._joint(hidden_states)
        elif encoder_hidden_states is None:
            raise AssertionError("told apart above")
        else:
            parts = (*query(hidden_states), *self._joint(encoder_hidden_states))
        out: Tensor = attention.to_out[0](mix_heads(parts, attention.heads))
        return attention.to_out[1](out) if self._is_dropping else out


def mix_heads(
    parts: Sequence[Float[Tensor, "images _ features"]], heads: int
) -> Float[Tensor, "images positions features"]:
    """Attend with query, key and value, head by head."""
    q, k, v = (one.view(len(one), one.shape[1], heads, -1).transpose(1, 2) for one in parts)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def can_be_lean(attention: nn.Module) -> bool:
    """Say whether an attention does no more than `LeanAttention` does."""
    if not isinstance(attention, Attention) or type(attention.processor) is not AttnProcessor2_0:
        return False
    norms = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
    return (
        not any(getattr(attention, name, None) for name in norms)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and len(attention.to_out) == 2
    )
