"""Write LoRA files for diffusers, PEFT, kohya, ComfyUI and AUTOMATIC1111."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.core.run_folder import TEMPORARY, explain_write_errors
from dreamloom.lora.adapter import Adapter, refuse_other_kinds
from dreamloom.lora.base_names import BASE_KEY, publish_base
from dreamloom.lora.key_names import LAYOUT_KEY, name_for_kohya, name_for_kohya_diffusers
from dreamloom.lora.modelspec import HASH_KEY, make_modelspec
from dreamloom.lora.peftconfig import CONFIG_KEY, DOWN, MAGNITUDE, UP, describe_lora
from dreamloom.lora.reading import NAMES_KEY
from dreamloom.lora.sdxl_layers import respell_text, sdxl_layers
from dreamloom.lora.tensors import save_tensors
from dreamloom.lora.token_embeddings import token_embeddings_file, write_token_embeddings

FileFormat = Literal["peft", "kohya", "kohya-diffusers"]
"""PEFT's names, as diffusers reads them; or kohya's, as ComfyUI and AUTOMATIC1111 read them, with
Stability AI's names of blocks or, for any base, with those of diffusers. ComfyUI knows no layer of
attention by PEFT's names."""


def write_adapter(
    path: Path, adapter: Adapter, dtype: torch.dtype = torch.float32, format: FileFormat = "peft"
) -> None:
    """Write an adapter atomically as safetensors that other programs can load.

    The scales of a LoRA are folded into the factors and alpha equals the rank for every layer, in
    the header and for readers that look at no header, so that all of them apply the same ΔW. New
    words go into a file of their own beside it (see `token_embeddings_file`), since diffusers
    refuses a LoRA file with anything else in it.

    Args:
        path: Ends in .safetensors.
        adapter: What to write.
        dtype: The precision of the tensors; new words are always float32.
        format: ``peft`` for diffusers and PEFT alone. ``kohya`` for ComfyUI, AUTOMATIC1111,
            kohya's own programs and diffusers, of bases with SDXL's own blocks;
            ``kohya-diffusers`` is the same with diffusers' names of blocks, for any base. Both hold
            LoRAs only and describe the file by ModelSpec.

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
    if format == "peft":
        tensors, metadata = _name_for_peft(adapter)
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
    # Two files that belong together appear together, or not at all.
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as workplace:
            fresh = Path(workplace) / path.name
            words = write_token_embeddings(fresh, adapter.tokens)
            _write_layers(fresh, tensors, header | words, format)
            for file in (token_embeddings_file(fresh), fresh):
                file.replace(path.with_name(file.name))


def _write_layers(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], format: FileFormat
) -> None:
    header = dict(header) if format == "peft" else {**make_modelspec(header), **header}
    described = any(key.startswith("modelspec.") for key in header)
    save_tensors(path, tensors, header, HASH_KEY if described else "")


def _name_for_peft(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    if adapter.peft is None:
        tensors = {_wrap_text(name) + DOWN: layer.down for name, layer in adapter.layers.items()}
        tensors |= {_wrap_text(name) + UP: layer.up for name, layer in adapter.layers.items()}
        configs = describe_lora(adapter.ranks)
    else:
        tensors = {_spell_magnitude(key): t for key, t in adapter.peft.tensors.items()}
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


def _spell_magnitude(key: str) -> str:
    """Name a DoRA's magnitude as its reader wants it.

    diffusers gives the text encoders' to transformers, which leaves out in silence what has not
    the parameter's full name; the denoiser's go to PEFT, which wants the short one.
    """
    is_text = key.startswith("text_encoder") and key.endswith(MAGNITUDE)
    return f"{key}.weight" if is_text else key


def _name_for_kohya(
    adapter: Adapter, format: FileFormat
) -> tuple[dict[str, Tensor], dict[str, str]]:
    refuse_other_kinds(adapter, "The adapter", f"can be written in the format {format}")
    if format == "kohya":
        names = name_for_kohya(adapter.layers, adapter.metadata)
    else:
        names = name_for_kohya_diffusers(adapter.layers)
    # diffusers reads alphas that differ from layer to layer as patterns of names' ends, which may
    # mean other layers, too. One alpha for all is safe: the factors take up the difference.
    alpha = max(adapter.ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        tensors |= {
            f"{names[name]}.lora_down.weight": layer.down,
            f"{names[name]}.lora_up.weight": layer.up * (layer.rank / alpha),
            f"{names[name]}.alpha": torch.tensor(float(alpha)),
        }
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(alpha),
        "ss_network_alpha": str(alpha),
    }
    # No reader can find these names from their underscored form without help.
    unlisted = sorted({*map(respell_text, adapter.layers)} - set(sdxl_layers()))
    if not unlisted and adapter.metadata.get(LAYOUT_KEY, "sdxl") == "sdxl":
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    if unlisted:
        metadata[NAMES_KEY] = " ".join(unlisted)
    return tensors, metadata
