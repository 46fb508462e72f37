"""Which programs load an adapter file, told from its names and kinds of factors.

What each program does with each kind was found by running its own loader on files of every kind
(docs/formats.md has the table, with versions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from dreamloom.core.errors import AdapterError
from dreamloom.lora.key_names import LAYOUT_KEY, LayerNames, name_naming, split_key
from dreamloom.lora.sdxl_layers import sdxl_layers
from dreamloom.lora.tensors import read_keys

_LORA, _DORA, _LYCORIS, _OTHER = "LoRA", "DoRA", "LoHa or LoKr", "another kind"
_READERS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("kohya", _LORA): "diffusers, ComfyUI, Forge, AUTOMATIC1111, InvokeAI, OneTrainer and "
        "kohya's sd-scripts",
        ("kohya", _DORA): "ComfyUI, AUTOMATIC1111 and OneTrainer; not diffusers",
        ("kohya", _LYCORIS): "ComfyUI, AUTOMATIC1111 and InvokeAI; not diffusers",
        ("kohya-diffusers", _LORA): "diffusers, ComfyUI, Forge and InvokeAI; AUTOMATIC1111 leaves "
        "out one layer",
        ("kohya-diffusers", _LYCORIS): "ComfyUI; not diffusers",
        ("peft", _LORA): "diffusers and OneTrainer; not ComfyUI, Forge, AUTOMATIC1111 or InvokeAI "
        "(for them: --format kohya)",
        ("peft", _DORA): "diffusers; for others the nearest LoRA: dreamloom convert FILE --rank 32 "
        "--base BASE",
        ("peft", _LYCORIS): "PEFT; for others: dreamloom convert FILE --format kohya",
        ("peft", _OTHER): "PEFT; for others a whole model: dreamloom bake FILE --base BASE",
    }
)
_OF_OTHER_BASES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("peft", _LORA): "diffusers, with the same base",
        ("peft", _DORA): "diffusers, with the same base",
        ("kohya-diffusers", _LORA): "diffusers, with the same base",
    }
)


def name_readers(path: Path) -> str:
    """Name the programs that load a file and apply every layer of it, beside DreamLoom.

    Args:
        path: A file as DreamLoom writes it.

    Returns:
        Such as ``diffusers, ComfyUI, …``; empty where no program is known to, or the file has
        another program's names.
    """
    try:
        keys, metadata = read_keys(path)
    except AdapterError:
        return ""
    owners = {owner for owner, _ in filter(None, map(split_key, keys))}
    parts = {part for _, part in filter(None, map(split_key, keys))}
    if parts & {"magnitude", "dora_scale"}:
        kind = _DORA
    elif any(part.startswith(("hada_", "lokr_")) for part in parts):
        kind = _LYCORIS
    else:
        kind = _LORA if parts & {"down", "up"} else _OTHER
    names = LayerNames()
    is_sdxl = metadata.get(LAYOUT_KEY, "sdxl") == "sdxl" and all(
        names.find(owner) in sdxl_layers() for owner in owners
    )
    naming = name_naming(owners, keys)
    readers = (_READERS if is_sdxl else _OF_OTHER_BASES).get((naming, kind), "")
    if naming != "peft" and kind == _LORA and _loses_text_layers(map(names.find, owners)):
        readers = readers.replace("diffusers, ", "") + "; not diffusers, which would leave out "
        return readers + "layers of the text encoders (for it: --format peft)"
    return readers


def _loses_text_layers(layers: Iterable[str | None]) -> bool:
    """Say whether diffusers leaves out queries, keys and values of a text encoder.

    From kohya's names it makes two of its own spellings, and takes all of an encoder for the one
    that it meets first. Tried with diffusers 0.42.1 in all 63 choices of a layer's parts: they are
    lost, or loading stops, unless ``out_proj`` is there as well.
    """
    parts: dict[str, set[str]] = {}
    for name in filter(None, layers):
        component = name.partition(".")[0]
        if component.startswith("text_encoder"):
            parts.setdefault(component, set()).add(name.rpartition(".")[2])
    return any(
        found & {"q_proj", "k_proj", "v_proj"} and "out_proj" not in found
        for found in parts.values()
    )


def tell_readers(path: Path) -> str:
    """Say in a sentence which programs load a file."""
    named = name_readers(path)
    return f"For {named}." if named else "For DreamLoom alone."
