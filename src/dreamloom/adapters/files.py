"""Adapter files: safetensors with PEFT's names, as diffusers reads them, or with kohya's."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamloom.adapters.adapter import (
    KIND_NAMES,
    Adapter,
    AdapterKind,
    Layer,
    PeftState,
    refuse_other_kinds,
)
from dreamloom.adapters.dora import COMPONENTS, DOWN, MAGNITUDE, UP, describe_lora, make_dora
from dreamloom.adapters.headers import sort_header
from dreamloom.adapters.kohya import name_for_kohya, name_from_kohya
from dreamloom.adapters.modelspec import HASH_KEY as MODELSPEC_HASH_KEY
from dreamloom.adapters.modelspec import make_modelspec
from dreamloom.adapters.words import HASH_KEY as WORDS_HASH_KEY
from dreamloom.adapters.words import WORDS_KEY, read_words, write_words
from dreamloom.errors import AdapterError
from dreamloom.rundir import atomic_path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FileFormat = Literal["peft", "kohya"]
"""PEFT's names, as diffusers and ComfyUI read them; or kohya's, as AUTOMATIC1111 does, too."""

_ALPHA = ".alpha"
_KOHYA_DOWN, _KOHYA_UP = ".lora_down.weight", ".lora_up.weight"
_KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_")
_OTHER_KINDS: dict[str, AdapterKind] = {"LOHA": "loha", "LOKR": "lokr", "OFT": "oft"}
# How diffusers itself spells the factors of text encoders, and once spelled those of the U-Net.
_SPELLINGS = {
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    MAGNITUDE + ".weight": MAGNITUDE,
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
    """Read an adapter file, and the file of its new words beside it.

    The scales of a LoRA are folded, so that ΔW = up · down for every layer. Files of other kinds
    are read if PEFT's configuration stands in their header, as in files of DreamLoom.

    Raises:
        AdapterError: If the file is missing, a pickle, damaged, empty, or of another format; the
            message names the file and what it found.
    """
    _refuse_bad_path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            keys = _respell_all(file.keys())
            if len(set(keys.values())) < len(keys):
                raise AdapterError(f"{path} names a layer's factors twice.", "Get the file again.")
            tensors = {key: file.get_tensor(found) for found, key in keys.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors: {error}.",
            "The file may be cut off; copy or download it again.",
        ) from error
    config = _read_config(path, metadata.get(_CONFIG_KEY))
    words = read_words(path, metadata)
    # PEFT's configuration describes the factors before their scales were folded in; the writer
    # enters the others anew.
    made_anew = (_CONFIG_KEY, "format", MODELSPEC_HASH_KEY, WORDS_KEY, WORDS_HASH_KEY)
    story = {name: text for name, text in metadata.items() if name not in made_anew}
    other = _read_other_kind(path, tensors, config)
    if other is not None:
        return Adapter({}, story, words, other)
    layers, magnitudes = _fold(path, tensors, _read_scalings(path, config))
    if magnitudes:
        return Adapter({}, story, words, make_dora(layers, magnitudes))
    return Adapter(layers, story, words)


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


def _respell_all(keys: Iterable[str]) -> dict[str, str]:
    """Spell every key as PEFT does, by the key in the file."""
    found = list(keys)
    if found and all(key.startswith(_KOHYA_PREFIXES) for key in found):
        names = name_from_kohya({key.partition(".")[0] for key in found})
        endings = {_KOHYA_DOWN: DOWN, _KOHYA_UP: UP, _ALPHA: _ALPHA}
        return {key: _translate(key, names, endings) for key in found}
    return {key: _respell(key) for key in found}


def _translate(key: str, names: Mapping[str, str], endings: Mapping[str, str]) -> str:
    name, dot, rest = key.partition(".")
    ending = endings.get(dot + rest)
    return names[name] + ending if ending is not None and name in names else key


def _respell(key: str) -> str:
    for old, new in _SPELLINGS.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _read_config(path: Path, header: str | None) -> dict[str, Any]:
    if header is None:
        return {}
    try:
        return dict(json.loads(header))
    except (ValueError, TypeError) as error:
        raise _explain_config(path, error) from error


def _explain_config(path: Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"The configuration in the header of {path} cannot be read: {error}.",
        "Without it the strength of the adapter is unknown; get the file again.",
    )


def _read_other_kind(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> PeftState | None:
    """Read a LoHa, LoKr or OFT, whose configuration stands in the header."""
    types = {config[f"{c}.peft_type"] for c in COMPONENTS if f"{c}.peft_type" in config}
    kinds = [kind for name, kind in _OTHER_KINDS.items() if name in types]
    if not kinds:
        return None
    configs = {
        component: {
            key.removeprefix(f"{component}."): value
            for key, value in config.items()
            if key.startswith(f"{component}.")
        }
        for component in COMPONENTS
        if f"{component}.peft_type" in config
    }
    listed = all(isinstance(c.get("target_modules"), list) for c in configs.values())
    state = PeftState(kinds[0], tensors, configs) if listed else None
    names = set(state.layer_names) if state is not None else set()
    owners = {key: _owner(key, names) for key in tensors}
    unknown = sorted(key for key, owner in owners.items() if not owner)
    missing = sorted(names - set(owners.values()))
    if len(types) > 1 or state is None or unknown or missing:
        shown = ", ".join([*unknown, *missing][:3])
        raise AdapterError(
            f"The configuration in the header of {path} does not describe its tensors"
            + (f" ({shown})." if shown else "."),
            "Use a file written by DreamLoom.",
        )
    return PeftState(state.kind, {key: t.float() for key, t in tensors.items()}, configs)


def _owner(key: str, names: set[str]) -> str:
    """Find the layer that a tensor belongs to: the key less one or two last parts."""
    once = key.rpartition(".")[0]
    twice = once.rpartition(".")[0]
    return once if once in names else twice if twice in names else ""


def _read_scalings(path: Path, config: Mapping[str, Any]) -> dict[str, _Scaling]:
    """Read how each component is scaled, from PEFT's configuration."""
    try:
        return {
            component: _Scaling(
                float(config[f"{component}.lora_alpha"]),
                _read_pattern(config.get(f"{component}.alpha_pattern")),
                bool(config.get(f"{component}.use_rslora")),
            )
            for component in COMPONENTS
            if config.get(f"{component}.lora_alpha") is not None
        }
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise _explain_config(path, error) from error


