"""Native blocks: a denoiser's and a text encoder's layers as single nodes of autograd, in C++.

On a processor, between the matrix products of a small model, Python and torch's dispatch cost as
much as the products do. `native.cpp` computes the same operations in the same order; it is compiled
once for this version of torch, and kept where torch keeps such things.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from dreamloom.core.errors import ConfigError
from dreamloom.models.attention import AttentionMaps
from dreamloom.models.build_tools import (
    GET_TOOLS,
    build_folder,
    list_missing_tools,
    search_path,
)
from dreamloom.models.convolutions import PackedConvolution
from dreamloom.models.lowrank import LowRankMap
from dreamloom.models.packed_linear import Order, PackedLinear

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O2",)
# What torch's own vectors are told with each kind of instructions.
_VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


@functools.cache
def load_native() -> Any:
    """Load what ``native.cpp`` defines, and compile it where that has not been done; half a minute.

    Raises:
        ConfigError: If it cannot be compiled here.
    """
    # A twentieth of a second that only those pay who compile.
    from torch.utils import cpp_extension

    source = _SOURCE.read_text(encoding="utf-8")
    key = "\n".join([source, torch.__version__, *_list_flags()])
    name = f"dreamloom_native_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    library = build_folder() / f"{name}{cpp_extension.LIB_EXT}"
    if library.exists():
        torch.ops.load_library(str(library))
    else:
        _compile(name, library)
    return torch.classes.dreamloom_native


def _list_flags() -> list[str]:
    kind = torch.backends.cpu.get_cpu_capability()
    flags = _VECTOR_FLAGS.get(kind)
    return [*_FLAGS, *flags, f"-DCPU_CAPABILITY_{kind}"] if flags else [*_FLAGS]


def _compile(name: str, library: Path) -> None:
    """Compile in a folder of its own, so that nobody waits for one who was stopped; keep it."""
    from torch.utils import cpp_extension

    if missing := list_missing_tools():
        raise ConfigError(
            f"Blocks cannot be compiled here: there is no {' and no '.join(missing)}.",
            f"{GET_TOOLS}, or set train.compile=off.",
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as build,
        _path(search_path()),
    ):
        try:
            cpp_extension.load(
                name,
                [str(_SOURCE)],
                extra_cflags=_list_flags(),
                build_directory=build,
                is_python_module=False,
            )
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"Blocks cannot be compiled here: {str(error).splitlines()[0]}",
                "Set train.compile=off.",
            ) from error
        # Where a library in use cannot be moved, the next start compiles again.
        with suppress(OSError):
            (Path(build) / library.name).replace(library)


@contextmanager
def _path(search: str) -> Iterator[None]:
    before = os.environ.get("PATH")
    os.environ["PATH"] = search
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


class NativeBlock:
    """The forward pass of one block of a denoiser's transformers.

    Masks, further arguments and an adapter that is switched off are left to diffusers' own.

    Args:
        block: The layer; see `list_native_blocks`.
        maps: How its two attentions compute, the one to itself first.
        find: Gives the map of a linear layer that learns, or None.
        order: How frozen weights lie beside themselves.
    """

    def __init__(
        self,
        block: Any,
        maps: tuple[AttentionMaps, AttentionMaps],
        find: Callable[[nn.Module], LowRankMap | None],
        order: Order,
    ) -> None:
        self._block = block
        itself, cross = maps
        self._joint, self._switch = cross.joint, itself.joint.group[0].layer
        feed = [find(layer) or layer for layer in (block.ff.net[0].proj, block.ff.net[2])]
        parts = [itself.joint, itself.out, cross.query, cross.joint, cross.out, *feed]
        self._masters = _list_masters(parts)
        norms = (block.norm1, block.norm2, block.norm3)
        self._native = load_native().Block(
            [_make_map(one, order) for one in parts],
            *_describe_norms(norms),
            block.attn1.heads,
            block.attn2.heads,
        )

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        """Compute the block's output."""
        if (
            attention_mask is not None
            or encoder_hidden_states is None
            or encoder_attention_mask is not None
            or any(one is not None for one in (*others, *named.values()))
            or self._switch.disable_adapters
            or type(hidden_states) is not Tensor
        ):
            theirs: Tensor = type(self._block).forward(
                self._block,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                *others,
                **named,
            )
            return theirs
        known = self._joint.find_cached(encoder_hidden_states)
        ours: Tensor = self._native.run(hidden_states, encoder_hidden_states, known, self._masters)
        return ours


