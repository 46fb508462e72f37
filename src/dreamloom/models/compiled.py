"""torch.compile for a denoiser's repeated blocks: what lies between matrix products is one kernel.

The compiler sees plain operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import linear

from dreamloom.models.attention import AttentionMaps, mix_heads
from dreamloom.models.lowrank import LowRankMap

# Blocks of one width have the same code; each width, and what is switched off, is compiled anew.
_MOST_VARIANTS = 64


class _AdaptedAttention(AttnProcessor2_0):  # type: ignore[misc]
    """How an attention computes with its adapter; all attentions share one of these."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Compute the attention's output."""
        if attention_mask is not None or attn.to_k.disable_adapters:
            result: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
            return result
        if encoder_hidden_states is None:
            parts = _map(attn.fused_joint, hidden_states)
        else:
            query = _map(attn.fused_query, hidden_states)
            parts = [*query, *_map(attn.fused_joint, encoder_hidden_states)]
        return _map(attn.fused_out, mix_heads(parts, attn.heads))[0]


def _map(described: Any, x: Tensor) -> list[Tensor]:
    """Compute what a `LowRankMap` does, in operations that the compiler knows."""
    weight, bias, downs, ups, scales = described
    whole = linear(x, weight, bias)
    narrow = linear(x, torch.cat([down.to(x.dtype) for down in downs]))
    parts = zip(
        whole.split([up.shape[0] for up in ups], -1),
        narrow.split([up.shape[1] for up in ups], -1),
        ups,
        scales,
        strict=True,
    )
    return [
        out + linear(inner if scale == 1 else inner * scale, up.to(x.dtype))
        for out, inner, up, scale in parts
    ]


def _describe(own: LowRankMap) -> tuple[Any, ...]:
    frozen, half = own.frozen, len(own.masters) // 2
    return frozen.weight, frozen.bias, own.masters[:half], own.masters[half:], own.scales


class CompiledBlocks:
    """The repeated blocks of a denoiser, compiled when they are first called, until `remove`.

    Args:
        owner: The denoiser.
        attentions: Its adapted attentions, each with its maps.
    """

    def __init__(self, owner: Any, attentions: Mapping[Any, AttentionMaps]) -> None:
        self._owner = owner
        self._attentions = attentions
        processor = _AdaptedAttention()
        for attention, maps in attentions.items():
            vars(attention).pop("forward", None)
            attention.set_processor(processor)
            for part, own in vars(maps).items():
                if own is not None:
                    vars(attention)[f"fused_{part}"] = _describe(own)
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, _MOST_VARIANTS)
        for block in self._list_blocks():
            block.compile(fullgraph=True)

    def _list_blocks(self) -> list[nn.Module]:
        names = self._owner._repeated_blocks
        return [one for one in self._owner.modules() if type(one).__name__ in names]

    def remove(self) -> None:
        """Let the blocks run as they are written."""
        for block in self._list_blocks():
            block._compiled_call_impl = None
        for attention, maps in self._attentions.items():
            attention.set_processor(AttnProcessor2_0())
            for part in vars(maps):
                vars(attention).pop(f"fused_{part}", None)
