"""diffusers: its loader of adapters on the small base, and the files that its code writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.utils import (
    convert_all_state_dict_to_peft,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
)
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from clients.small_base import COMPONENTS, build_components, list_layers
from dreamloom.lora.sdxl_layers import respell_text

_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.2"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj", "fc2"],
}
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "save_lora_weights": ("diffusers", {}),
    "save_lora_weights, alpha, patterns, rsLoRA": (
        "diffusers",
        {"lora_alpha": 6, "use_rslora": True, "rank_pattern": {"to_k": 2, "conv1": 3}},
    ),
    "save_lora_weights, DoRA": ("diffusers", {"use_dora": True}),
    "save_lora_weights, biases": ("diffusers", {"lora_bias": True}),
    "convert_state_dict_to_kohya": ("kohya", {}),
    "convert_state_dict_to_kohya, DoRA": ("kohya", {"use_dora": True}),
}

REFUSED = {"save_lora_weights, biases"}


def prepare(checkout: Path, weights: Mapping[str, Tensor]) -> SimpleNamespace:
    """Nothing to find: diffusers is installed."""
    return SimpleNamespace(weights=weights, parts=build_components())


def apply_file(made: SimpleNamespace, path: Path) -> dict[str, Tensor]:
    """Load a file into a pipeline and fuse it."""
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
        **copy.deepcopy(made.parts),
    )
    pipeline.load_lora_weights(str(path))
    parts = {component: getattr(pipeline, component) for component in COMPONENTS}
    tuned = [c for c, part in parts.items() if any(_is_tuner(m) for m in part.modules())]
    pipeline.fuse_lora(components=tuned)
    pipeline.unload_lora_weights()
    layers = list_layers(parts)
    return {name: layer.weight.detach() - made.weights[name] for name, layer in layers.items()}


def write_file(made: SimpleNamespace, case: str, file: Path) -> dict[str, Tensor]:
    """Save adapters of random factors; return what their forward pass would be merged to."""
    kind, given = CASES[case]
    torch.manual_seed(17)
    states: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    changes = {}
    for component, part in copy.deepcopy(made.parts).items():
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 4, "target_modules": _TARGETS[component], **given},
            init_lora_weights=False,
        )
        part.add_adapter(config)
        configs[component] = part.peft_config["default"]
        for name, module in part.named_modules():
            # A LoRA with biases cannot be merged, and is no adapter of ours.
            if _is_tuner(module) and "lora_bias" not in given:
                before = module.get_base_layer().weight.detach().clone()
                _randomise(module)
                module.merge()
                merged = module.get_base_layer().weight.detach()
                changes[respell_text(f"{component}.{name}")] = merged - before
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
        states[component] = {key: tensor.contiguous() for key, tensor in state.items()}
    _save(kind, states, configs, file)
    return changes


def _save(
    kind: str, states: Mapping[str, dict[str, Tensor]], configs: Mapping[str, Any], file: Path
) -> None:
    StableDiffusionXLPipeline.save_lora_weights(
        file.parent,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        text_encoder_2_lora_layers=states["text_encoder_2"],
        weight_name=file.name,
        unet_lora_adapter_metadata=configs["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
        text_encoder_2_lora_adapter_metadata=configs["text_encoder_2"].to_dict(),
    )
    if kind == "kohya":
        # As its scripts do with --output_kohya_format.
        of_peft = convert_all_state_dict_to_peft(load_file(file))
        save_file(convert_state_dict_to_kohya(of_peft), file)


def _is_tuner(module: torch.nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer)


def _randomise(module: BaseTunerLayer) -> None:
    for name, parameter in module.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        elif "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
