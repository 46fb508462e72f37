"""PEFT: its own loader of what a file's header and tensors say, and its folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from clients.small_base import build_components
from dreamloom.lora.sdxl_layers import respell_text

_LAYERS = {
    "unet": r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|ff\.net\.2)",
    "text_encoder": r".*\.(q_proj|k_proj|v_proj|out_proj|fc1)",
    "text_encoder_2": r".*\.(q_proj|k_proj|v_proj|out_proj|fc2)",
}
_PLAIN = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", _PLAIN),
    "LoRA, patterns, rsLoRA": (
        "LoraConfig",
        {**_PLAIN, "use_rslora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 3}},
    ),
    "DoRA": ("LoraConfig", {**_PLAIN, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 2, "init_weights": False}),
    "LoKr": ("LoKrConfig", {"r": 3, "alpha": 2, "init_weights": False}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8, "init_weights": False}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, "init_weights": False}),
    "IA3": ("IA3Config", {"feedforward_modules": [], "init_ia3_weights": False}),
    "VeRA": ("VeraConfig", {"r": 4, "init_weights": False}),
    "LoRA with biases": ("LoraConfig", {**_PLAIN, "lora_bias": True}),
    "LoRA, the base's biases": ("LoraConfig", {**_PLAIN, "bias": "lora_only"}),
    "LoRA, whole modules": ("LoraConfig", {**_PLAIN, "modules_to_save": ["conv_in", "fc2"]}),
    "LoRA, PiSSA": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
}

REFUSED = {
    *("BOFT", "IA3", "VeRA", "LoRA, PiSSA"),
    *("LoRA with biases", "LoRA, the base's biases", "LoRA, whole modules"),
}


def prepare(checkout: Path, weights: Mapping[str, Tensor]) -> SimpleNamespace:
    """Nothing to find: PEFT is installed."""
    return SimpleNamespace(weights=weights, parts=build_components())


def apply_file(made: SimpleNamespace, path: Path) -> dict[str, Tensor]:
    """Inject what the header describes, load the tensors, and merge each layer."""
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {})["lora_adapter_metadata"])
    tensors = load_file(path)
    changes = {}
    for component, part in copy.deepcopy(made.parts).items():
        given = _take(header, component)
        if not given:
            continue
        kind = given.pop("peft_type", "LORA")
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**given)
        model = inject_adapter_in_model(config, part)
        own = {_bare(component, key): t for key, t in _take(tensors, component).items()}
        set_peft_model_state_dict(model, own)
        changes |= _merge_each(component, model)
    return changes


def write_file(made: SimpleNamespace, case: str, file: Path) -> dict[str, Tensor]:
    """Save folders of random factors as PEFT does, in one by the component's name each."""
    kind, given = CASES[case]
    torch.manual_seed(19)
    folder = file.with_suffix("")
    changes: dict[str, Tensor] = {}
    for component, part in copy.deepcopy(made.parts).items():
        config = getattr(peft, kind)(**given, target_modules=_LAYERS[component])
        model = peft.get_peft_model(part, config)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
            elif "lora_" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(folder / component))
        # What no file of ours can hold is refused, and need not be measured.
        if kind not in ("VeraConfig", "IA3Config", "BOFTConfig") and "lora_bias" not in given:
            changes |= _merge_each(component, model.get_base_model())
    return changes


def _merge_each(component: str, model: torch.nn.Module) -> dict[str, Tensor]:
    changes = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            before = module.get_base_layer().weight.detach().clone()
            module.merge()
            after = module.get_base_layer().weight.detach()
            changes[respell_text(f"{component}.{name}")] = after - before
    return changes


def _take(named: Mapping[str, Any], component: str) -> dict[str, Any]:
    return {
        key.removeprefix(f"{component}."): value
        for key, value in named.items()
        if key.startswith(f"{component}.")
    }


def _bare(component: str, key: str) -> str:
    """Take off the wrapper of the first text encoder, which transformers 5 has not."""
    return key.removeprefix("text_model.") if component == "text_encoder" else key
