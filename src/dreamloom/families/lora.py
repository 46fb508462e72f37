"""Adapters on a model's modules: teach one through PEFT, wear finished ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from dreamloom.adapters import Adapter, Layer
from dreamloom.errors import AdapterError
from dreamloom.families.base import LoraSpec, Reach

TAUGHT = "taught"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Few tools read adapters on these, and they shape every picture rather than one subject.
_LEFT_ALONE = ("conv_in", "conv_out", "time_embedding", "add_embedding")


def choose_layers(unet: nn.Module, reach: Reach) -> list[str]:
    """List the names of the layers that an adapter of this reach changes, from the model itself."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    if reach == "all":
        kinds = (nn.Linear, nn.Conv2d)
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, kinds) and name.split(".")[0] not in _LEFT_ALONE
    ]
    if reach == "attention":
        names = [name for name in names if name.endswith(_ATTENTION)]
    return names


def attach(unet: nn.Module, spec: LoraSpec) -> list[nn.Parameter]:
    """Add a fresh adapter whose update is zero; return its weights, in float32."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=choose_layers(unet, spec.reach),
        init_lora_weights=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        unet.add_adapter(config, adapter_name=TAUGHT)  # type: ignore[operator]
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in weights:
        # AdamW steps of 1e-4 vanish in bfloat16: adapters are taught in float32.
        weight.data = weight.data.float()
    return weights


def read(unet: nn.Module, scale: float) -> dict[str, Layer]:
    """Copy the attached adapter, its scale folded in."""
    state = get_peft_model_state_dict(unet, adapter_name=TAUGHT)
    layers = {}
    for key, down in state.items():
        name, found, _ = key.partition(".lora_A.weight")
        if found:
            up = state[f"{name}.lora_B.weight"]
            layers[f"unet.{name}"] = Layer(
                down.detach().float().cpu().clone(), (up.detach().float() * scale).cpu().clone()
            )
    return layers


def find_module(owner: nn.Module, name: str) -> nn.Module | None:
    """Find the layer that an adapter's name means, in a pipeline's module of that component."""
    try:
        return owner.get_submodule(name)
    except AttributeError:
        # transformers 5 dropped the wrapper that older adapters name.
        try:
            return owner.get_submodule(name.removeprefix("text_model."))
        except AttributeError:
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
    for name, layer in adapter.layers.items():
        component, _, inner = name.partition(".")
        owner = components.get(component)
        module = find_module(owner, inner) if owner is not None else None
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, Tensor) or not _fits(weight, layer):
            missing.append(name)
        else:
            found[name] = module
    if missing:
        raise AdapterError(
            f"The adapter does not fit {base_name}: {len(missing)} of its {len(adapter.layers)} "
            f"layers are missing there or have another shape, such as {missing[0]}.",
            "It was made for another base model; name that one with --base.",
        )
    return found


def _fits(weight: Tensor, layer: Layer) -> bool:
    return weight.shape[0] == layer.up.shape[0] and weight.shape[1:] == layer.down.shape[1:]


@contextmanager
def folded(
    components: Mapping[str, nn.Module], parts: Sequence[tuple[Adapter, float]], base_name: str
) -> Iterator[None]:
    """Add the weighted updates to the layers' weights for a block; then put the weights back.

    The originals are kept and copied back, so the base is restored bit for bit. Drawing costs
    what the base model alone costs.
    """
    placed = [(locate(components, adapter, base_name), adapter, w) for adapter, w in parts]
    kept: dict[nn.Module, Tensor] = {}
    try:
        with torch.no_grad():
            for modules, adapter, weight in placed:
                for name, module in modules.items():
                    target: Tensor = module.weight  # type: ignore[assignment]
                    kept.setdefault(module, target.detach().clone())
                    update = adapter.layers[name].update().to(target.device)
                    target.copy_((target.float() + weight * update).to(target.dtype))
        yield
    finally:
        with torch.no_grad():
            for module, original in kept.items():
                module.weight.copy_(original)  # type: ignore[operator]


def as_state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Name the factors as PEFT does."""
    state: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        state[f"{name}.lora_A.weight"] = layer.down
        state[f"{name}.lora_B.weight"] = layer.up
    return state
