"""kohya's sd-scripts: its own SDXL, networks and merging.

The denoiser is its own class, built without weights and given the small base's. `train_util`, the
whole trainer of which only a file's hashes are wanted, and packages that are not installed are
stood in for.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from clients.small_base import (
    build_components,
    list_layers,
    probe_change,
    shrink_layers,
    wrap_first_encoder,
)
from clients.stand_ins import stand_in_for
from dreamloom.lora.sdxl_layers import sdxl_layers

_NOT_NEEDED = ("torchvision", "imagesize", "voluptuous", "toml", "cv2", "open_clip", "rich")

CASES: Mapping[str, tuple[str, torch.dtype, dict[str, str]]] = {
    "LoRA": ("lora", torch.float32, {}),
    "LoRA with convolutions": ("lora", torch.float32, {"conv_dim": "3", "conv_alpha": "2"}),
    "LoRA, fp16": ("lora", torch.float16, {"conv_dim": "3"}),
    "LoRA, bf16": ("lora", torch.bfloat16, {}),
    "LoRA, ranks by block": (
        "lora",
        torch.float32,
        {
            "block_dims": ",".join(str(1 + number % 4) for number in range(23)),
            "block_alphas": ",".join(str(1 + number % 3) for number in range(23)),
        },
    ),
    "LoRA-FA": ("lora_fa", torch.float32, {}),
    "OFT": ("oft", torch.float32, {}),
}

REFUSED = {"OFT"}


def prepare(checkout: Path, weights: Mapping[str, Tensor]) -> SimpleNamespace:
    """Import its networks and build its denoiser with the small base's weights."""
    sys.path[:0] = [str(checkout), str(checkout / "networks")]
    stand_in_for(_NOT_NEEDED)
    trainer = MagicMock(name="library.train_util")
    trainer.precalculate_safetensors_hashes.return_value = ("", "")
    trainer.load_metadata_from_safetensors.return_value = {}
    importlib.import_module("library").train_util = trainer  # type: ignore[attr-defined]
    sys.modules["library.train_util"] = trainer
    unet_module = importlib.import_module("library.sdxl_original_unet")
    with torch.device("meta"):
        unet = unet_module.SdxlUNet2DConditionModel()
    parts = build_components()
    layers = list_layers(parts)
    for name, layer in sdxl_layers().items():
        if layer.stability:
            layers[name] = unet.get_submodule(layer.stability)
    shrink_layers(layers, weights)
    texts = [wrap_first_encoder(parts["text_encoder"]), parts["text_encoder_2"]]
    return SimpleNamespace(unet=unet, texts=texts, layers=layers, weights=weights)


def apply_file(made: SimpleNamespace, path: Path) -> dict[str, Tensor]:
    """Merge a file through `networks.lora`, as its generating script does."""
    lora = importlib.import_module("networks.lora")
    network, state = lora.create_network_from_weights(
        1.0, str(path), None, made.texts, made.unet, for_inference=True
    )
    network.merge_to(made.texts, made.unet, state, torch.float32, "cpu")
    return take_changes(made)


def take_changes(made: SimpleNamespace) -> dict[str, Tensor]:
    """Say what a program has changed, and put the weights back."""
    changes = {name: m.weight.detach() - made.weights[name] for name, m in made.layers.items()}
    for name, module in made.layers.items():
        module.weight = nn.Parameter(made.weights[name].clone(), requires_grad=False)
    return changes


def write_file(made: SimpleNamespace, case: str, file: Path) -> dict[str, Tensor]:
    """Save a network of random factors; return what its forward pass changes."""
    kind, dtype, given = CASES[case]
    torch.manual_seed(11)
    library = importlib.import_module(f"networks.{kind}")
    network = library.create_network(1.0, 4, 3.0, None, made.texts, made.unet, **given)
    loras = network.unet_ofts if kind == "oft" else network.text_encoder_loras + network.unet_loras
    names = {id(module): name for name, module in made.layers.items()}
    owners = [(lora, _find_owner(lora, names)) for lora in loras]
    forwards = {name: module.forward for name, module in made.layers.items()}
    network.apply_to(made.texts, made.unet)
    changes = {}
    for lora, name in owners:
        for parameter in lora.parameters():
            scale = 0.3 / math.sqrt(max(1, parameter[0].numel()))
            parameter.data = (scale * torch.randn_like(parameter)).to(dtype).float()
        layer = made.layers[name]
        changes[name] = probe_change(lora.forward, layer, made.weights[name], layer.bias)
    network.save_weights(str(file), dtype, {"ss_network_module": f"networks.{kind}"})
    for name, module in made.layers.items():
        module.forward = forwards[name]
    return changes


def _find_owner(lora: nn.Module, names: Mapping[int, str]) -> str:
    module = lora.org_module
    return names[id(module[0] if isinstance(module, list) else module)]
