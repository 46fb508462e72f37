"""Which programs load an adapter file, told from its names and kinds of factors.

What each program does with each kind was found by running its own loader on files of every kind
(docs/formats.md has the table, with versions; ``make test-clients`` runs them again).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import T_LORA_KEY
from dreamloom.lora.key_names import LAYOUT_KEY, LayerNames, name_naming, split_key
from dreamloom.lora.sdxl_layers import sdxl_layers
from dreamloom.lora.tensors import read_shapes

_LORA, _DORA, _LYCORIS, _OTHER = "LoRA", "DoRA", "LoHa or LoKr", "another kind"
_SD_SCRIPTS = "kohya's sd-scripts"
# Who reads a kind in a naming, and what is to be said of others.
_READERS: Mapping[tuple[str, str], tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        ("kohya", _LORA): (
            (
                *("diffusers", "ComfyUI", "Forge", "AUTOMATIC1111", "InvokeAI", "OneTrainer"),
                _SD_SCRIPTS,
            ),
            "",
        ),
        ("kohya", _DORA): (("ComfyUI", "AUTOMATIC1111", "OneTrainer"), "not diffusers"),
        ("kohya", _LYCORIS): (("ComfyUI", "AUTOMATIC1111", "InvokeAI"), "not diffusers"),
        ("kohya-diffusers", _LORA): (
            ("diffusers", "ComfyUI", "Forge", "InvokeAI", "OneTrainer"),
            "AUTOMATIC1111 leaves out one layer",
        ),
        ("kohya-diffusers", _DORA): (("ComfyUI", "OneTrainer"), "not diffusers"),
        ("kohya-diffusers", _LYCORIS): (("ComfyUI",), "not diffusers"),
        ("peft", _LORA): (
            ("diffusers", "OneTrainer"),
            "not ComfyUI, Forge, AUTOMATIC1111 or InvokeAI (for them: --format kohya)",
        ),
        ("peft", _DORA): (
            ("diffusers",),
            "for others the nearest LoRA: dreamloom convert FILE --rank 32 --base BASE",
        ),
        ("peft", _LYCORIS): (("PEFT",), "for others: dreamloom convert FILE --format kohya"),
        ("peft", _OTHER): (("PEFT",), "for others a whole model: dreamloom bake FILE --base BASE"),
    }
)
# Of these the first reader, diffusers, takes any base's layers.
_OF_OTHER_BASES = {("peft", _LORA), ("peft", _DORA), ("kohya-diffusers", _LORA)}
_TEXT_PROJECTION = "text_encoder_2.text_projection"


def name_readers(path: Path) -> str:
    """Name the programs that load a file and apply every layer of it, beside DreamLoom.

    Args:
        path: A file as DreamLoom writes it.

    Returns:
        Such as ``diffusers, ComfyUI, …``; empty where no program is known to, or the file has
        another program's names.
    """
    try:
        shapes, metadata = read_shapes(path)
    except AdapterError:
        return ""
    split = {key: found for key in shapes if (found := split_key(key)) is not None}
    owners = {owner for owner, _ in split.values()}
    kind = _name_kind({part for _, part in split.values()})
    names = LayerNames()
    layers = [name for name in map(names.find, owners) if name is not None]
    naming = name_naming(owners, shapes)
    is_sdxl = metadata.get(LAYOUT_KEY, "sdxl") == "sdxl" and len(layers) == len(owners)
    readers, note = _READERS.get((naming, kind), ((), ""))
    where = ""
    if not is_sdxl or not set(layers) <= set(sdxl_layers()):
        readers, note = readers[:1] if (naming, kind) in _OF_OTHER_BASES else (), ""
        where = ", with the same base"
    ranks = {shapes[key][0] for key, (_, part) in split.items() if part == "down"}
    lost = _name_losers(naming, kind, layers, len(ranks) == 1)
    kept = [program for program in readers if program not in lost]
    without = [f"not {program}, {lost[program]}" for program in readers if program in lost]
    notes = "; ".join(filter(None, [note, *without]))
    return _join(kept) + where * bool(kept) + (f"; {notes}" if kept and notes else "")


def _name_kind(parts: set[str]) -> str:
    if parts & {"magnitude", "dora_scale"}:
        return _DORA
    if any(part.startswith(("hada_", "lokr_")) for part in parts):
        return _LYCORIS
    return _LORA if parts & {"down", "up"} else _OTHER


def _name_losers(
    naming: str, kind: str, layers: Sequence[str], has_one_rank: bool
) -> dict[str, str]:
    """Name the programs that do not apply all of this file, though they know its kind, and why."""
    lost = {}
    if naming != "peft" and kind == _LORA and _loses_text_layers(layers):
        lost["diffusers"] = (
            "which would leave out layers of the text encoders (for it: --format peft)"
        )
    if not has_one_rank and kind in (_LORA, _DORA):
        way_out = " (for it: --equal-ranks)" if kind == _LORA else ""
        lost["OneTrainer"] = f"which loads one rank for all layers{way_out}"
    if any(layer == _TEXT_PROJECTION or _is_outside(layer) for layer in layers):
        lost[_SD_SCRIPTS] = "which would leave out layers outside the blocks"
    if _TEXT_PROJECTION in layers:
        lost["AUTOMATIC1111"] = "which would leave out the text projection"
    return lost


def _is_outside(layer: str) -> bool:
    component, _, inner = layer.partition(".")
    return component == "unet" and "blocks." not in inner and not inner.startswith("mid_block.")


def _join(programs: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(programs[:-1]), *programs[-1:]]))


def _loses_text_layers(layers: Iterable[str]) -> bool:
    """Say whether diffusers leaves out queries, keys and values of a text encoder.

    From kohya's names it makes two of its own spellings, and takes all of an encoder for the one
    that it meets first. Tried with diffusers 0.42.1 in all 63 choices of a layer's parts: they are
    lost, or loading stops, unless ``out_proj`` is there as well.
    """
    parts: dict[str, set[str]] = {}
    for name in layers:
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
    told = f"For {named}." if named else "For DreamLoom alone."
    if _is_t_lora(path):
        told += (
            " It is a T-LoRA: DreamLoom lets its ranks count by the timestep; other programs apply "
            "all of them at every step, which draws otherwise."
        )
    return told


def _is_t_lora(path: Path) -> bool:
    try:
        return T_LORA_KEY in read_shapes(path)[1]
    except AdapterError:
        return False
