"""Adapter files: safetensors with PEFT's names, as diffusers reads and writes them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
# How diffusers itself spells the factors of text encoders, and once spelled those of the U-Net.
_SPELLINGS = {
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
    ".lora.down.weight": _DOWN,
    ".lora.up.weight": _UP,
}
# diffusers looks for the configuration of PEFT under this key of the header.
_CONFIG_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class _Scaling:
    """How PEFT's configuration of one component scales its layers."""

    alpha: float
    alpha_by_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def of(self, layer: str, rank: int) -> float:
        # PEFT's rule: the first pattern that matches the name, or its end after a dot, counts.
        matching = (p for p in self.alpha_by_pattern if re.match(rf"(.*\.)?({p})$", layer))
        alpha = self.alpha_by_pattern.get(next(matching, layer), self.alpha)
        return alpha / rank**0.5 if self.rank_stabilised else alpha / rank


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
            keys = {_respell(key): key for key in file.keys()}  # noqa: SIM118
            if len(keys) < len(file.keys()):
                raise AdapterError(f"{path} names a layer's factors twice.", "Get the file again.")
            tensors = {key: file.get_tensor(found) for key, found in keys.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors: {error}.",
            "The file may be cut off; copy or download it again.",
        ) from error
    layers = _fold(path, tensors, _read_scalings(path, metadata.get(_CONFIG_KEY)))
    # PEFT's configuration describes the factors before their scales were folded in.
    return Adapter(layers, {k: v for k, v in metadata.items() if k not in (_CONFIG_KEY, "format")})


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


def _respell(key: str) -> str:
    for old, new in _SPELLINGS.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _read_scalings(path: Path, header: str | None) -> dict[str, _Scaling]:
    """Read how each component is scaled, from PEFT's configuration."""
    if header is None:
        return {}
    try:
        config = dict(json.loads(header))
        return {
            component: _Scaling(
                float(config[f"{component}.lora_alpha"]),
                _read_pattern(config.get(f"{component}.alpha_pattern")),
                bool(config.get(f"{component}.use_rslora")),
            )
            for component in _COMPONENTS
            if config.get(f"{component}.lora_alpha") is not None
        }
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise AdapterError(
            f"The configuration in the header of {path} cannot be read: {error}.",
            "Without it the strength of the adapter is unknown; get the file again.",
        ) from error


def _read_pattern(pattern: Any) -> dict[str, float]:
    return {re.compile(key).pattern: float(alpha) for key, alpha in (pattern or {}).items()}


def _fold(
    path: Path, tensors: dict[str, Tensor], scalings: Mapping[str, _Scaling]
) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    known: set[str] = set()
    for key in sorted(tensors):
        name = key.removesuffix(_DOWN)
        component, _, inner = name.partition(".")
        if name == key or name + _UP not in tensors or component not in _COMPONENTS:
            continue
        down, up = tensors[key].float(), tensors[name + _UP].float()
        alpha = tensors.get(name + _ALPHA)
        _refuse_other_shapes(path, name, down, up, alpha)
        rank = down.shape[0]
        if alpha is not None:
            scale = float(alpha) / rank
        else:
            scale = scalings[component].of(inner, rank) if component in scalings else 1.0
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


def _refuse_other_shapes(
    path: Path, name: str, down: Tensor, up: Tensor, alpha: Tensor | None
) -> None:
    fits = (
        down.ndim >= 2
        and down.shape[0] > 0
        and up.ndim == down.ndim
        and up.shape[1] == down.shape[0]
        and all(side == 1 for side in up.shape[2:])
        and (alpha is None or alpha.numel() == 1)
    )
    if not fits:
        raise AdapterError(
            f"The factors of {name} in {path} do not fit together: down is {tuple(down.shape)}, "
            f"up is {tuple(up.shape)}.",
            "The file may be damaged; get it again.",
        )


def write_adapter(path: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    """Write a LoRA atomically as safetensors that diffusers, ComfyUI and PEFT users can load.

    The scales are folded into the factors and alpha equals the rank for every layer, in the
    header and for readers that look at no header, so that all of them apply the same ΔW.

    Raises:
        AdapterError: If the name does not end in .safetensors, there is no layer, or a weight is
            not finite in ``dtype``.
    """
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} does not end in .safetensors.", "DreamLoom writes no other format here."
        )
    if not adapter.layers:
        raise AdapterError(f"There is no layer to write to {path}.", "Nothing was written.")
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        down, up = layer.down.to(dtype).contiguous(), layer.up.to(dtype).contiguous()
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise AdapterError(f"The update of {name} is not finite.", "Nothing was written.")
        tensors |= {name + _DOWN: down, name + _UP: up}
    header = {**adapter.metadata, "format": "pt", _CONFIG_KEY: json.dumps(_peft_config(adapter))}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        _sort_header(temporary)


def _sort_header(path: Path) -> None:
    """Put the header's entries in order, so that equal adapters are equal files.

    safetensors writes the entries of the metadata in an order of chance. The header keeps its
    length, since only the order changes; the tensors' offsets count from its end.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust((len(text) + 7) // 8 * 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + length :])


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
        counts = Counter(ranks.values())
        common = max(counts, key=lambda rank: (counts[rank], rank))
        # PEFT reads these names as patterns of names' ends; "^" ties each to its own layer.
        special = {
            f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != common
        }
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
        "metadata": dict(adapter.metadata),
    }