def _read_pattern(pattern: Any) -> dict[str, float]:
    return {re.compile(key).pattern: float(alpha) for key, alpha in (pattern or {}).items()}


def _fold(
    path: Path, tensors: dict[str, Tensor], scalings: Mapping[str, _Scaling]
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Fold the scales of a LoRA's or a DoRA's factors; the latter has magnitudes, too."""
    layers: dict[str, Layer] = {}
    known: set[str] = set()
    for key in sorted(tensors):
        name = key.removesuffix(DOWN)
        component, _, inner = name.partition(".")
        if name == key or name + UP not in tensors or component not in COMPONENTS:
            continue
        down, up = tensors[key].float(), tensors[name + UP].float()
        alpha = tensors.get(name + _ALPHA)
        _refuse_other_shapes(path, name, down, up, alpha)
        rank = down.shape[0]
        if alpha is not None:
            scale = float(alpha) / rank
        else:
            scale = scalings[component].of(inner, rank) if component in scalings else 1.0
        layers[name] = Layer(down.contiguous(), (up * scale).contiguous())
        known |= {key, name + UP, name + _ALPHA}
    magnitudes = {
        name: tensors[name + MAGNITUDE].float() for name in layers if name + MAGNITUDE in tensors
    }
    if len(magnitudes) == len(layers):
        known |= {name + MAGNITUDE for name in magnitudes}
    unknown = sorted(set(tensors) - known)
    if unknown or not layers:
        shown = ", ".join(unknown[:3]) + (" …" if len(unknown) > 3 else "")
        raise AdapterError(
            f"{path} is not a LoRA in the format of PEFT and diffusers: "
            + (f"{len(unknown)} unknown keys ({shown})." if unknown else "it holds no layer."),
            "Use a file written by DreamLoom or by diffusers' save_lora_weights.",
        )
    return layers, magnitudes


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


def write_adapter(
    path: Path,
    adapter: Adapter,
    dtype: torch.dtype = torch.float32,
    format: FileFormat = "peft",
) -> None:
    """Write an adapter atomically as safetensors that diffusers, ComfyUI and PEFT users can load.

    The scales of a LoRA are folded into the factors and alpha equals the rank for every layer, in
    the header and for readers that look at no header, so that all of them apply the same ΔW. New
    words go into a file of their own beside it (see `words_file`), since diffusers refuses a LoRA
    file with anything else in it.

    Args:
        path: Ends in .safetensors.
        adapter: What to write.
        dtype: The precision of the tensors; new words are always float32.
        format: ``kohya`` names the layers as kohya-ss does, for ComfyUI and AUTOMATIC1111, and
            describes the file by ModelSpec; only for LoRAs of bases with SDXL's own blocks.

    Raises:
        AdapterError: If the name does not end in .safetensors, there is no layer, a weight is
            not finite in ``dtype``, or the format cannot hold the adapter.
    """
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} does not end in .safetensors.", "DreamLoom writes no other format here."
        )
    if not adapter.layer_names:
        raise AdapterError(f"There is no layer to write to {path}.", "Nothing was written.")
    tensors, story = _name_for_kohya(adapter) if format == "kohya" else _name_for_peft(adapter)
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"The update of {_layer_of(key)} is not finite.", "Nothing was written."
            )
    header = {**adapter.metadata, **story, "format": "pt", **write_words(path, adapter.tokens)}
    if format == "kohya":
        header = {**make_modelspec(header), **header}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        described = any(key.startswith("modelspec.") for key in header)
        sort_header(temporary, MODELSPEC_HASH_KEY if described else "")


def _layer_of(key: str) -> str:
    return re.sub(r"\.(lora_|hada_|lokr_|oft_).*", "", key)


def _name_for_peft(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    if adapter.peft is None:
        tensors = {name + DOWN: layer.down for name, layer in adapter.layers.items()}
        tensors |= {name + UP: layer.up for name, layer in adapter.layers.items()}
        configs = describe_lora(adapter.ranks)
    else:
        tensors = {_spell_magnitude(key): t for key, t in adapter.peft.tensors.items()}
        configs = {component: dict(config) for component, config in adapter.peft.configs.items()}
    flat = {f"{c}.{key}": value for c, config in configs.items() for key, value in config.items()}
    return tensors, {_CONFIG_KEY: json.dumps(flat)}


def _spell_magnitude(key: str) -> str:
    """Name a DoRA's magnitude as its reader wants it.

    diffusers gives the text encoders' to transformers, which leaves out in silence what has not
    the parameter's full name; the denoiser's go to PEFT, which wants the short one.
    """
    is_text = key.startswith("text_encoder") and key.endswith(MAGNITUDE)
    return f"{key}.weight" if is_text else key


def _name_for_kohya(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    refuse_other_kinds(adapter, "The adapter", "can be written in the format kohya")
    names = name_for_kohya(adapter.layers, adapter.metadata)
    # diffusers reads alphas that differ from layer to layer as patterns of names' ends, which may
    # mean other layers, too. One alpha for all is safe: the factors take up the difference.
    alpha = max(adapter.ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        tensors |= {
            names[name] + _KOHYA_DOWN: layer.down,
            names[name] + _KOHYA_UP: layer.up * (layer.rank / alpha),
            names[name] + _ALPHA: torch.tensor(float(alpha)),
        }
    return tensors, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(alpha),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sdxl_base_v1-0",
    }


def describe_adapter(path: Path) -> dict[str, object]:
    """Summarise an adapter file in plain values: layers, ranks, size, norm, how it was made.

    Other kinds than LoRA have no ranks and no norm (None), since these depend on the base.
    """
    adapter = read_adapter(path)
    ranks = Counter(adapter.ranks.values())
    summary: dict[str, object] = {
        "file": str(path),
        "layers": len(adapter.layer_names),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "parameters": adapter.parameters,
        "norm": adapter.norm() if adapter.peft is None else None,
        "metadata": dict(adapter.metadata),
    }
    if adapter.peft is not None:
        summary["kind"] = KIND_NAMES[adapter.kind]
    if adapter.tokens:
        summary["words"] = list(adapter.tokens)
    return summary
