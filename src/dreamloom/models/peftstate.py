"""PEFT's own state of adapters of other kinds than LoRA: how it is described, what it changes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from peft import PeftConfig, get_peft_config, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import PeftState
from dreamloom.lora.conversion import change_of_dora

_ALONE = "alone"
_NEWER = "It may have been made by a newer version of PEFT."
# Where it was made, not what it is.
_LEFT_OUT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type"}


def describe_config(config: PeftConfig) -> dict[str, Any]:
    """Write PEFT's configuration in values that JSON knows; `change_of` builds it again."""
    described: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in _LEFT_OUT or value is None:
            continue
        if isinstance(value, set | list | tuple):
            described[name] = sorted(value)
        elif isinstance(value, bool | int | float | dict):
            described[name] = value
        elif isinstance(value, str):
            described[name] = str(getattr(value, "value", value))
    return described


@torch.no_grad()
def change_of(state: PeftState, name: str, weight: Tensor) -> Tensor:
    """Compute how one layer's weight changes: what PEFT would merge into it, less the weight.

    The layer is rebuilt alone, in float32, so the model itself is never touched. A DoRA needs no
    PEFT, which knows one of its two kinds.

    Args:
        state: The adapter.
        name: The layer's full name, such as ``unet.mid_block.attentions.0.proj_in``.
        weight: The base model's weight of that layer.

    Returns:
        The change in float32, in the weight's shape.

    Raises:
        AdapterError: If PEFT cannot rebuild the layer.
    """
    if state.kind == "dora":
        return change_of_dora(state, name, weight).float()
    component, _, inner = name.partition(".")
    base = _make_layer(weight)
    shelf = _shelve(base, inner)
    config = _rebuild(state.configs[component], inner)
    tensors = {
        key.removeprefix(f"{component}."): value.to(weight.device)
        for key, value in state.tensors.items()
        if key.startswith(f"{name}.")
    }
    original = base.weight.detach().clone()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            # The patterns of the other layers match nothing on a shelf of one.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, shelf, _ALONE)
            loaded = set_peft_model_state_dict(shelf, tensors, adapter_name=_ALONE)
    except (RuntimeError, ValueError, TypeError) as error:
        raise AdapterError(
            f"The {state.kind} of {name} cannot be rebuilt: {str(error).splitlines()[0]}",
            "It was made for another base model, or by another version of PEFT.",
        ) from error
    layer: Any = shelf.get_submodule(inner)
    if loaded.unexpected_keys or not isinstance(layer, BaseTunerLayer):
        raise AdapterError(
            f"The {state.kind} of {name} does not fit its configuration.", "Get the file again."
        )
    layer.to(weight.device).merge()
    change: Tensor = base.weight.detach() - original
    return change


def _rebuild(described: Mapping[str, Any], inner: str) -> PeftConfig:
    try:
        config = get_peft_config({**described, "target_modules": [inner]})
        unknown = set(described) - {field.name for field in fields(config)}
    except (KeyError, TypeError, ValueError) as error:
        problem = f"PEFT does not understand the adapter's configuration: {error}."
        raise AdapterError(problem, _NEWER) from error
    if unknown:
        names = ", ".join(sorted(unknown))
        raise AdapterError(f"PEFT does not know {names} of the adapter's configuration.", _NEWER)
    return config


def _make_layer(weight: Tensor) -> Any:
    """Make a layer that holds a copy of a weight in float32."""
    outputs, inputs, *kernel = weight.shape
    layer: nn.Module = (
        nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=False, device="meta")
        if kernel
        else nn.Linear(inputs, outputs, bias=False, device="meta")
    )
    layer.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=False)
    return layer


def _shelve(layer: nn.Module, name: str) -> nn.Module:
    """Put a layer alone into modules that give it its name in the model."""
    shelf = holder = nn.Module()
    *parents, last = name.split(".")
    for parent in parents:
        inner = nn.Module()
        holder.add_module(parent, inner)
        holder = inner
    holder.add_module(last, layer)
    return shelf
