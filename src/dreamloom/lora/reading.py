"""Read LoRA files of PEFT, diffusers, kohya and LyCORIS into the one form in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import KIND_NAMES, Adapter, DoraAxis, Layer, PeftState
from dreamloom.lora.assembly import (
    DORA,
    MAGNITUDES,
    ScaleOf,
    assemble_layer,
    name_stored_kind,
    stack_layers,
)
from dreamloom.lora.base_names import recall_base
from dreamloom.lora.conversion import keep_as_lycoris
from dreamloom.lora.folders import CONFIG, WEIGHTS, read_peft_folder
from dreamloom.lora.key_names import (
    LAYOUT_KEY,
    LayerNames,
    find_named_base,
    find_other_base,
    is_layer_name,
    name_naming,
    refuse_other_kinds_by_key,
    split_key,
)
from dreamloom.lora.modelspec import HASH_KEY as MODELSPEC_HASH_KEY
from dreamloom.lora.modelspec import TENSOR_HASH_KEY
from dreamloom.lora.peftconfig import (
    CONFIG_KEY,
    OTHER_KINDS,
    Scaling,
    make_dora,
    read_header_config,
    read_scaling,
)
from dreamloom.lora.sdxl_layers import kernel_of
from dreamloom.lora.tensors import is_finite, open_tensors
from dreamloom.lora.token_embeddings import HASH_KEY as WORDS_HASH_KEY
from dreamloom.lora.token_embeddings import (
    TOKENS_KEY,
    gather_token_embeddings,
    read_token_embeddings,
    split_bundled,
)

NAMES_KEY = "dreamloom.layer_names"
"""Where a file with underscored names of another base's layers lists their own names."""

Magnitude = tuple[Tensor, DoraAxis]
"""The lengths that a DoRA gives a layer, and of what they are."""

