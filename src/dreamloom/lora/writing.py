"""Write LoRA files for diffusers, PEFT, kohya, ComfyUI and AUTOMATIC1111."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.core.run_folder import TEMPORARY, explain_write_errors
from dreamloom.lora.adapter import KIND_NAMES, Adapter
from dreamloom.lora.base_names import BASE_KEY, publish_base
from dreamloom.lora.conversion import scale_as_lycoris
from dreamloom.lora.key_names import LAYOUT_KEY, name_for_kohya, name_for_kohya_diffusers
from dreamloom.lora.modelspec import HASH_KEY, TENSOR_HASH_KEY, make_modelspec
from dreamloom.lora.peftconfig import CONFIG_KEY, DOWN, MAGNITUDE, UP, describe_lora, layers_of_dora
from dreamloom.lora.reading import NAMES_KEY
from dreamloom.lora.sdxl_layers import respell_text, sdxl_layers
from dreamloom.lora.tensors import save_tensors
from dreamloom.lora.token_embeddings import (
    list_token_files,
    tokens_folder,
    write_token_embeddings,
)

FileFormat = Literal["auto", "peft", "kohya", "kohya-diffusers"]
"""Whose names a file uses: kohya's, which every program reads that is for SDXL; or PEFT's, which
diffusers and PEFT read; or kohya's with diffusers' names of blocks, for any base. ``auto`` is the
first of them that can hold the adapter. ComfyUI knows no layer of attention by PEFT's names."""


def choose_format(adapter: Adapter) -> FileFormat:
    """Choose the names that most programs read: kohya's, where they can hold the adapter."""
    if not _is_held_by_kohya(adapter):
        return "peft"
    if has_sdxl_blocks(adapter):
        return "kohya"
    # PEFT knows no DoRA of inputs.
    return "kohya-diffusers" if adapter.kind == "dora" else "peft"


def has_sdxl_blocks(adapter: Adapter) -> bool:
    """Say whether every layer is one of the published SDXL's, as far as the adapter tells."""
    unlisted = {*map(respell_text, adapter.layer_names)} - set(sdxl_layers())
    return not unlisted and adapter.metadata.get(LAYOUT_KEY, "sdxl") == "sdxl"


def refuse_format(names: Iterable[str], metadata: Mapping[str, str], format: FileFormat) -> None:
    """Refuse a format that has no names for a LoRA's layers, before the LoRA is made.

    Raises:
        AdapterError: As `write_adapter` would.
    """
    if format == "kohya":
        name_for_kohya(names, metadata)
    elif format == "kohya-diffusers":
        name_for_kohya_diffusers(names)


def _is_held_by_kohya(adapter: Adapter) -> bool:
    """Say whether programs with kohya's names compute this kind right.

    Of a DoRA that scales outputs they divide by other lengths than PEFT, and OFT they cut into
    blocks otherwise.
    """
    state = adapter.peft
    scales_inputs = state is not None and state.dora_axis == "inputs"
    return adapter.kind in ("lora", "loha", "lokr") or scales_inputs


