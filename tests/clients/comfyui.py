"""ComfyUI's own loader, on the small base.

What it does with an adapter stands in `comfy.lora`, `comfy.lora_convert` and `comfy.weight_adapter`
and is run as it is. Memory management, command line and model classes are stood in for: a loader
asks the first for a device, and the last for names only.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from safetensors.torch import load_file
from torch import Tensor

from clients.stand_ins import stand_in_for
from dreamloom.lora.sdxl_layers import sdxl_layers

_NOT_NEEDED = (
    *("comfy_aimdo", "comfy_kitchen", "comfy_execution", "comfy_compatibility", "comfy_api"),
    *("opentelemetry", "torchsde", "torchaudio", "torchvision", "configargparse", "av"),
)
# As `comfy.supported_models.SDXL` finds them in a checkpoint.
_UNET = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}


def prepare(checkout: Path, weights: Mapping[str, Tensor]) -> SimpleNamespace:
    """Import ComfyUI's modules and make its map from a file's names to the model's."""
    stand_in_for(_NOT_NEEDED)
    package = types.ModuleType("comfy")
    package.__path__ = [str(checkout / "comfy")]
    sys.modules["comfy"] = package
    memory = MagicMock(name="comfy.model_management")
    memory.cast_to_device = lambda tensor, device, dtype, copy=False: tensor.to(device, dtype)
    for name, module in {
        "model_management": memory,
        "model_base": _AnyClass("comfy.model_base"),
        "cli_args": MagicMock(name="comfy.cli_args"),
    }.items():
        sys.modules[f"comfy.{name}"] = module
        setattr(package, name, module)
    lora = importlib.import_module("comfy.lora")
    convert = importlib.import_module("comfy.lora_convert")
    names = {_name_as_comfyui(name): name for name in sdxl_layers()}
    model = SimpleNamespace(
        state_dict=lambda: dict.fromkeys(names), model_config=SimpleNamespace(unet_config=_UNET)
    )
    keys = lora.model_lora_keys_unet(model, {})
    keys = lora.model_lora_keys_clip(model, keys)
    return SimpleNamespace(lora=lora, convert=convert, keys=keys, names=names, weights=weights)


def apply_file(program: SimpleNamespace, path: Path) -> dict[str, Tensor]:
    """Load a file and patch the weights; return what that changed."""
    tensors = program.convert.convert_lora(load_file(path))
    patches = program.lora.load_lora(tensors, program.keys)
    changes = {}
    for key, patch in patches.items():
        name = program.names.get(key)
        if name is None:
            continue
        before = program.weights[name]
        after = program.lora.calculate_weight([(1.0, patch, 1.0, None, None)], before.clone(), key)
        changes[name] = after - before
    return changes


def _name_as_comfyui(name: str) -> str:
    component, _, inner = name.partition(".")
    if component == "unet":
        return f"diffusion_model.{sdxl_layers()[name].stability}.weight"
    clip = "clip_l" if component == "text_encoder" else "clip_g"
    inner = inner if inner.startswith("text_") else f"text_model.{inner}"
    return f"{clip}.transformer.{inner}.weight"


class _AnyClass(types.ModuleType):
    """A module that has every class that is asked for, of which nothing is an instance."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made
