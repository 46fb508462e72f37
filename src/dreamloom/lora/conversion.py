"""Convert LoHa and LoKr to LoRA exactly, and approximate a DoRA by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import (
    KIND_NAMES,
    Adapter,
    AdapterKind,
    Layer,
    PeftState,
    refuse_other_kinds,
)
from dreamloom.lora.assembly import (
    assemble_product,
    contract_tucker,
    make_layer,
    truncate_change,
)
from dreamloom.lora.peftconfig import DOWN, MAGNITUDE, UP, read_patterns
from dreamloom.lora.sdxl_layers import kernel_of, respell_text

ERROR_KEY = "dreamloom.approximation"
"""Where an adapter's header says what was approximated, and by how much it is wrong."""


def as_lora(adapter: Adapter, shape_of: Callable[[str], Sequence[int]] | None = None) -> Adapter:
    """Write a LoHa or a LoKr as a plain LoRA with exactly the same change.

    Both are products of two low-rank products, entry by entry or block by block, and so of low rank
    themselves: the ranks multiply. No base model is needed. A LoRA comes back as it is.

    Args:
        adapter: A LoRA, LoHa or LoKr.
        shape_of: Gives the shape of a layer's weight by the layer's name. Without it the kernel of
            a convolution is told from its name, as diffusers' denoisers have them.

    Raises:
        AdapterError: If it is a DoRA or OFT, whose change depends on the base model, or its tensors
            do not fit together.
    """
    state = adapter.peft
    if state is None:
        return adapter
    if state.kind not in ("loha", "lokr"):
        raise AdapterError(
            f"A {KIND_NAMES[state.kind]} is no LoRA: its change depends on the base model's "
            "weights.",
            "Write the nearest LoRA of a DoRA, and take that: dreamloom convert FILE --rank 32 "
            "--base BASE.",
        )
    layers = {}
    for name in state.layer_names:
        shape = None if shape_of is None else tuple(shape_of(name))
        layer = _expand(state, name, kernel_of(name) if shape is None else shape[2:])
        if shape is not None and (layer.up.shape[0], *layer.down.shape[1:]) != shape:
            raise AdapterError(
                f"The {KIND_NAMES[state.kind]} of {name} does not have the shape {shape}.",
                "It was made for another base model.",
            )
        layers[respell_text(name)] = layer
    return replace(adapter, layers=layers, peft=None)


def _expand(state: PeftState, name: str, kernel: Sequence[int]) -> Layer:
    parts, scale = _parts_of(state, name), _scale_of(state, name)
    try:
        return assemble_product(
            KIND_NAMES[state.kind], parts, kernel, lambda _: scale, is_kohya=False
        )
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        shapes = ", ".join(f"{part} is {tuple(t.shape)}" for part, t in sorted(parts.items()))
        raise AdapterError(
            f"The factors of {name} do not fit together: {shapes}.",
            "The file may be damaged; get it again.",
        ) from error


def _parts_of(state: PeftState, name: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}."): tensor.float()
        for key, tensor in state.tensors.items()
        if key.startswith(f"{name}.")
    }


def _scale_of(state: PeftState, name: str) -> float:
    """PEFT's scale of a LoHa or LoKr: alpha over the rank of its setting, by its patterns."""
    component, _, inner = name.partition(".")
    config = state.configs[component]
    try:
        alpha, rank = (
            read_patterns(config.get(pattern)).of(inner, float(config[name]))
            for pattern, name in (("alpha_pattern", "alpha"), ("rank_pattern", "r"))
        )
        return alpha / rank
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise AdapterError(
            f"The adapter's configuration does not tell the strength of {name}: {error!r}.",
            "Get the file again.",
        ) from error


def scale_as_lycoris(state: PeftState, name: str) -> dict[str, Tensor]:
    """Name a LoHa's or LoKr's tensors of one layer as LyCORIS does, with its alpha.

    There the scale is alpha over the rank that the tensors have, and 1 for a LoKr of two whole
    blocks, where PEFT has its setting's.

    Returns:
        ``hada_w1_a`` and so on, and ``alpha``.
    """
    parts, scale = _parts_of(state, name), _scale_of(state, name)
    if "lokr_t2" in parts:
        # ComfyUI leaves out a LoKr's layers with cores, and LyCORIS' own loader stops at some.
        parts |= _multiply_core(parts)
        del parts["lokr_t2"]
    ranks = [parts[part].shape[0] for part in _WITH_RANK if part in parts]
    if not ranks:
        # LyCORIS wants an alpha, and makes nothing of it.
        return {**parts, "lokr_w1": parts["lokr_w1"] * scale, "alpha": torch.tensor(1.0)}
    return {**parts, "alpha": torch.tensor(scale * ranks[0])}


