"""Read PEFT's folders: ``adapter_model.safetensors`` beside ``adapter_config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.core.run_folder import file_sha256, fingerprint
from dreamloom.lora.key_names import LayerNames, split_key
from dreamloom.lora.peftconfig import OTHER_KINDS
from dreamloom.lora.sdxl_layers import COMPONENTS
from dreamloom.lora.tensors import open_tensors, refuse_pickles

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_CLASSES = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
# How many numbers SDXL's text encoders hold a token: it tells layers of one name apart.
_TEXT_WIDTHS = {768: "text_encoder", 1280: "text_encoder_2"}
_TEXT_INPUTS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")
# What a configuration says of where it was made, and not of what it is.
_LEFT_OUT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type"),
    "peft_version",
}

FolderContent = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]
"""Tensors by component and name, and PEFT's configuration of each component."""


def read_peft_folder(path: Path, names: LayerNames) -> FolderContent:
    """Read a folder of PEFT, or one that holds such folders by the component's name.

    Returns:
        The tensors, named as in one file for all components, and the configurations.

    Raises:
        AdapterError: If it is no such folder, or its component cannot be told.
    """
    folders = {part: path / part for part in COMPONENTS if (path / part / CONFIG).is_file()}
    if (path / CONFIG).is_file():
        return _read_one(path, names, "")
    if not folders:
        raise AdapterError(
            f"{path} is a folder without {CONFIG}.",
            "Name the .safetensors file in it, or a folder as PEFT saves it.",
        )
    tensors: dict[str, Tensor] = {}
    configs: dict[str, dict[str, Any]] = {}
    for component, folder in folders.items():
        found, config = _read_one(folder, names, component)
        tensors |= found
        configs |= config
    return tensors, configs


def hash_adapter(path: Path) -> str:
    """Hash what an adapter is read from: one file, or PEFT's folder with its configuration."""
    folder = path.parent if path.name == WEIGHTS and path.with_name(CONFIG).is_file() else path
    if not folder.is_dir():
        return file_sha256(path)
    files = sorted(file for name in (WEIGHTS, CONFIG) for file in folder.rglob(name))
    return fingerprint({str(file.relative_to(folder)): file_sha256(file) for file in files})


def _read_one(folder: Path, names: LayerNames, component: str) -> FolderContent:
    file = folder / CONFIG
    try:
        found_config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"{file} cannot be read: {error}.",
            "Without it the strength of the adapter is unknown; get the folder again.",
        ) from error
    config = {k: v for k, v in found_config.items() if k not in _LEFT_OUT and v is not None}
    mapping = found_config.get("auto_mapping")
    model = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    named = _CLASSES.get(model, "")
    weights = folder / WEIGHTS
    if not weights.is_file():
        for pickle in sorted(folder.glob("adapter_model.*")):
            refuse_pickles(pickle)
        raise AdapterError(f"{folder} holds no {WEIGHTS}.", "Save the adapter with PEFT again.")
    found, _ = open_tensors(weights)
    # PEFT writes this before the names of a model that it wraps.
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in found.items()}
    component = component or _choose_component(folder, tensors, named, names)
    if config.get("peft_type") in OTHER_KINDS:
        # PEFT's list may hold ends of names; what there is, the tensors tell.
        owners = {key.rpartition(".")[0].removesuffix(".oft_R") for key in tensors}
        config["target_modules"] = sorted(owners)
    return {f"{component}.{key}": tensor for key, tensor in tensors.items()}, {component: config}


def _choose_component(
    folder: Path, tensors: Mapping[str, Tensor], named: str, names: LayerNames
) -> str:
    """Find the component that has all of the layers; where two have, look at what else is known."""
    owners = {owner for owner, _ in filter(None, map(split_key, tensors))}
    owners |= {key.rpartition(".")[0] for key in tensors if split_key(key) is None}
    candidates = names.find_component(owners)
    if named in candidates or (named and not candidates):
        return named
    if len(candidates) == 1:
        return candidates[0]
    if len(candidates) > 1:
        # Only layers that read a text encoder's own width tell it apart.
        widths = {
            _TEXT_WIDTHS.get(tensor.shape[-1])
            for key, tensor in tensors.items()
            for owner, part in [split_key(key) or ("", "")]
            if owner.endswith(_TEXT_INPUTS) and part in ("down", "hada_w1_b")
        }
        known = [component for component in candidates if widths == {component}]
        if known:
            return known[0]
        raise AdapterError(
            f"The layers in {folder} may belong to {' or to '.join(candidates)}.",
            "Put the folder into one of that name, and name the folder above.",
        )
    example = min(owners, default="nothing")
    raise AdapterError(
        f"No part of SDXL has the layers in {folder}, such as {example}.",
        "If it was made for a base with other blocks, put it into a folder named "
        f"{', '.join(COMPONENTS)}, and name the folder above.",
    )
