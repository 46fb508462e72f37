"""Convert LoHa and LoKr to LoRA exactly, and approximate a DoRA by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import KIND_NAMES, Adapter, Layer, PeftState
from dreamloom.lora.assembly import assemble_product, make_layer, truncate_change
from dreamloom.lora.peftconfig import DOWN, MAGNITUDE, UP, match_pattern, read_pattern
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
    component, _, inner = name.partition(".")
    parts = {
        key.removeprefix(f"{name}."): tensor.float()
        for key, tensor in state.tensors.items()
        if key.startswith(f"{name}.")
    }
    # PEFT's scale of a LoHa or LoKr is alpha over the rank of its setting, by its patterns.
    config = state.configs[component]
    alpha, rank = (
        match_pattern(read_pattern(config.get(pattern)), inner, float(config[name]))
        for pattern, name in (("alpha_pattern", "alpha"), ("rank_pattern", "r"))
    )
    try:
        return assemble_product(
            KIND_NAMES[state.kind], parts, kernel, lambda _: alpha / rank, is_kohya=False
        )
    except (ValueError, RuntimeError, KeyError) as error:
        shapes = ", ".join(f"{part} is {tuple(t.shape)}" for part, t in sorted(parts.items()))
        raise AdapterError(
            f"The factors of {name} do not fit together: {shapes}.",
            "The file may be damaged; get it again.",
        ) from error


def approximate_dora(
    adapter: Adapter,
    weight_of: Callable[[str], Tensor],
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Approximate a DoRA by a LoRA, against the base model that it was made for.

    A DoRA sets the length of each output's weights: W' = D (W + up · down) with the diagonal
    D = m / ‖W + up · down‖, norms over everything but the outputs. Its change (D - 1) W + D up down
    has full rank in general; of each layer the nearest change of a lower rank is taken.

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

    Source:
        Liu et al., DoRA (arXiv:2402.09353), Eq. 5, with PEFT's choice of the norm's axis.
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
        change, kernel = _change_of_dora(state, name, weight_of(name))
        factors, errors[name] = truncate_change(change, rank, energy)
        layers[name] = make_layer(factors, kernel)
        squared = float(change.square().sum())
        lost, whole = lost + errors[name] ** 2 * squared, whole + squared
    error = (lost / whole) ** 0.5 if whole > 0 else 0.0
    note = json.dumps({"of": "DoRA", "relative_error": round(error, 6)})
    approximated = replace(adapter, layers=layers, peft=None)
    return approximated.with_metadata(**{ERROR_KEY: note}), errors


def _change_of_dora(state: PeftState, name: str, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The change of one layer as a matrix in double precision, and the kernel."""
    down, up = state.tensors[name + DOWN], state.tensors[name + UP]
    shape = (up.shape[0], *down.shape[1:])
    if tuple(weight.shape) != shape:
        raise AdapterError(
            f"The base's weight of {name} is {tuple(weight.shape)}, and the DoRA's {shape}.",
            "Name the base model that the DoRA was made for.",
        )
    base = weight.detach().cpu().double().flatten(1)
    moved = base + up.double().flatten(1) @ down.double().flatten(1)
    lengths = moved.norm(dim=1, keepdim=True)
    # An output of zeros stays one: it has no direction to be lengthened.
    lengths = torch.where(lengths > 0, lengths, 1.0)
    magnitude = state.tensors[name + MAGNITUDE].double().reshape(-1, 1)
    return magnitude / lengths * moved - base, tuple(shape[2:])
