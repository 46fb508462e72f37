"""OneTrainer: its own loader, modules and saver on the small base.

Its model is an empty one that is given the small parts. Packages for other models that are not
installed are stood in for; `parse`, by which it translates names, has to be there.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from clients.small_base import (
    build_components,
    list_layers,
    probe_change,
    wrap_first_encoder,
)
from clients.stand_ins import stand_in_for

_NOT_NEEDED = ("gguf", "mgds", "bitsandbytes", "torchvision", "scalene", "tensorboard")
_PARTS = {"unet": "unet", "text_encoder": "text_encoder_1", "text_encoder_2": "text_encoder_2"}
_DORA = {"lora_decompose": True}
CASES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "LoRA, KOHYA": ("KOHYA_LORA", "LORA", {}),
    "LoRA, LEGACY": ("LEGACY_LORA", "LORA", {}),
    "LoRA, DIFFUSERS": ("DIFFUSERS_LORA", "LORA", {}),
    "LoRA, COMFY": ("COMFY_LORA", "LORA", {}),
    "LoRA of the denoiser, ORIGINAL": ("ORIGINAL_LORA", "LORA", {}),
    "DoRA of inputs, KOHYA": ("KOHYA_LORA", "LORA", {**_DORA}),
    "DoRA of outputs, KOHYA": ("KOHYA_LORA", "LORA", {**_DORA, "lora_decompose_output_axis": True}),
    "LoHa, KOHYA": ("KOHYA_LORA", "LOHA", {}),
    "LoKr, KOHYA": ("KOHYA_LORA", "LOKR", {}),
    "LoKr, both split, Tucker cores, KOHYA": (
        "KOHYA_LORA",
        "LOKR",
        {"lokr_decompose_both": True, "lokr_use_tucker": True},
    ),
    "LoKr, both whole, KOHYA": ("KOHYA_LORA", "LOKR", {"lokr_full_matrix": True}),
    "OFT, KOHYA": ("KOHYA_LORA", "OFT_2", {"oft_block_size": 8}),
}
REFUSED = {"OFT, KOHYA"}


def prepare(checkout: Path, weights: Mapping[str, Tensor]) -> SimpleNamespace:
    """Import its loader and saver."""
    sys.path.insert(0, str(checkout))
    parts = build_components()
    stand_in_for(_NOT_NEEDED)
    at = importlib.import_module
    sdxl = "stableDiffusionXL.StableDiffusionXLLoRA"
    return SimpleNamespace(
        weights=weights,
        parts=parts,
        types=at("modules.util.enum.ModelType"),
        formats=at("modules.util.enum.ModelFormat").ModelFormat,
        config=at("modules.util.config.TrainConfig").TrainConfig,
        model=at("modules.model.StableDiffusionXLModel").StableDiffusionXLModel,
        names=at("modules.util.ModelNames").ModelNames,
        wrapper=at("modules.module.LoRAModule").LoRAModuleWrapper,
        loader=at(f"modules.modelLoader.{sdxl}Loader").StableDiffusionXLLoRALoader,
        saver=at(f"modules.modelSaver.{sdxl}Saver").StableDiffusionXLLoRASaver,
    )


def apply_file(made: SimpleNamespace, path: Path) -> dict[str, Tensor]:
    """Load a file into modules of its rank and kind, and probe their forward pass."""
    model = _make_model(made)
    made.loader().load(model, made.names(lora=str(path)))
    state = model.lora_state_dict
    config = made.config.default_values()
    config.lora_rank = next((t.shape[0] for k, t in state.items() if "lora_down" in k), 4)
    config.lora_decompose = any(key.endswith("dora_scale") for key in state)
    config.train_device = "cpu"
    return _run(made, model, config, state)


def write_file(made: SimpleNamespace, case: str, file: Path) -> dict[str, Tensor]:
    """Save modules of random factors; return what their forward pass changes."""
    format, kind, given = CASES[case]
    model = _make_model(made)
    config = made.config.default_values()
    settings = {"lora_rank": 4, "lora_alpha": 3.0, "lokr_dim": 4, "train_device": "cpu", **given}
    for name, value in {**settings, "peft_type": made.types.PeftType[kind]}.items():
        assert hasattr(config, name), f"OneTrainer has no setting {name}"
        setattr(config, name, value)
    torch.manual_seed(23)
    wanted = ["unet"] if format == "ORIGINAL_LORA" else list(_PARTS)
    changes = _run(made, model, config, None, wanted)
    made.saver().save(model, made.formats[format], str(file), torch.float32)
    return changes


def _make_model(made: SimpleNamespace) -> Any:
    model = made.model(made.types.ModelType.STABLE_DIFFUSION_XL_10_BASE)
    for component, part in copy.deepcopy(made.parts).items():
        setattr(model, _PARTS[component], wrap_first_encoder(part) if "text" in component else part)
    return model


def _run(
    made: SimpleNamespace,
    model: Any,
    config: Any,
    state: Mapping[str, Tensor] | None,
    wanted: list[str] | None = None,
) -> dict[str, Tensor]:
    """Wrap the parts, load or randomise what wraps them, and probe each layer."""
    parts = {component: getattr(model, place) for component, place in _PARTS.items()}
    names = {id(layer): name for name, layer in list_layers(parts).items()}
    changes = {}
    for component in wanted or list(parts):
        if state is not None and not any(key.startswith(f"{component}.") for key in state):
            continue
        wrapper = made.wrapper(parts[component], component, config)
        if state is not None:
            # As with a filter of layers that fits the file: the others would be missing from it.
            inner = {key.removeprefix(f"{component}.") for key in state}
            found = {n: m for n, m in wrapper.lora_modules.items() if _has(inner, n)}
            wrapper.lora_modules = found
        for module in wrapper.lora_modules.values():
            module.initialize_weights()
            if state is None:
                _randomise(module)
        if state is not None:
            wrapper.load_state_dict(dict(state))
        setattr(model, f"{_PARTS[component]}_lora", wrapper)
        for module in wrapper.lora_modules.values():
            layer = getattr(module, "_orig_module", None)
            if not layer:
                continue
            module.hook_to_module()
            module.eval()
            name = names[id(layer[0])]
            weight = made.weights[name]
            changes[name] = probe_change(module.forward, layer[0], weight, layer[0].bias)
    return changes


def _has(keys: set[str], name: str) -> bool:
    return f"{name}.alpha" in keys or f"{name}.lora_down.weight" in keys


def _randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "dora_scale" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        elif parameter.ndim:
            spread = 0.5 / math.sqrt(parameter.shape[-1])
            parameter.data += spread * torch.randn_like(parameter)
