"""Fuse finished adapters into a model's weights for a block, and find the layers they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.models.peftstate import change_of


def find_module(owner: nn.Module, name: str) -> nn.Module | None:
    """Find the layer that an adapter's name means, in a pipeline's module of that component."""
    # transformers 5 dropped the wrapper that older adapters name, and kept it in one encoder.
    for spelling in (name, name.removeprefix("text_model."), f"text_model.{name}"):
        try:
            return owner.get_submodule(spelling)
        except AttributeError:
            continue
    return None


def locate(
    components: Mapping[str, nn.Module], adapter: Adapter, base_name: str
) -> dict[str, nn.Module]:
    """Find every layer of an adapter in the model and check that its shape fits.

    Raises:
        AdapterError: If a layer is missing or of another shape.
    """
    found: dict[str, nn.Module] = {}
    missing: list[str] = []
    for name in adapter.layer_names:
        component, _, inner = name.partition(".")
        owner = components.get(component)
        module = find_module(owner, inner) if owner is not None else None
        if module is None or not _fits(module, adapter.layers.get(name)):
            missing.append(name)
        else:
            found[name] = module
    if missing:
        raise AdapterError(
            f"The adapter does not fit {base_name}: {len(missing)} of its "
            f"{len(adapter.layer_names)} layers are missing there or have another shape, such as "
            f"{missing[0]}.",
            "It was made for another base model; name that one with --base.",
        )
    return found


def _fits(module: nn.Module, layer: Layer | None) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(module, nn.Linear | nn.Conv2d):
        return False
    # Whether another kind than LoRA fits, PEFT finds out when it computes the change.
    return layer is None or (
        weight.shape[0] == layer.up.shape[0] and weight.shape[1:] == layer.down.shape[1:]
    )


@contextmanager
def fused_adapters(
    components: Mapping[str, nn.Module], parts: Sequence[tuple[Adapter, float]], base_name: str
) -> Iterator[None]:
    """Add the weighted changes to the layers' weights for a block; then put the weights back.

    Each change is that of the base model as it is, whichever others are applied with it. The
    originals are kept and copied back, so the base is restored bit for bit. Drawing costs what the
    base model alone costs.
    """
    placed = [(locate(components, adapter, base_name), adapter, w) for adapter, w in parts]
    originals: dict[nn.Module, Tensor] = {}
    try:
        with torch.no_grad():
            for modules, adapter, weight in placed:
                for name, module in modules.items():
                    target: Tensor = module.weight  # type: ignore[assignment]
                    original = originals.setdefault(module, target.detach().clone())
                    if adapter.peft is None:
                        change = adapter.layers[name].update().to(original.device)
                    else:
                        change = change_of(adapter.peft, name, original)
                    target.copy_(change.mul_(weight).add_(target.float()))
        yield
    finally:
        with torch.no_grad():
            for module, original in originals.items():
                module.weight.copy_(original)  # type: ignore[operator]
