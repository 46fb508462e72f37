"""Fused attention: its projections with their low-rank updates as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dreamloom.models.lowrank import LowRankMap


@dataclass(frozen=True)
class AttentionMaps:
    """The projections of one attention as fused maps.

    Args:
        joint: Query, key and value of one input; or key and value where the prompt is their input.
        query: The query's own map where it reads another input than the others.
        out: That of what comes out of all heads; None where it has no update.
    """

    joint: LowRankMap
    query: LowRankMap | None
    out: LowRankMap | None

    @property
    def masters(self) -> list[nn.Parameter]:
        """The factors of all projections, in the order of `_Attend`'s gradients."""
        maps = (self.query, self.joint, self.out)
        return [weight for one in maps if one is not None for weight in one.masters]

    @property
    def is_one_node(self) -> bool:
        """Whether the attention can be a single node of autograd."""
        return self.out is not None and all(
            one.is_plain for one in (self.joint, self.query, self.out) if one is not None
        )


class FusedAttention:
    """The forward pass of one attention.

    diffusers reads the signature of its processor at each call, divides by a factor of 1 and asks
    for masks and norms that SDXL does not have. A mask, a compiler or an adapter that is switched
    off are left to diffusers' own forward pass.

    Args:
        attention: The layer; see `can_be_fused`.
        maps: Its projections.
    """

    def __init__(self, attention: Any, maps: AttentionMaps) -> None:
        self._attention, self._maps = attention, maps
        self._switch = maps.joint.group[0].layer
        self._is_dropping = attention.to_out[1].p > 0

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Compute the attention's output."""
        attention, maps = self._attention, self._maps
        query = maps.query
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
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        out: Tensor
        if maps.is_one_node and _is_on_processor(hidden_states):
            known = maps.joint.find_cached(context)
            out = _attend(hidden_states, context, maps, attention.heads, False, known)
        else:
            first = () if query is None else query(hidden_states)
            out = attention.to_out[0](mix_heads((*first, *maps.joint(context)), attention.heads))
        return attention.to_out[1](out) if self._is_dropping else out


class FusedTextAttention:
    """The forward pass of one attention of a text encoder that is trained.

    Masks, dropout, a compiler or an adapter that is switched off are left to transformers' own
    forward pass, and so is everything on a GPU.

    Args:
        attention: transformers' layer.
        maps: Its projections, all of them.
    """

    def __init__(self, attention: Any, maps: AttentionMaps) -> None:
        self._attention, self._maps = attention, maps
        self._switch = maps.joint.group[0].layer

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention's output, and no weights."""
        attention = self._attention
        if (
            attention_mask is not None
            or is_causal is None
            or (attention.training and attention.dropout)
            or self._switch.disable_adapters
            or torch.compiler.is_compiling()
            or not self._maps.is_one_node
            or not _is_on_processor(hidden_states)
        ):
            theirs: tuple[Tensor, Tensor | None] = type(attention).forward(
                attention,
                hidden_states,
                attention_mask,
                **({} if is_causal is None else {"is_causal": is_causal}),
                **others,
            )
            return theirs
        heads = attention.num_heads
        return _attend(hidden_states, hidden_states, self._maps, heads, is_causal, None), None


def _is_on_processor(x: Tensor) -> bool:
    # Counts of memory are made of tensors that only look so.
    return type(x) is Tensor and x.is_cpu


def _attend(
    x: Tensor,
    context: Tensor,
    maps: AttentionMaps,
    heads: int,
    is_causal: bool,
    known: Tensor | None,
) -> Tensor:
    options = (heads, is_causal)
    out: Tensor = _Attend.apply(x, context, maps, options, known, *maps.masters)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    """An attention with its four projections as one node of autograd, on a processor.

    There what lies between the matrix products of a small model costs as much as they do. Computed
    are the same operations in the same order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: Tensor,
        maps: AttentionMaps,
        options: tuple[int, bool],
        known: Tensor | None,
        *masters: Tensor,
    ) -> Tensor:
        del masters
        assert maps.out is not None
        images, inner, (heads, is_causal) = len(x), maps.out.inputs, options
        from_x, from_context = x.reshape(-1, x.shape[-1]), context.reshape(-1, context.shape[-1])
        narrow_query = None
        first: Sequence[Tensor] = ()
        if maps.query is not None:
            asked, narrow_query = maps.query.compute(from_x)
            first = (asked,)
        whole, narrow = maps.joint.compute(from_context, known)
        q, k, v = (
            one.view(images, -1, heads, inner // heads).transpose(1, 2)
            for one in (*first, *maps.joint.split(whole))
        )
        mixed, spread = _flash(q, k, v, 0.0, is_causal)
        out, narrow_out = maps.out.compute(_join_heads(mixed))
        ctx.save_for_backward(
            from_x, from_context, narrow_query, narrow, q, k, v, mixed, spread, narrow_out
        )
        ctx.maps, ctx.is_causal, ctx.shapes = maps, is_causal, (x.shape, context.shape)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        maps: AttentionMaps = ctx.maps
        assert maps.out is not None
        from_x, from_context, narrow_query, narrow, q, k, v, mixed, spread, narrow_out = (
            ctx.saved_tensors
        )
        x_shape, context_shape = ctx.shapes
        wants_x, wants_context = ctx.needs_input_grad[:2]
        rows = gradient.reshape(-1, gradient.shape[-1])
        into, of_out = maps.out.pull_back([rows], _join_heads(mixed), narrow_out, True)
        assert into is not None
        into = into.view(len(q), -1, q.shape[1], q.shape[3]).transpose(1, 2)
        back = _flash_back(into, q, k, v, mixed, spread, 0.0, ctx.is_causal)
        parts = [_join_heads(one) for one in back]
        to_context: Tensor | None = None
        of_query: list[Tensor] = []
        if maps.query is None:
            # Both inputs are the same one.
            to_x, of_joint = maps.joint.pull_back(parts, from_x, narrow, wants_x)
        else:
            to_x, of_query = maps.query.pull_back(parts[:1], from_x, narrow_query, wants_x)
            to_context, of_joint = maps.joint.pull_back(
                parts[1:], from_context, narrow, wants_context
            )
        return (
            None if to_x is None else to_x.view(x_shape),
            None if to_context is None else to_context.view(context_shape),
            *(None, None, None),
            *of_query,
            *of_joint,
            *of_out,
        )


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _join_heads(parts: Float[Tensor, "images heads positions _"]) -> Float[Tensor, "rows features"]:
    """Put the heads of each position side by side; no copy of what attention gives."""
    images, heads, positions, features = parts.shape
    return parts.transpose(1, 2).reshape(images * positions, heads * features)


def mix_heads(
    parts: Sequence[Float[Tensor, "images _ features"]], heads: int
) -> Float[Tensor, "images positions features"]:
    """Attend with query, key and value, head by head."""
    q, k, v = (one.view(len(one), one.shape[1], heads, -1).transpose(1, 2) for one in parts)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def can_be_fused(attention: nn.Module) -> bool:
    """Say whether an attention does no more than `FusedAttention` does."""
    if not isinstance(attention, Attention) or type(attention.processor) is not AttnProcessor2_0:
        return False
    norms = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
    return (
        not any(getattr(attention, name, None) for name in norms)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and len(attention.to_out) == 2
    )
