"""LyCORIS as kohya's programs use it: its own modules around the small base's layers."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clients.small_base import (
    build_components,
    build_tree,
    list_layers,
    probe_change,
    wrap_first_encoder,
)

_DORA = {"dora_wd": True}
CASES: Mapping[str, dict[str, Any]] = {
    "LoCon": {"algo": "lora", "conv_dim": 3, "conv_alpha": 2},
    "LoCon, fp16": {"algo": "lora", "dtype": torch.float16},
    "LoCon, Tucker cores": {"algo": "lora", "use_tucker": True},
    "LoCon, rsLoRA": {"algo": "lora", "rs_lora": True},
    "LoCon, a learned scalar": {"algo": "lora", "use_scalar": True},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker cores": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, both split": {"algo": "lokr", "factor": -1, "decompose_both": True},
    "LoKr, Tucker cores": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "LoKr, both whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "DoRA of outputs": {"algo": "lora", **_DORA},
    "DoRA of inputs": {"algo": "lora", **_DORA, "wd_on_output": False},
    "DoRA of outputs, Tucker cores": {"algo": "lora", **_DORA, "use_tucker": True},
    "DoRA of outputs of a LoHa": {"algo": "loha", **_DORA},
    "DoRA of inputs of a LoHa": {"algo": "loha", **_DORA, "wd_on_output": False},
    "DoRA of outputs of a LoKr": {"algo": "lokr", "factor": 4, **_DORA},
    "DoRA of inputs of a LoKr": {"algo": "lokr", "factor": 4, **_DORA, "wd_on_output": False},
    "DyLoRA": {"algo": "dylora", "block_size": 2},
    "full": {"algo": "full"},
    "IA3": {"algo": "ia3"},
    "GLoRA": {"algo": "glora"},
    "diag-OFT": {"algo": "diag-oft"},
    "diag-OFT, rescaled": {"algo": "diag-oft", "rescaled": True},
    "BOFT": {"algo": "boft", "rank": 6},
    "LoCon with norms": {"algo": "lora", "train_norm": True},
}

REFUSED = {"full", "IA3", "GLoRA", "diag-OFT", "diag-OFT, rescaled", "BOFT", "LoCon with norms"}


def prepare(checkout: Path, weights: Mapping[str, Tensor]) -> SimpleNamespace:
    """Import LyCORIS, of a checkout or as it is installed."""
    if checkout.parts:
        sys.path.insert(0, str(checkout))
    kohya = importlib.import_module("lycoris.kohya")
    # 4.1.3 names `TimestepEmbedding` for another model's sake, and then meets its layers twice.
    full = dict(kohya.PRESET["full"])
    blocks = [kind for kind in full["unet_target_module"] if kind != "TimestepEmbedding"]
    kohya.PRESET["of SDXL"] = {**full, "unet_target_module": blocks}
    kohya.LycorisNetworkKohya.apply_preset(kohya.PRESET["of SDXL"])
    return SimpleNamespace(kohya=kohya, weights=weights)


def apply_file(made: SimpleNamespace, path: Path) -> dict[str, Tensor]:
    """Make the modules of a file; return what their forward pass changes."""
    parts = build_components()
    layers = list_layers(parts)
    of_diffusers = any(key.startswith("lora_unet_down_blocks") for key in load_file(path))
    unet = parts["unet"] if of_diffusers else build_tree(layers)
    texts = [wrap_first_encoder(parts["text_encoder"]), parts["text_encoder_2"]]
    network, _ = made.kohya.create_network_from_weights(1.0, str(path), None, texts, unet)
    biases = {name: layer.bias for name, layer in layers.items()}
    for lora in [*network.unet_loras, *network.text_encoder_loras]:
        lora.org_forward = lora.org_module[0].forward
    return _probe(made, network, layers, biases)


def write_file(made: SimpleNamespace, case: str, file: Path) -> dict[str, Tensor]:
    """Save a network of random factors; return what its forward pass changes."""
    parts = build_components()
    layers = list_layers(parts)
    biases = {name: layer.bias for name, layer in layers.items()}
    texts = [wrap_first_encoder(parts["text_encoder"]), parts["text_encoder_2"]]
    given = {"preset": "of SDXL", "rank": 4, **CASES[case]}
    rank = given.pop("rank")
    dtype = given.pop("dtype", torch.float32)
    torch.manual_seed(13)
    network = made.kohya.create_network(1.0, rank, 3.0, None, texts, parts["unet"], **given)
    network.apply_to(texts, parts["unet"], True, True)
    for name, parameter in network.named_parameters():
        _fill(name, parameter)
        parameter.data = parameter.data.to(dtype).float()
    network.eval()
    network.save_weights(str(file), dtype, {"ss_network_module": "lycoris.kohya"})
    if case.startswith("DyLoRA"):
        return _multiply_blocks(network, layers)
    return _probe(made, network, layers, biases)


def _fill(name: str, parameter: nn.Parameter) -> None:
    """Random factors of moderate size; lengths stay near what they are."""
    if name.endswith("dora_scale"):
        parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
    elif name.endswith(("scalar", "rescale")):
        parameter.data.fill_(0.7)
    else:
        spread = 0.5 / math.sqrt(max(1, parameter.shape[-1] if parameter.ndim else 1))
        parameter.data += spread * torch.randn_like(parameter)


def _multiply_blocks(network: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All blocks of a DyLoRA at its alpha: its forward pass draws their number by chance.

    LyCORIS' own loader stops at its convolutions.
    """
    names = {id(module): name for name, module in layers.items()}
    changes = {}
    for lora in [*network.unet_loras, *network.text_encoder_loras]:
        down, up, _ = lora.get_weight(lora.lora_dim)
        change = up @ down * float(lora.alpha) / lora.lora_dim
        changes[names[id(lora.org_module[0])]] = change.reshape(lora.shape)
    return changes


def _probe(
    made: SimpleNamespace,
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    biases: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    names = {id(module): name for name, module in layers.items()}
    changes = {}
    for lora in [*network.unet_loras, *network.text_encoder_loras]:
        name = names.get(id(lora.org_module[0]))
        # Its modules for normalisation change no layer of ours.
        if name is not None:
            weight = made.weights[name]
            lora.eval()
            changes[name] = probe_change(lora.forward, layers[name], weight, biases[name])
    return changes