def _multiply_core(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write a LoKr's second block without its Tucker core: the same product, the same rank."""
    inner = contract_tucker(parts["lokr_t2"], parts["lokr_w2_b"]).float()
    return {"lokr_w2_a": parts["lokr_w2_a"].T, "lokr_w2_b": inner}


def keep_as_lycoris(layers: Mapping[str, Mapping[str, Tensor]]) -> PeftState:
    """Keep LyCORIS' factors of a LoHa or a LoKr, with every scale folded in.

    Args:
        layers: The tensors of each layer by LyCORIS' names, ``alpha`` among them.
    """
    kind: AdapterKind = "loha" if "hada_w1_a" in next(iter(layers.values())) else "lokr"
    tensors: dict[str, Tensor] = {}
    targets: dict[str, list[str]] = {}
    for name, parts in layers.items():
        component, _, inner = name.partition(".")
        targets.setdefault(component, []).append(inner)
        scale = 1.0
        ranks = [parts[part].shape[0] for part in _WITH_RANK if part in parts]
        if ranks and "alpha" in parts:
            scale = float(parts["alpha"]) / ranks[0]
        scaled = next(part for part in _SCALED if part in parts)
        for part, tensor in parts.items():
            if part != "alpha":
                factor = scale if part == scaled else 1.0
                tensors[f"{name}.{part}"] = tensor.float() * factor
    configs = {
        component: {"r": 1, "alpha": 1, "target_modules": sorted(inner)}
        for component, inner in targets.items()
    }
    return PeftState(kind, tensors, configs)


def equal_ranks(adapter: Adapter) -> Adapter:
    """Give every layer of a LoRA the highest rank, filled up with zeros: the change stays.

    diffusers before 0.35 takes one layer's rank for another's in kohya's names, and before 0.32 in
    PEFT's; where all ranks are one, there is nothing to take wrongly.

    Raises:
        AdapterError: If it is no LoRA.
    """
    refuse_other_kinds(adapter, "The adapter", "has ranks to be made equal")
    rank = max(adapter.ranks.values())
    layers = {}
    for name, layer in adapter.layers.items():
        missing = rank - layer.rank
        down = layer.down.new_zeros(missing, *layer.down.shape[1:])
        up = layer.up.new_zeros(layer.up.shape[0], missing, *layer.up.shape[2:])
        layers[name] = Layer(torch.cat([layer.down, down]), torch.cat([layer.up, up], dim=1))
    return replace(adapter, layers=layers)


# Whose first side is the rank, and which factor takes up a scale.
_WITH_RANK = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
_SCALED = ("hada_w1_a", "lokr_w1", "lokr_w1_a")


def approximate_dora(
    adapter: Adapter,
    weight_of: Callable[[str], Tensor],
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Approximate a DoRA by a LoRA, against the base model that it was made for.

    Its change has full rank in general (see `change_of_dora`); of each layer the nearest change of
    a lower rank is taken.

    Args:
        adapter: The DoRA.
        weight_of: Gives the base model's weight of a layer by the layer's name.
        rank: The rank of every layer, 1 or more.
        energy: Or the share of the squared norm that every layer keeps, above 0 and up to 1.

    Returns:
        The LoRA, and for each layer the relative error ‖ΔW - up · down‖ / ‖ΔW‖ (Frobenius).

    Raises:
        AdapterError: If it is no DoRA, or a weight has another shape.
        ValueError: Unless exactly one of rank and energy is given, and in its range.
    """
    state = adapter.peft
    if state is None or state.kind != "dora":
        raise AdapterError(
            f"The adapter is a {KIND_NAMES[adapter.kind]}, not a DoRA.",
            "Only a DoRA is approximated; a LoHa or LoKr is a LoRA exactly.",
        )
    layers: dict[str, Layer] = {}
    errors: dict[str, float] = {}
    lost = whole = 0.0
    for name in state.layer_names:
        weight = weight_of(name)
        change = change_of_dora(state, name, weight).flatten(1)
        factors, errors[name] = truncate_change(change, rank, energy)
        layers[name] = make_layer(factors, weight.shape[2:])
        squared = float(change.square().sum())
        lost, whole = lost + errors[name] ** 2 * squared, whole + squared
    error = (lost / whole) ** 0.5 if whole > 0 else 0.0
    note = json.dumps({"of": "DoRA", "relative_error": round(error, 6)})
    approximated = replace(adapter, layers=layers, peft=None)
    return approximated.with_metadata(**{ERROR_KEY: note}), errors


def change_of_dora(state: PeftState, name: str, weight: Tensor) -> Tensor:
    """Compute how a DoRA changes a layer's weight.

    A DoRA sets the lengths of a weight's outputs, W' = D (W + up · down) with the diagonal
    D = m / ‖W + up · down‖, norms over everything but the outputs; or those of its inputs,
    W' = (W + up · down) D, norms over everything but the inputs.

    Args:
        state: The DoRA.
        name: The layer, as the DoRA names it.
        weight: The base model's weight of that layer, of any precision.

    Returns:
        W' - W in double precision where the device has it, in the weight's shape and on its device.

    Raises:
        AdapterError: If the weight has another shape.

    Source:
        Liu et al., DoRA (arXiv:2402.09353), Eq. 5; of outputs as in PEFT, of inputs as in LyCORIS
        (``wd_on_out=False``) and OneTrainer.
    """
    down, up = state.tensors[name + DOWN], state.tensors[name + UP]
    shape = (up.shape[0], *down.shape[1:])
    if tuple(weight.shape) != shape:
        raise AdapterError(
            f"The base's weight of {name} is {tuple(weight.shape)}, and the DoRA's {shape}.",
            "Name the base model that the DoRA was made for.",
        )
    # Apple's GPUs know no double precision.
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    base = weight.detach().to(exact)
    update = up.to(base).flatten(1) @ down.to(base).flatten(1)
    moved = base + update.view(shape)
    axis = 0 if state.dora_axis == "outputs" else 1
    others = tuple(other for other in range(moved.ndim) if other != axis)
    lengths = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
    # What is all zeros stays so: it has no direction to be lengthened.
    lengths = torch.where(lengths > 0, lengths, 1.0)
    magnitude = state.tensors[name + MAGNITUDE].to(base).reshape(lengths.shape)
    return magnitude / lengths * moved - base
