"""Adapter files: safetensors with PEFT's names, as diffusers reads and writes them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamloom.adapters.adapter import Adapter, Layer
from dreamloom.errors import AdapterError
from dreamloom.rundir import atomic_path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COMPONENTS = ("unet", "text_encoder_2", "text_encoder")
_DOWN, _UP, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
# diffusers looks for the configuration of PEFT under this key of the header.
_CONFIG_KEY = "lora_adapter_metadata"


def read_adapter(path: Path) -> Adapter:
    """Read a LoRA file and fold its scales, so that ΔW = up · down for every layer.

    Raises:
        AdapterError: If the file is missing, a pickle, damaged, empty, or of another format; the
            message names the file and what it found.
    """
    _refuse_bad_path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors: {error}.",
            "The file may be cut off; copy or download it again.",
        ) from error
    return Adapter(_fold(path, tensors, _configured_alphas(metadata)), metadata)


def _refuse_bad_path(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{path} is a pickle ({path.suffix}), which can run code when it is opened.",
            "DreamLoom reads .safetensors only; ask its author for that format.",
        )
    if path.is_dir():
        raise AdapterError(f"{path} is a folder.", "Name the .safetensors file in it.")
    if not path.is_file():
        raise AdapterError(f"There is no adapter at {path}.", "Check the path.")


def _configured_alphas(metadata: dict[str, str]) -> dict[str, tuple[float, dict[str, float], bool]]:
    """Read (alpha, alpha by layer, rank-stabilised?) per component from PEFT's configuration."""
    try:
        config = json.loads(metadata.get(_CONFIG_KEY, "{}"))
    except json.JSONDecodeError:
        return {}
    found = {}
    for component in _COMPONENTS:
        alpha = config.get(f"{component}.lora_alpha")
        if alpha is not None:
            pattern = config.get(f"{component}.alpha_pattern") or {}
            found[component] = (float(alpha), pattern, bool(config.get(f"{component}.use_rslora")))
    return found


def _fold(
    path: Path,
    tensors: dict[str, Tensor],
    configured: dict[str, tuple[float, dict[str, float], bool]],
) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    known = set()
    for key in sorted(tensors):
        if not key.endswith(_DOWN):
            continue
        name = key.removesuffix(_DOWN)
        if name + _UP not in tensors or name.split(".")[0] not in _COMPONENTS:
            continue
        down, up = tensors[key].float(), tensors[name + _UP].float()
        scale = _scale(name, down.shape[0], tensors.get(name + _ALPHA), configured)
        layers[name] = Layer(down.contiguous(), (up * scale).contiguous())
        known |= {key, name + _UP, name + _ALPHA}
    unknown = sorted(set(tensors) - known)
    if unknown or not layers:
        shown = ", ".join(unknown[:3]) + (" …" if len(unknown) > 3 else "")
        raise AdapterError(
            f"{path} is not a LoRA in the format of PEFT and diffusers: "
            + (f"{len(unknown)} unknown keys ({shown})." if unknown else "it holds no layer."),
            "Use a file written by DreamLoom or by diffusers' save_lora_weights.",
        )
    return layers


def _scale(
    name: str,
    rank: int,
    alpha_tensor: Tensor | None,
    configured: dict[str, tuple[float, dict[str, float], bool]],
) -> float:
    if alpha_tensor is not None:
        return float(alpha_tensor) / rank
    component, _, inner = name.partition(".")
    if component not in configured:
        return 1.0
    alpha, pattern, rank_stabilised = configured[component]
    chosen = float(pattern.get(inner, alpha))
    return chosen / rank**0.5 if rank_stabilised else chosen / rank


def write_adapter(path: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    """Write a LoRA atomically as safetensors that diffusers, ComfyUI and PEFT users can load.

    The scales are folded into the factors and alpha equals the rank for every layer, in the
    header and for readers that look at no header, so that all of them apply the same ΔW.

    Raises:
        AdapterError: If the name does not end in .safetensors, or a weight is not finite.
    """
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} does not end in .safetensors.", "DreamLoom writes no other format here."
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        if not (torch.isfinite(layer.down).all() and torch.isfinite(layer.up).all()):
            raise AdapterError(f"The update of {name} is not finite.", "Nothing was written.")
        tensors[name + _DOWN] = layer.down.to(dtype).contiguous()
        tensors[name + _UP] = layer.up.to(dtype).contiguous()
    header = {**adapter.metadata, "format": "pt", _CONFIG_KEY: json.dumps(_peft_config(adapter))}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def _peft_config(adapter: Adapter) -> dict[str, object]:
    """Describe the layers as PEFT's LoraConfig; readers take ranks and alphas from it."""
    config: dict[str, object] = {}
    for component in _COMPONENTS:
        ranks = {
            name.removeprefix(component + "."): layer.rank
            for name, layer in adapter.layers.items()
            if name.startswith(component + ".")
        }
        if not ranks:
            continue
        common = Counter(ranks.values()).most_common(1)[0][0]
        special = {name: rank for name, rank in ranks.items() if rank != common}
        config |= {
            f"{component}.peft_type": "LORA",
            f"{component}.r": common,
            f"{component}.lora_alpha": common,
            f"{component}.rank_pattern": special,
            f"{component}.alpha_pattern": special,
            f"{component}.target_modules": sorted(ranks),
            f"{component}.lora_dropout": 0.0,
            f"{component}.bias": "none",
            f"{component}.use_rslora": False,
        }
    return config


def describe_adapter(path: Path) -> dict[str, object]:
    """Summarise an adapter file in plain values: layers, ranks, size, norm, how it was made."""
    adapter = read_adapter(path)
    ranks = Counter(adapter.ranks.values())
    return {
        "file": str(path),
        "layers": len(adapter.layers),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "parameters": adapter.parameters,
        "norm": adapter.norm(),
        "metadata": {k: v for k, v in adapter.metadata.items() if k not in {_CONFIG_KEY, "format"}},
    }
