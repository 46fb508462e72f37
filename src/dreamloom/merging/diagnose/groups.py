"""Layers put together for people: by the block they are in, and by what they do there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dreamloom.merging.diagnose.measuring import Diagnosis, LayerPair, Together, measure_together

KINDS = (
    *("self q", "self k", "self v", "self out"),
    *("cross q", "cross k", "cross v", "cross out"),
    *("ff in", "ff out", "proj", "conv", "other"),
)
"""What a layer does in its block, in the order of tables."""

_TEXT = ("text_encoder", "text_encoder_2")
_PARTS = re.compile(r"unet\.((?:(?:down|up)_blocks\.\d+|mid_block)(?:\.attentions\.\d+)?)")


@dataclass(frozen=True)
class LayerGroup:
    """Some layers and what they have in common.

    Args:
        name: Such as ``up_blocks.0.attentions.1``.
        pairs: The layers.
        together: Their measures.
    """

    name: str
    pairs: tuple[LayerPair, ...]
    together: Together


def block_of(layer: str) -> str:
    """Name the block that a layer is in: of the denoiser, or a text encoder as a whole.

    Example:
        >>> block_of("unet.up_blocks.0.attentions.1.transformer_blocks.3.attn2.to_k")
        'up_blocks.0.attentions.1'
        >>> block_of("unet.down_blocks.2.resnets.0.conv1")
        'down_blocks.2'
    """
    component, _, inner = layer.partition(".")
    if component in _TEXT:
        return component
    found = _PARTS.match(layer)
    return found[1] if found else (inner or layer).partition(".")[0]


def kind_of(layer: str) -> str:
    """Say what a layer does in its block, as one of `KINDS`.

    Example:
        >>> kind_of("unet.mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0")
        'cross out'
        >>> kind_of("text_encoder.encoder.layers.3.mlp.fc1")
        'ff in'
    """
    attention = re.search(r"(attn1|attn2|self_attn)\.(?:to_)?(q|k|v|out)(_proj)?(\.0)?$", layer)
    if attention:
        return f"{'cross' if attention[1] == 'attn2' else 'self'} {attention[2]}"
    for ending, kind in (
        ((".ff.net.0.proj", ".mlp.fc1"), "ff in"),
        ((".ff.net.2", ".mlp.fc2"), "ff out"),
        ((".proj_in", ".proj_out"), "proj"),
        ((".conv", ".conv1", ".conv2", ".conv_shortcut", ".conv_in", ".conv_out"), "conv"),
    ):
        if layer.endswith(ending):
            return kind
    return "other"


def group_layers(diagnosis: Diagnosis, kinds: bool = False) -> tuple[LayerGroup, ...]:
    """Put layers together by block, or by block and kind.

    Args:
        diagnosis: What was measured.
        kinds: Whether layers of one block that do different things are kept apart; names then
            are such as ``mid_block.attentions.0 cross k``.
    """
    sorted_out: dict[str, list[LayerPair]] = {}
    for pair in diagnosis.pairs:
        name = block_of(pair.layer) + (f" {kind_of(pair.layer)}" if kinds else "")
        sorted_out.setdefault(name, []).append(pair)
    return tuple(_make(name, sorted_out[name]) for name in sort_blocks(sorted_out))


def _make(name: str, pairs: Sequence[LayerPair]) -> LayerGroup:
    return LayerGroup(name, tuple(pairs), measure_together(pairs))


def sort_blocks(names: Iterable[str]) -> list[str]:
    """Sort blocks as a picture passes through them: text encoders, down, middle, up."""
    order = (*_TEXT, "conv_in", "time_embedding", "add_embedding", "down", "mid", "up", "conv_out")

    def place(name: str) -> tuple[int, str]:
        head = name.partition(" ")[0]
        start = head.partition("_block")[0]
        return (order.index(start) if start in order else len(order), name)

    return sorted(names, key=place)