class NativeTextLayer:
    """The forward pass of one layer of a text encoder that is trained.

    Masks and an adapter that is switched off are left to transformers' own.

    Args:
        layer: The layer; see `list_native_layers`.
        maps: How its attention computes.
        find: Gives the map of a linear layer that learns, or None.
        order: How frozen weights lie beside themselves.
    """

    def __init__(
        self,
        layer: Any,
        maps: AttentionMaps,
        find: Callable[[nn.Module], LowRankMap | None],
        order: Order,
    ) -> None:
        self._layer = layer
        self._switch = maps.joint.group[0].layer
        perceptron = [find(one) or one for one in (layer.mlp.fc1, layer.mlp.fc2)]
        parts = [maps.joint, maps.out, *perceptron]
        self._masters = _list_masters(parts)
        norms = (layer.layer_norm1, layer.layer_norm2)
        self._native = load_native().TextLayer(
            [_make_map(one, order) for one in parts],
            *_describe_norms(norms),
            layer.self_attn.num_heads,
            True,
            layer.mlp.config.hidden_act == "quick_gelu",
        )

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        """Compute the layer's output."""
        if (
            attention_mask is not None
            or not others.get("is_causal")
            or self._switch.disable_adapters
            or type(hidden_states) is not Tensor
        ):
            theirs: Tensor = type(self._layer).forward(
                self._layer, hidden_states, attention_mask, **others
            )
            return theirs
        ours: Tensor = self._native.run(hidden_states, self._masters)
        return ours


class NativeConvolution:
    """The forward pass of one frozen convolution on the way to something that learns.

    Args:
        packed: How it computes otherwise; its weights are those that are used.
    """

    def __init__(self, packed: PackedConvolution) -> None:
        self._packed = packed
        self._native: dict[torch.Size, Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer's output."""
        if not x.requires_grad or not self._packed.suits(x):
            return self._packed(x)
        if (native := self._native.get(x.shape)) is None:
            native = self._native[x.shape] = self._make(x.shape)
        ours: Tensor = native.run(x)
        return ours

    def _make(self, shape: torch.Size) -> Any:
        layer = self._packed.layer
        outward = torch.Size((shape[0], layer.out_channels, *shape[2:]))
        bias = None if layer.bias is None else layer.bias.detach()
        return load_native().Convolution(
            self._packed.pack(shape), self._packed.pack(outward, back=True), bias
        )


def _list_masters(parts: Sequence[LowRankMap | nn.Module | None]) -> list[nn.Parameter]:
    return [weight for one in parts if isinstance(one, LowRankMap) for weight in one.masters]


def _describe_norms(norms: Sequence[Any]) -> tuple[list[Tensor], list[float]]:
    weights = [weight.detach() for norm in norms for weight in (norm.weight, norm.bias)]
    return weights, [norm.eps for norm in norms]


def _make_map(one: LowRankMap | nn.Linear | None, order: Order) -> Any:
    assert one is not None
    if isinstance(one, LowRankMap):
        frozen, down, ups, scales = one.frozen, one.down, list(one.ups), list(one.scales)
    else:
        frozen, down, ups, scales = PackedLinear(one.weight, one.bias, order), None, [], []
    bias = None if frozen.bias is None else frozen.bias.detach()
    return load_native().Map(
        frozen.weight.detach(), bias, *frozen.copies, down, ups, [float(s) for s in scales]
    )


def list_native_blocks(
    owner: nn.Module, attentions: Mapping[Any, AttentionMaps]
) -> list[BasicTransformerBlock]:
    """List a component's blocks that `NativeBlock` can stand in for."""
    blocks = (one for one in owner.modules() if type(one) is BasicTransformerBlock)
    return [one for one in blocks if _can_be_native(one, attentions)]


def _can_be_native(block: Any, attentions: Mapping[Any, AttentionMaps]) -> bool:
    itself, cross = attentions.get(block.attn1), attentions.get(block.attn2)
    if itself is None or cross is None or not (itself.is_one_node and cross.is_one_node):
        return False
    first, *rest = block.ff.net
    if type(first) is not GEGLU or len(rest) != 2:
        return False
    dropouts = (block.attn1.to_out[1], block.attn2.to_out[1], rest[0])
    norms = (block.norm1, block.norm2, block.norm3)
    return (
        itself.query is None
        and cross.query is not None
        and block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block._chunk_size is None
        and not block.only_cross_attention
        and _are_whole(first.proj, rest[1])
        and all(one.p == 0 for one in dropouts)
        and all(one.weight is not None and one.bias is not None for one in norms)
        and not _learns(*norms)
    )


def list_native_layers(
    owner: nn.Module, attentions: Mapping[Any, AttentionMaps]
) -> list[CLIPEncoderLayer]:
    """List a text encoder's layers that `NativeTextLayer` can stand in for."""
    layers: list[Any] = [one for one in owner.modules() if type(one) is CLIPEncoderLayer]
    return [
        one
        for one in layers
        if one.self_attn in attentions
        and attentions[one.self_attn].is_one_node
        and one.mlp.config.hidden_act in ("gelu", "quick_gelu")
        and not one.self_attn.dropout
        and _are_whole(one.mlp.fc1, one.mlp.fc2)
        and not _learns(one.layer_norm1, one.layer_norm2)
    ]


def _are_whole(*layers: nn.Module) -> bool:
    """Say whether linear layers, under an adapter or not, have their weights as they are."""
    return all(type(getattr(one, "base_layer", one)) is nn.Linear for one in layers)


def _learns(*norms: Any) -> bool:
    return any(weight.requires_grad for norm in norms for weight in (norm.weight, norm.bias))
