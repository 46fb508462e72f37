"""A denoiser whose repeated blocks are compiled: what lies between matrix products is one kernel.

The compiler sees plain operations. Only where frozen weights are packed for the processor
(`frozen`), which it cannot see into, are their products operations of their own here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import linear

from dreamloom.families.attention import AttentionMaps, mix_heads
from dreamloom.families.frozen import FrozenMap
from dreamloom.families.lowrank import LowRankMap, Memory

# Blocks of one width have the same code; each width, and what is switched off, is compiled anew.
_MOST_VARIANTS = 64

# By the place of their weights in memory: an operation knows nothing but tensors.
_packed: dict[int, FrozenMap] = {}
_memories: dict[int, Memory] = {}


# ------------------------------------------------------------------ operations

_library = torch.library.Library("dreamloom", "DEF")
_library.define("frozen(Tensor x, Tensor weight) -> Tensor")
_library.define("frozen_back(Tensor gradient, Tensor weight) -> Tensor")
_library.define("known(Tensor x, Tensor weight) -> Tensor")


def _apply(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the outputs of a `FrozenMap`."""
    rows = x.reshape(-1, x.shape[-1])
    return _packed[weight.data_ptr()].apply(rows).view(*x.shape[:-1], -1)


def _pull_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of a `FrozenMap`'s input."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    return _packed[weight.data_ptr()].pull_back(rows).view(*gradient.shape[:-1], -1)


def _recall(x: Tensor, weight: Tensor) -> Tensor:
    """The same as `_apply` for an input that comes again; see `Memory`."""
    place = weight.data_ptr()
    found = _memories.setdefault(place, Memory()).find(x, lambda again: _apply(again, weight))
    # A copy: the compiler may write over what an operation gave it.
    return _apply(x, weight) if found is None else found.clone()


def _shape_outputs(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _shape_inputs(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], weight.shape[1])


for _name, _compute, _shape in (
    ("frozen", _apply, _shape_outputs),
    ("frozen_back", _pull_back, _shape_inputs),
    ("known", _recall, _shape_outputs),
):
    _library.impl(_name, _compute, "CPU")
    torch.library.register_fake(f"dreamloom::{_name}", _shape, lib=_library)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    del output
    ctx.save_for_backward(inputs[1])


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (weight,) = ctx.saved_tensors
    return torch.ops.dreamloom.frozen_back(gradient, weight), None


torch.library.register_autograd(
    "dreamloom::frozen", _differentiate, setup_context=_keep, lib=_library
)


# ------------------------------------------------------------------ modules that call them


class _PackedLinear(nn.Linear):
    """A linear layer that never learns, with packed weights, in a block that is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output."""
        result: Tensor = torch.ops.dreamloom.frozen(x, self.weight)
        return result


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
            parts = _map(attn.lean_joint, hidden_states)
        else:
            query = _map(attn.lean_query, hidden_states)
            parts = [*query, *_map(attn.lean_joint, encoder_hidden_states)]
        return _map(attn.lean_out, mix_heads(parts, attn.heads))[0]


def _map(told: Any, x: Tensor) -> list[Tensor]:
    """Compute what a `LowRankMap` does, in operations that the compiler knows."""
    weight, bias, is_packed, downs, ups, scales = told
    if not is_packed:
        whole = linear(x, weight, bias)
    elif x.requires_grad:
        whole = torch.ops.dreamloom.frozen(x, weight)
    else:
        whole = torch.ops.dreamloom.known(x, weight)
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


# ------------------------------------------------------------------ a component


class CompiledBlocks:
    """The repeated blocks of a denoiser, compiled when they are first called, until `remove`.

    Args:
        owner: The denoiser.
        attentions: Its adapted attentions, each with its maps.
        packed: Whether frozen weights are packed for the processor.
    """

    def __init__(self, owner: Any, attentions: Mapping[Any, AttentionMaps], packed: bool) -> None:
        self._owner = owner
        self._attentions = attentions
        self._places: list[int] = []
        processor = _AdaptedAttention()
        for attention, maps in attentions.items():
            vars(attention).pop("forward", None)
            attention.set_processor(processor)
            for part, own in vars(maps).items():
                if own is not None:
                    vars(attention)[f"lean_{part}"] = self._tell(own, packed)
        self._linears = _list_feed_forwards(self._list_blocks()) if packed else []
        for layer in self._linears:
            vars(layer).pop("forward", None)
            self._remember(FrozenMap(layer.weight, layer.bias, packed))
            layer.__class__ = _PackedLinear
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, _MOST_VARIANTS)
        for block in self._list_blocks():
            block.compile(fullgraph=True)

    def _tell(self, own: LowRankMap, packed: bool) -> tuple[Any, ...]:
        frozen, half = own.frozen, len(own.masters) // 2
        if packed:
            self._remember(frozen)
        downs, ups = own.masters[:half], own.masters[half:]
        return frozen.weight, frozen.bias, packed, downs, ups, own.scales

    def _remember(self, frozen: FrozenMap) -> None:
        _packed[frozen.weight.data_ptr()] = frozen
        self._places.append(frozen.weight.data_ptr())

    def _list_blocks(self) -> list[nn.Module]:
        names = self._owner._repeated_blocks
        return [one for one in self._owner.modules() if type(one).__name__ in names]

    def remove(self) -> None:
        """Let the blocks run as they are written."""
        for block in self._list_blocks():
            block._compiled_call_impl = None
        for layer in self._linears:
            layer.__class__ = nn.Linear
        for attention, maps in self._attentions.items():
            attention.set_processor(AttnProcessor2_0())
            for part in vars(maps):
                vars(attention).pop(f"lean_{part}", None)
        for place in self._places:
            _packed.pop(place, None)
            _memories.pop(place, None)


def _list_feed_forwards(blocks: Sequence[nn.Module]) -> list[nn.Linear]:
    return [
        layer
        for block in blocks
        for name, layer in block.named_modules()
        if type(layer) is nn.Linear and name.startswith("ff.") and not layer.weight.requires_grad
    ]