# PEFT's configuration describes the factors before their scales were folded in; the writer enters
# the others anew.
_MADE_ANEW = (
    *("format", CONFIG_KEY, TOKENS_KEY, WORDS_HASH_KEY, NAMES_KEY),
    *(MODELSPEC_HASH_KEY, TENSOR_HASH_KEY, "sshs_legacy_hash"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it was found.

    Args:
        adapter: What it changes.
        naming: Whose names the file uses: ``peft``, ``peft folder``, ``diffusers, old``,
            ``kohya``, ``kohya-diffusers`` or ``kohya, two namings``.
        stored: How many layers were stored as which kind of product.
        product: Its LoHa or LoKr as it was stored, where all of it is one of these: it is smaller
            than the LoRA that it is.
    """

    adapter: Adapter
    naming: str
    stored: Mapping[str, int]
    product: PeftState | None = None


@dataclass
class _Found:
    """What lies in a file or folder, before it is understood."""

    path: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    is_folder: bool = False


def read_adapter(path: Path, layer_names: Iterable[str] = ()) -> Adapter:
    """Read an adapter, and the file of its new words beside it.

    Scales are folded, so that ΔW = up · down for every layer of a LoRA. LoCon with Tucker cores,
    LoHa and LoKr of LyCORIS, and full differences of weights are LoRAs exactly, and become such.
    DoRA, and LoHa, LoKr and OFT in PEFT's form with its configuration, keep that form.

    Args:
        path: A .safetensors file with the names of PEFT, diffusers (also its two older spellings)
            or kohya (either naming of blocks, or both), or a folder as PEFT saves it.
        layer_names: The names of the base model's own layers, such as
            ``unet.mid_block.attentions.0.proj_in``: needed only for files of other bases than SDXL
            whose names do not tell dots from underscores, or lack the component.

    Raises:
        AdapterError: If the file is missing, a pickle, damaged, empty, for another base model, of
            a kind that is not read, or holds NaN or infinity; the message names the file and what
            it found.
    """
    return read_adapter_file(path, layer_names).adapter


def read_adapter_file(path: Path, layer_names: Iterable[str] = ()) -> AdapterFile:
    """Read an adapter and tell how it was written; see `read_adapter`."""
    given = list(layer_names)
    if path.name == WEIGHTS and path.with_name(CONFIG).is_file():
        path = path.parent
    if path.is_dir():
        tensors, configs = read_peft_folder(path, LayerNames(given))
        found = _Found(str(path), tensors, configs=configs, is_folder=True)
    else:
        tensors, header = open_tensors(path)
        configs = read_header_config(str(path), header.get(CONFIG_KEY))
        bundled, tensors = split_bundled(str(path), tensors)
        words = gather_token_embeddings([read_token_embeddings(path, header), bundled])
        found = _Found(str(path), tensors, recall_base(path, header), configs, words)
    metadata = {name: text for name, text in found.metadata.items() if name not in _MADE_ANEW}
    _refuse_impossible(found)
    state = _read_other_kind(found)
    if state is not None:
        naming = "peft folder" if found.is_folder else "peft"
        count = len(state.layer_names)
        adapter = Adapter({}, metadata, found.words, state)
        return AdapterFile(adapter, naming, {KIND_NAMES[state.kind]: count})
    refuse_other_kinds_by_key(found.path, found.tensors)
    listed = found.metadata.get(NAMES_KEY, "").split()
    own = [name for name in (*listed, *_list_configured(found.configs)) if is_layer_name(name)]
    names = LayerNames([*given, *own])
    layers, magnitudes, stored = _understand(found, names, check_base=not given)
    owners = [split[0] for split in map(split_key, found.tensors) if split is not None]
    naming = "peft folder" if found.is_folder else name_naming(owners, found.tensors)
    if magnitudes:
        axis = _name_axis(found.path, {name: own for name, (_, own) in magnitudes.items()})
        peft = make_dora(layers, {name: own for name, (own, _) in magnitudes.items()}, axis)
        return AdapterFile(Adapter({}, metadata, found.words, peft), naming, stored)
    product = _keep_product(found, names) if set(stored) in ({"LoHa"}, {"LoKr"}) else None
    return AdapterFile(Adapter(layers, metadata, found.words), naming, stored, product)


def _refuse_impossible(found: _Found) -> None:
    for key, tensor in found.tensors.items():
        owner, part = split_key(key) or (key, "")
        if part not in ("", "alpha") and not tensor.is_floating_point():
            raise AdapterError(
                f"{owner} in {found.path} holds {str(tensor.dtype).removeprefix('torch.')}, which "
                "no factor of an adapter is made of.",
                "The file is damaged, or quantised; get it in float32, float16 or bfloat16.",
            )
        if not is_finite(tensor):
            raise AdapterError(
                f"{owner} in {found.path} holds NaN or infinity.",
                "Its training went wrong, or the file is damaged; use an earlier checkpoint.",
            )


def _read_other_kind(found: _Found) -> PeftState | None:
    """Read a LoHa, LoKr or OFT in PEFT's form, whose configuration stands beside it."""
    configs = {c: config for c, config in found.configs.items() if "peft_type" in config}
    types = {str(config["peft_type"]) for config in configs.values()}
    kinds = [kind for name, kind in OTHER_KINDS.items() if name in types]
    if not kinds:
        return None
    listed = all(isinstance(config.get("target_modules"), list) for config in configs.values())
    state = PeftState(kinds[0], found.tensors, configs) if listed else None
    names = set(state.layer_names) if state is not None else set()
    owners = {key: _owner(key, names) for key in found.tensors}
    unknown = sorted(key for key, owner in owners.items() if not owner)
    missing = sorted(names - set(owners.values()))
    if len(types) > 1 or state is None or unknown or missing:
        shown = ", ".join([*unknown, *missing][:3])
        raise AdapterError(
            f"The configuration in the header of {found.path} does not describe its tensors"
            + (f" ({shown})." if shown else "."),
            "Use a file written by DreamLoom.",
        )
    return PeftState(state.kind, {key: t.float() for key, t in found.tensors.items()}, configs)


def _owner(key: str, names: set[str]) -> str:
    """Find the layer that a tensor belongs to: the key less one or two last parts."""
    once = key.rpartition(".")[0]
    twice = once.rpartition(".")[0]
    return once if once in names else twice if twice in names else ""


def _understand(
    found: _Found, names: LayerNames, check_base: bool
) -> tuple[dict[str, Layer], dict[str, Magnitude], dict[str, int]]:
    """Put each layer together: the changes, a DoRA's magnitudes, and the kinds that were stored."""
    parts, unknown = _sort_by_owner(found)
    owners = {owner: names.find(owner) for owner in parts}
    kinds = {owner: name_stored_kind(tensors) for owner, tensors in parts.items()}
    foreign = {owner for owner in parts if owners[owner] is None or not kinds[owner]}
    unknown += [key for key in found.tensors if (split_key(key) or ("",))[0] in foreign]
    # A base with other blocks may have any width; its own files say so, or its names are given.
    is_sdxl = check_base and LAYOUT_KEY not in found.metadata
    widths = {o: _count_inputs(tensors) for o, tensors in parts.items()} if is_sdxl else {}
    base = find_other_base([owner for owner, name in owners.items() if name is None], widths)
    base = base or (find_named_base(found.metadata) if is_sdxl else "")
    if base:
        raise AdapterError(
            f"{found.path} is for {base}.", "DreamLoom works with SDXL; use an adapter made for it."
        )
    # Before its keys: PEFT saves what it taught beside the factors under names of its own.
    scalings = {c: read_scaling(found.path, config) for c, config in found.configs.items()}
    if unknown or not parts:
        shown = ", ".join(sorted(unknown)[:3]) + (" …" if len(unknown) > 3 else "")
        raise AdapterError(
            f"{found.path} is no adapter of SDXL in a format that DreamLoom reads: "
            + (f"{len(unknown)} unknown keys ({shown})." if unknown else "it holds no layer."),
            "docs/formats.md lists the formats; a kohya file of another base needs the names of "
            "its layers.",
        )
    gathered: dict[str, list[Layer]] = {}
    magnitudes: dict[str, Magnitude] = {}
    for owner, name in sorted((o, n) for o, n in owners.items() if n is not None):
        scale_of = _scale_by(scalings, name, owner)
        layer = assemble_layer(found.path, name, parts[owner], kernel_of(name), scale_of)
        gathered.setdefault(name, []).append(layer)
        if kinds[owner].startswith(DORA):
            magnitudes[name] = _read_magnitude(found.path, name, parts[owner], layer)
    layers: dict[str, Layer] = {}
    for name in sorted(gathered):
        try:
            # A union of two files may name a layer twice: the changes add up.
            layers[name] = stack_layers(gathered[name])
        except ValueError as error:
            raise AdapterError(
                f"{found.path} names {name} twice, and the changes differ in shape.",
                "Get the file again.",
            ) from error
    plain = sorted(set(gathered) - set(magnitudes))
    twice = [name for name in magnitudes if len(gathered[name]) > 1]
    if magnitudes and (plain or twice):
        raise AdapterError(
            f"{found.path} is a DoRA in {len(magnitudes)} layers, and not in others, such as "
            f"{(plain or twice)[0]}.",
            "DreamLoom reads a file of one kind; split it by kind.",
        )
    return layers, magnitudes, dict(sorted(Counter(kinds.values()).items()))


def _keep_product(found: _Found, names: LayerNames) -> PeftState | None:
    """Keep LyCORIS' own factors of a LoHa or LoKr, its scale folded in; None if layers repeat."""
    parts, _ = _sort_by_owner(found)
    owners = {owner: name for owner in parts if (name := names.find(owner)) is not None}
    if len(set(owners.values())) < len(owners):
        return None
    own = {owners[owner]: tensors for owner, tensors in parts.items()}
    return keep_as_lycoris(own)


def _sort_by_owner(found: _Found) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    parts: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in found.tensors.items():
        split = split_key(key)
        if split is None:
            unknown.append(key)
            continue
        owner, part = split
        if part in parts.setdefault(owner, {}):
            raise AdapterError(
                f"{found.path} names a layer's factors twice.", "Get the file again."
            )
        parts[owner][part] = tensor
    return parts, unknown


def _count_inputs(parts: Mapping[str, Tensor]) -> int:
    """How many inputs a layer has; 0 if its tensors do not tell at once."""
    for part in ("down", "hada_w1_b", "diff"):
        if part in parts and parts[part].ndim > 1:
            return parts[part].shape[1]
    return 0


def _scale_by(scalings: Mapping[str, Scaling | None], name: str, owner: str) -> ScaleOf:
    """Give the scale of a layer that has no alpha of its own, by its rank."""
    component, _, inner = name.partition(".")
    scaling = scalings.get(component)
    if scaling is None:
        return lambda rank: 1.0
    # PEFT's patterns mean the names that the file itself uses.
    own = owner.partition(".")
    return partial(scaling.of, own[2] if own[0] == component else inner)


def _read_magnitude(path: str, name: str, parts: Mapping[str, Tensor], layer: Layer) -> Magnitude:
    """Read the lengths that a DoRA gives a layer, and whether they are of outputs or of inputs."""
    outputs, inputs = layer.up.shape[0], layer.down.shape[1]
    ones = (1,) * (layer.down.ndim - 2)
    as_peft = (1, outputs, *ones) if ones else (outputs,)
    lengths = next(parts[part].float() for part in MAGNITUDES if part in parts)
    shape = tuple(lengths.shape)
    # A square convolution's of PEFT and LyCORIS' of inputs have one shape; their names differ.
    if shape == (as_peft if "magnitude" in parts else (outputs, 1, *ones)):
        return lengths.reshape(as_peft), "outputs"
    if "dora_scale" in parts and shape == (1, inputs, *ones):
        return lengths.flatten(), "inputs"
    raise AdapterError(
        f"The magnitudes of {name} in {path} have the shape {shape}, and the layer has {outputs} "
        f"outputs and {inputs} inputs.",
        "The file may be damaged; get it again.",
    )


def _name_axis(path: str, axes: Mapping[str, DoraAxis]) -> DoraAxis:
    """Name what all layers of a DoRA scale."""
    found = sorted(set(axes.values()), reverse=True)
    if len(found) > 1:
        raise AdapterError(
            f"{path} is a DoRA that scales the outputs of some layers and the inputs of others.",
            "DreamLoom reads a file of one kind; split it by kind.",
        )
    return found[0] if found else "outputs"


def _list_configured(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the layers that a file's own configuration names one by one."""
    return [
        f"{component}.{name}"
        for component, config in configs.items()
        if isinstance(targets := config.get("target_modules"), list)
        for name in targets
        if isinstance(name, str)
    ]