def write_adapter(
    path: Path, adapter: Adapter, dtype: torch.dtype = torch.float32, format: FileFormat = "peft"
) -> None:
    """Write an adapter atomically as safetensors that other programs can load.

    The scales of a LoRA are folded into the factors and alpha equals the rank for every layer, in
    the header and for readers that look at no header, so that all of them apply the same ΔW. New
    words go into files of their own beside it (see `write_token_embeddings`), since diffusers
    refuses a LoRA file with anything else in it.

    Args:
        path: Ends in .safetensors.
        adapter: What to write.
        dtype: The precision of the tensors; new words are always float32.
        format: See `FileFormat`. Files with kohya's names hold LoRAs, LoHas and LoKrs (these as
            LyCORIS names them) and DoRAs that scale inputs; ``kohya`` is for bases with SDXL's own
            blocks. Those with PEFT's names hold all but the last.

    Raises:
        AdapterError: If the name does not end in .safetensors, there is no layer, a weight is
            not finite in ``dtype``, or the format cannot hold the adapter.
        RunFolderError: If the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} does not end in .safetensors.", "DreamLoom writes no other format here."
        )
    if not adapter.layer_names:
        raise AdapterError(f"There is no layer to write to {path}.", "Nothing was written.")
    if format == "auto":
        format = choose_format(adapter)
    if format == "peft":
        tensors, metadata = _name_for_peft(path, adapter)
    else:
        tensors, metadata = _name_for_kohya(adapter, format)
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            layer = re.sub(r"\.(lora_|hada_|lokr_|oft_).*", "", key)
            raise AdapterError(f"The update of {layer} is not finite.", "Nothing was written.")
    header = {**adapter.metadata, **metadata, "format": "pt"}
    if BASE_KEY in header:
        header[BASE_KEY] = publish_base(header[BASE_KEY])
    if not adapter.tokens:
        _write_layers(path, tensors, header, format)
        return
    # Files that belong together appear together, or not at all.
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as workplace:
            fresh = Path(workplace) / path.name
            words = write_token_embeddings(fresh, adapter.tokens)
            _write_layers(fresh, tensors, header | words, format)
            move_adapter(fresh, path)


def move_adapter(fresh: Path, path: Path) -> None:
    """Put an adapter that was written elsewhere in its place, its new words first."""
    for file in list_token_files(fresh):
        place = tokens_folder(path) / file.name
        place.parent.mkdir(exist_ok=True)
        file.replace(place)
    fresh.replace(path)


def _write_layers(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], format: FileFormat
) -> None:
    if format != "peft":
        # AUTOMATIC1111 calls an adapter by this name; every training's file is called the same.
        name = path.stem if path.stem != "adapter" else header.get("dreamloom.subject", path.stem)
        header = {**make_modelspec(header), "ss_output_name": name, **header}
    described = any(key.startswith("modelspec.") for key in header)
    save_tensors(path, tensors, header, (HASH_KEY, TENSOR_HASH_KEY) if described else ())


def _name_for_peft(path: Path, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    if adapter.peft is not None and adapter.peft.dora_axis == "inputs":
        raise AdapterError(
            f"{path} would hold a DoRA that scales inputs, which PEFT and diffusers do not know.",
            "Write the format kohya, for ComfyUI, AUTOMATIC1111 and OneTrainer; or the nearest "
            "LoRA: dreamloom convert FILE --rank 32 --base BASE.",
        )
    if adapter.peft is None:
        tensors = {_wrap_text(name) + DOWN: layer.down for name, layer in adapter.layers.items()}
        tensors |= {_wrap_text(name) + UP: layer.up for name, layer in adapter.layers.items()}
        configs = describe_lora(adapter.ranks)
    else:
        spell = _spell_dora if adapter.kind == "dora" else str
        tensors = {spell(key): tensor for key, tensor in adapter.peft.tensors.items()}
        configs = {component: dict(config) for component, config in adapter.peft.configs.items()}
    flat = {f"{c}.{key}": value for c, config in configs.items() for key, value in config.items()}
    return tensors, {CONFIG_KEY: json.dumps(flat)}


def _wrap_text(name: str) -> str:
    """Spell a text encoder's layer with the wrapper that older programs want.

    diffusers takes it off where its transformers has none.
    """
    component, _, inner = name.partition(".")
    if component.startswith("text_encoder") and inner.startswith("encoder.layers."):
        return f"{component}.text_model.{inner}"
    return name


def _spell_dora(key: str) -> str:
    """Name a DoRA's tensor as its readers want it.

    diffusers gives the text encoders' to transformers, which leaves out in silence what has not
    the magnitude's full name; the denoiser's go to PEFT, which wants the short one.
    """
    is_text = key.startswith("text_encoder") and key.endswith(MAGNITUDE)
    return _wrap_text(f"{key}.weight" if is_text else key)


def _name_for_kohya(
    adapter: Adapter, format: FileFormat
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not _is_held_by_kohya(adapter):
        raise AdapterError(
            f"The format {format} holds no {KIND_NAMES[adapter.kind]}: the programs that read it "
            "compute another change from it.",
            _WAYS_OUT[adapter.kind],
        )
    if format == "kohya":
        names = name_for_kohya(adapter.layer_names, adapter.metadata)
    else:
        names = name_for_kohya_diffusers(adapter.layer_names)
    tensors, metadata = _name_products(adapter, names)
    # No reader can find these names from their underscored form without help.
    unlisted = sorted({*map(respell_text, adapter.layer_names)} - set(sdxl_layers()))
    if has_sdxl_blocks(adapter):
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    if unlisted:
        metadata[NAMES_KEY] = " ".join(unlisted)
    return tensors, metadata


def _name_products(
    adapter: Adapter, names: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name each layer's factors as kohya and LyCORIS do, and say which kind they are."""
    tensors: dict[str, Tensor] = {}
    state = adapter.peft
    if state is not None and state.kind != "dora":
        for name in state.layer_names:
            for part, tensor in scale_as_lycoris(state, name).items():
                tensors[f"{names[name]}.{part}"] = tensor
        arguments = json.dumps({"algo": state.kind})
        return tensors, {"ss_network_module": "lycoris.kohya", "ss_network_args": arguments}
    layers = adapter.layers if state is None else layers_of_dora(state)
    # diffusers reads alphas that differ from layer to layer as patterns of names' ends, which may
    # mean other layers, too. One alpha for all is safe: the factors take up the difference.
    alpha = max(layer.rank for layer in layers.values())
    for name, layer in layers.items():
        tensors |= {
            f"{names[name]}.lora_down.weight": layer.down,
            f"{names[name]}.lora_up.weight": layer.up * (layer.rank / alpha),
            f"{names[name]}.alpha": torch.tensor(float(alpha)),
        }
        if state is not None:
            ones = (1,) * (layer.down.ndim - 2)
            lengths = state.tensors[name + MAGNITUDE].reshape(1, -1, *ones)
            tensors[f"{names[name]}.dora_scale"] = lengths
    metadata = {"ss_network_dim": str(alpha), "ss_network_alpha": str(alpha)}
    module = "networks.lora" if state is None else "lycoris.kohya"
    return tensors, {"ss_network_module": module, **metadata}


_WAYS_OUT: Mapping[str, str] = MappingProxyType(
    {
        "dora": "Write the nearest LoRA: add --rank 32 and the base model with --base.",
        "oft": "Write the format peft, for DreamLoom and PEFT; or a whole model: dreamloom bake "
        "FILE --base BASE -o MODEL.",
    }
)
