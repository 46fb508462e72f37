"""Assemble a layer's tensors (LoRA, LoHa, LoKr, DoRA, diff) to factors, alpha folded in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Layer
from dreamloom.lora.lycoris import (
    FactorPair,
    contract_tucker,
    make_layer,
    multiply_blocks,
    multiply_entries,
    split_exactly,
)
from dreamloom.lora.tensors import is_finite

Parts = Mapping[str, Tensor]
"""The tensors of one layer by their part, as `key_names.split_key` names them."""
ScaleOf = Callable[[int], float]
"""From a rank to the scale of a LoRA whose file says nothing of the layer's own alpha."""

_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOHA_CORES = {"hada_t1", "hada_t2"}
_LOKR_FIRST = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_LOKR_SECOND = (
    {"lokr_w2"},
    {"lokr_w2_a", "lokr_w2_b"},
    {"lokr_w2_a", "lokr_w2_b", "lokr_t2"},
)
_LOKR = [first | second for first in _LOKR_FIRST for second in _LOKR_SECOND]


def name_stored_kind(parts: Parts) -> str:
    """Name the kind of change that a layer's tensors make up; empty if they make up none."""
    names = set(parts) - {"alpha"}
    magnitudes = names & {"magnitude", "dora_scale"}
    if names - magnitudes == {"down", "up"}:
        return "LoRA" if not magnitudes else "DoRA" if len(magnitudes) == 1 else ""
    if names == {"down", "mid", "up"}:
        return "LoRA with Tucker cores"
    if names in (_LOHA, _LOHA | _LOHA_CORES):
        return "LoHa"
    if names in _LOKR:
        return "LoKr"
    return "full difference" if names == {"diff"} and "alpha" not in parts else ""


def assemble_layer(
    path: str, name: str, parts: Parts, kernel: Sequence[int], scale_of: ScaleOf
) -> Layer:
    """Put a layer's tensors together as two factors, of ΔW = up · down.

    Args:
        path: The file, for messages.
        name: The layer, for messages.
        parts: The tensors of one of the kinds that `name_stored_kind` names, in any precision.
        kernel: Of the layer's convolution, where the tensors do not tell it; empty for a linear
            layer.
        scale_of: The scale of a plain LoRA without an alpha of its own.

    Raises:
        AdapterError: If the tensors' shapes do not fit together, or the change is infinite.
    """
    tensors = {part: tensor.float() for part, tensor in parts.items()}
    try:
        layer = _assemble(name_stored_kind(parts), tensors, kernel, scale_of)
    except (ValueError, RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{part} is {tuple(t.shape)}" for part, t in sorted(tensors.items()))
        raise AdapterError(
            f"The factors of {name} in {path} do not fit together: {shapes}.",
            "The file may be damaged; get it again.",
        ) from error
    if not (is_finite(layer.up) and is_finite(layer.down)):
        raise AdapterError(
            f"The change of {name} in {path} is infinite: its alpha, or its factors, are too large "
            "for float32.",
            "The file may be damaged; get it again.",
        )
    return layer


def _assemble(kind: str, parts: Parts, kernel: Sequence[int], scale_of: ScaleOf) -> Layer:
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError("the alpha is no single number")
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    if kind == "full difference":
        # Bit for bit: one of the factors is an identity.
        change = parts["diff"]
        if change.ndim < 2:
            raise ValueError("a difference of a vector")
        return make_layer(split_exactly(change.flatten(1)), change.shape[2:])
    if kind in ("LoHa", "LoKr"):
        return assemble_product(kind, parts, kernel, lambda r: 1.0 if alpha is None else alpha / r)
    down, up = parts["down"], parts["up"]
    if kind == "LoRA with Tucker cores":
        down, core, up = down.flatten(1), parts["mid"], up.flatten(1)
        if up.shape[1] != core.shape[0]:
            raise ValueError("up and the core differ in rank")
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        return make_layer((up, contract_tucker(core, down)), core.shape[2:], scale)
    fits = (
        down.ndim >= 2
        and down.shape[0] > 0
        and up.ndim == down.ndim
        and up.shape[1] == down.shape[0]
        and all(side == 1 for side in up.shape[2:])
    )
    if not fits:
        raise ValueError("up and down differ in rank or in dimensions")
    rank = down.shape[0]
    scale = scale_of(rank) if alpha is None else alpha / rank
    return Layer(down.contiguous(), (up * scale).contiguous())


def assemble_product(
    kind: str, parts: Parts, kernel: Sequence[int], scale_of: ScaleOf, is_kohya: bool = True
) -> Layer:
    """Write a LoHa's or a LoKr's product as two factors.

    Args:
        kind: ``LoHa`` or ``LoKr``.
        parts: Its tensors, named as LyCORIS and PEFT do.
        kernel: Of the layer's convolution, where the tensors do not tell it.
        scale_of: From the rank in the file to the scale.
        is_kohya: Whether LyCORIS's rule holds: a LoKr of two whole blocks has no scale.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if kind == "LoHa":
        first = _read_hada(parts, "w1", "t1")
        second = _read_hada(parts, "w2", "t2")
        shape = parts["hada_t1"].shape[2:] if "hada_t1" in parts else kernel
        return make_layer(
            multiply_entries(first, second), shape, scale_of(parts["hada_w1_b"].shape[0])
        )
    first, second, inner = _read_blocks(parts)
    whole = "lokr_w1" in parts and "lokr_w2" in parts
    # The rank is found where there is one; PEFT divides by its setting all the same.
    ranks = [parts[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in parts]
    scale = 1.0 if whole and is_kohya else scale_of(ranks[0] if ranks else 0)
    return make_layer(multiply_blocks(first, second), inner or kernel, scale)


def _read_hada(parts: Parts, factor: str, core: str) -> FactorPair:
    up, down = parts[f"hada_{factor}_a"], parts[f"hada_{factor}_b"]
    if f"hada_{core}" not in parts:
        return up, down.flatten(1)
    # Beside a core, the outer factor lies on its side.
    return up.T, contract_tucker(parts[f"hada_{core}"], down)


def _read_blocks(parts: Parts) -> tuple[FactorPair, FactorPair, tuple[int, ...]]:
    """Read both blocks of a LoKr, and the kernel if the second one tells it."""
    if "lokr_w1" in parts:
        first = split_exactly(parts["lokr_w1"])
    else:
        first = parts["lokr_w1_a"], parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        block = parts["lokr_w2"]
        return first, split_exactly(block.flatten(1)), tuple(block.shape[2:])
    up, down = parts["lokr_w2_a"], parts["lokr_w2_b"]
    if "lokr_t2" in parts:
        core = parts["lokr_t2"]
        return first, (up.T, contract_tucker(core, down)), tuple(core.shape[2:])
    return first, (up, down.flatten(1)), tuple(down.shape[2:])


def stack_layers(layers: Sequence[Layer]) -> Layer:
    """Add changes of one layer exactly, by stacking their factors.

    Raises:
        ValueError: If their shapes differ.
    """
    if len(layers) == 1:
        return layers[0]
    if len({(layer.up.shape[0], layer.down.shape[1:]) for layer in layers}) > 1:
        raise ValueError("the changes differ in shape")
    return Layer(
        torch.cat([layer.down for layer in layers]),
        torch.cat([layer.up for layer in layers], dim=1),
    )
