"""Key names of LoRA files (PEFT, diffusers, kohya, LyCORIS): which layer a key means, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

from dreamloom.core.errors import AdapterError
from dreamloom.lora.sdxl_layers import (
    COMPONENTS,
    KOHYA_PREFIXES,
    respell_text,
    sdxl_layers,
    underscore,
)

LAYOUT_KEY = "dreamloom.layout"
"""Where an adapter's header says whether its base has SDXL's published blocks: ``sdxl`` if so."""


# diffusers splits this layer's name wrongly where it stands with diffusers' blocks.
_MISREAD = "unet.add_embedding."

_ENDINGS: Mapping[str, str] = MappingProxyType(
    {
        # PEFT, and diffusers today.
        ".lora_A.weight": "down",
        ".lora_B.weight": "up",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        # ai-toolkit.
        ".magnitude": "magnitude",
        # diffusers before, for the denoiser and the text encoders; and its scripts' kohya files.
        ".lora.down.weight": "down",
        ".lora.up.weight": "up",
        ".lora_linear_layer.down.weight": "down",
        ".lora_linear_layer.up.weight": "up",
        "_lora.down.weight": "down",
        "_lora.up.weight": "up",
        # Kohya and LyCORIS.
        ".lora_down.weight": "down",
        ".lora_up.weight": "up",
        ".lora_mid.weight": "mid",
        ".dora_scale": "dora_scale",
        ".alpha": "alpha",
        ".diff": "diff",
        **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
        **{f".hada_{part}": f"hada_{part}" for part in ("t1", "t2")},
        **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b")},
        **{f".lokr_{part}": f"lokr_{part}" for part in ("w2", "w2_a", "w2_b", "t2")},
    }
)
# diffusers' first spelling: the processor of an attention held its LoRA.
_FIRST = re.compile(r"(.*)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_OLD_ENDINGS = (".lora.down.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
# What ComfyUI calls the parts of a pipeline, and LyCORIS whatever it wraps: with SDXL the denoiser.
_COMFY_UNET = "diffusion_model."
_LYCORIS = "lycoris_"
_STABILITY_BLOCKS = (
    *("input_blocks.", "middle_block.", "output_blocks."),
    *("time_embed.", "label_emb.", "out."),
)
_NUMBER = re.compile(r"(?<=blocks|esnets|ntions|mplers|layers)\.\d+\.")
# The text encoders as ComfyUI's files name them, and as OneTrainer's do.
_OTHERS_ENCODERS = MappingProxyType(
    {
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "clip_l.": "text_encoder",
        "clip_g.": "text_encoder_2",
    }
)

_KOHYA = tuple(KOHYA_PREFIXES.values())

# What a LoRA's form cannot hold, by the endings that give it away.
_REFUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "an OFT or BOFT": (".oft_blocks", ".oft_diag", ".oft_R.weight", ".boft_R", ".rescale"),
        "a GLoRA": tuple(f".{part}.weight" for part in ("a1", "a2", "b1", "b2", "bm")),
        "an IA3": (".on_input", ".ia3_l"),
        "a change of normalisation layers": (".w_norm", ".b_norm"),
        "a change of biases": (".diff_b", ".lora_B.bias", ".lora_up.bias"),
        "a VeRA": (".vera_lambda_b", ".vera_lambda_d"),
    }
)
_EMBEDDINGS = {"clip_l", "clip_g", "clip_l_out", "clip_g_out", "emb_params"}
_CONTROL_LORA = "lora_controlnet"

# What other bases' headers say: kohya's own entry, and ModelSpec's of the architecture.
_OTHER_BASES = re.compile(
    "ss_base_model_version=(sd_v[12]|sd3|flux).*"
    "|modelspec.architecture=(stable-diffusion-(v[12]|3|xl-v1-refiner)|flux).*",
    re.IGNORECASE,
)
# SDXL's cross-attention reads 2048 numbers a token; others' widths give them away.
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner"}
_CROSS_ATTENTION = re.compile(r".*attn2[._](processor[._])?to_[kv]")
_BLOCKS_OF_OTHERS = re.compile(
    r"lora_unet_(down_blocks_(0_attentions|3)|up_blocks_(2_attentions|3)"
    r"|input_blocks_(9|10|11)_|input_blocks_[12]_1|output_blocks_(9|10|11)_|output_blocks_[678]_1)"
)


def split_key(key: str) -> tuple[str, str] | None:
    """Split a file's key into the layer as the file names it and the part of its change.

    Returns:
        Such as ``("unet.mid_block.attentions.0.proj_in", "down")``; None if no spelling is known.
        The parts are ``down``, ``mid``, ``up``, ``alpha``, ``magnitude``, ``dora_scale``, ``diff``
        and LyCORIS's names of a LoHa's and a LoKr's factors.
    """
    first = _FIRST.fullmatch(key)
    if first is not None:
        owner, to, part = first.groups()
        owner = owner.removesuffix(".processor")
        if owner.endswith("self_attn"):
            return f"{owner}.{to}_proj", part
        return f"{owner}.to_{to}" + (".0" if to == "out" else ""), part
    for ending, part in _ENDINGS.items():
        if key.endswith(ending) and key != ending:
            owner = key.removesuffix(ending)
            # diffusers' scripts leave the last dot of a DoRA's names in their kohya files.
            is_kohya = owner.startswith(_KOHYA)
            return owner.replace(".", "_") if is_kohya else owner, part
    return None


def refuse_other_kinds_by_key(path: str, keys: Iterable[str]) -> None:
    """Refuse, by name, what cannot be written as a product of two factors.

    Raises:
        AdapterError: If a key belongs to another kind of adapter.
    """
    found = list(keys)
    if _CONTROL_LORA in found:
        raise AdapterError(
            f"{path} is a ControlLoRA, a part of a ControlNet.",
            "DreamLoom reads adapters of the denoiser and the text encoders.",
        )
    if found and set(found) <= _EMBEDDINGS:
        raise AdapterError(
            f"{path} is a textual inversion, the embeddings of a word, and no adapter.",
            "Name the adapter that was taught with the word.",
        )
    for kind, endings in _REFUSED.items():
        examples = [key for key in found if key.endswith(endings)]
        if examples:
            raise AdapterError(
                f"{path} holds {kind} ({len(examples)} tensors, such as {examples[0]}), which a "
                "LoRA cannot express.",
                "DreamLoom reads LoRA, LoCon, LoHa, LoKr, DoRA and full differences of weights.",
            )


def is_layer_name(name: str) -> bool:
    """Say whether a name begins with a part of the pipeline, as layers' names do."""
    return name.partition(".")[0] in COMPONENTS


class LayerNames:
    """Finds a layer by whatever name a file gives it.

    Args:
        layer_names: The base model's own layers, such as ``unet.mid_block.attentions.0.proj_in``;
            needed only for files that do not tell dots from underscores, or leave the component
            out, and were made for other blocks than SDXL's.

    Raises:
        ValueError: If one of the names begins with no component.
        AdapterError: If two of them are the same once written with underscores.
    """

    def __init__(self, layer_names: Iterable[str] = ()) -> None:
        self.known: set[str] = {respell_text(name) for name in layer_names}
        foreign = [name for name in self.known if not is_layer_name(name)]
        if foreign:
            raise ValueError(f"{foreign[0]} begins with none of {', '.join(COMPONENTS)}")
        self._by_name: dict[str, str] = {}
        for layer in sdxl_layers().values():
            self._by_name |= dict.fromkeys((layer.kohya, layer.kohya_diffusers), layer.name)
            if layer.stability:
                self._by_name[layer.stability] = layer.name
        for name in sorted(self.known):
            _claim(self._by_name, underscore(name), name)
        self.known |= set(sdxl_layers())

    def find(self, found: str) -> str | None:
        """Find the layer's own name, or None if no layer of this family of bases is called so.

        Bases with other blocks than SDXL may have more or fewer of them, of the same inner layers.
        """
        if found.startswith(_LYCORIS):
            found = f"{KOHYA_PREFIXES['unet']}{found.removeprefix(_LYCORIS)}"
        if found.startswith(_KOHYA):
            return self._by_name.get(found) or self._by_name.get(_wrap_text(found))
        for prefix, encoder in _OTHERS_ENCODERS.items():
            if found.startswith(prefix):
                name = respell_text(f"{encoder}.{found.removeprefix(prefix)}")
                return name if name in self.known else None
        plain = found.removeprefix(_COMFY_UNET).replace(".processor.", ".")
        component, _, inner = plain.partition(".")
        stability = inner if component == "unet" else plain
        if stability.startswith(_STABILITY_BLOCKS):
            return self._by_name.get(stability)
        plain = f"{plain}.0" if plain.endswith(".to_out") else plain
        if component in COMPONENTS and inner:
            name = respell_text(plain)
            fits = name in self.known or _NUMBER.sub(".#.", name) in _shapes()
            return name if fits else None
        return f"unet.{plain}" if f"unet.{plain}" in self.known else None

    def find_component(self, inner_names: Iterable[str]) -> list[str]:
        """Name the components that have all these layers, named from within."""
        names = list(inner_names)
        return [
            component
            for component in COMPONENTS
            if all(respell_text(f"{component}.{inner}") in self.known for inner in names)
        ]


def _wrap_text(found: str) -> str:
    """Put in the wrapper that transformers 5 took off a text encoder's layers."""
    for prefix in _KOHYA:
        if found.startswith(f"{prefix}encoder_layers_"):
            return f"{prefix}text_model_{found.removeprefix(prefix)}"
    return found


@cache
def _shapes() -> frozenset[str]:
    """Every layer's name without the numbers of its blocks."""
    return frozenset(_NUMBER.sub(".#.", name) for name in sdxl_layers())


def name_naming(found: Iterable[str], keys: Iterable[str]) -> str:
    """Say whose names a file uses, for `describe_adapter`.

    Args:
        found: The layers as the file names them.
        keys: The file's keys.
    """
    layers = sdxl_layers().values()
    sgm = {layer.kohya for layer in layers if layer.kohya != layer.kohya_diffusers}
    owners = list(found)
    if any(name.startswith(_LYCORIS) for name in owners):
        return "lycoris"
    if any(
        name.startswith((_COMFY_UNET, *_STABILITY_BLOCKS, *_OTHERS_ENCODERS)) for name in owners
    ):
        return "comfyui"
    named = [name for name in owners if name.startswith(_KOHYA)]
    if named:
        of_kohya = [name for name in named if name in sgm]
        of_unet = [name for name in named if name.startswith(KOHYA_PREFIXES["unet"])]
        if not of_kohya and of_unet:
            return "kohya-diffusers"
        return "kohya" if len(of_kohya) == len(of_unet) else "kohya, two namings"
    old = any(key.endswith(_OLD_ENDINGS) or _FIRST.fullmatch(key) for key in keys)
    return "diffusers, old" if old else "peft"


def find_other_base(unknown: Iterable[str], inputs: Mapping[str, int]) -> str:
    """Tell which other base model than SDXL a file was made for; empty if nothing says so.

    Args:
        unknown: The layers that SDXL has not, as the file names them.
        inputs: How many inputs the layers have whose width tells, by the file's names.

    Returns:
        Such as ``Stable Diffusion 1.x (its cross-attention reads 768 numbers a token)``.
    """
    for name, width in inputs.items():
        if _CROSS_ATTENTION.fullmatch(name) and width in _WIDTHS:
            return f"{_WIDTHS[width]} (its cross-attention reads {width} numbers a token)"
    for name in unknown:
        if name.startswith("lora_te_"):
            return f"Stable Diffusion 1.x or 2.x (it has one text encoder, in {name})"
        if _BLOCKS_OF_OTHERS.match(name):
            return f"Stable Diffusion 1.x or 2.x (SDXL has no layer {name})"
    return ""


def find_named_base(metadata: Mapping[str, str]) -> str:
    """Tell which other base model than SDXL a file's header names; empty if it names none.

    Returns:
        Such as ``sd_v1 (its header says so in ss_base_model_version)``.
    """
    for name in ("ss_base_model_version", "modelspec.architecture"):
        named = metadata.get(name, "")
        if _OTHER_BASES.fullmatch(f"{name}={named}"):
            return f"{named.partition('/')[0]} (its header says so in {name})"
    return ""


def name_for_kohya(names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Translate layers' names, such as ``unet.mid_block.attentions.0.proj_in``.

    Args:
        names: Names as in an `Adapter`.
        metadata: The adapter's; it may say that the base has other blocks than SDXL.

    Returns:
        For each name kohya's, such as ``lora_unet_middle_block_1_proj_in``.

    Raises:
        AdapterError: If the base has not SDXL's published blocks.
    """
    layers = sdxl_layers()
    spelled = {name: respell_text(name) for name in names}
    foreign = [name for name, spelling in spelled.items() if spelling not in layers]
    if foreign or metadata.get(LAYOUT_KEY, "sdxl") != "sdxl":
        example = f" ({foreign[0]})" if foreign else ""
        raise AdapterError(
            "The adapter's base model has other blocks than the published SDXL"
            f"{example}, and kohya's format has names for that one's only.",
            "Write the format kohya-diffusers, which has names for all, or peft.",
        )
    return {name: layers[spelling].kohya for name, spelling in spelled.items()}


def name_for_kohya_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Translate layers' names of any base into those with kohya's endings and diffusers' blocks.

    Raises:
        AdapterError: If diffusers would read a name wrongly, or two names become one.
    """
    spelled = {name: underscore(name) for name in names}
    misread = [name for name in spelled if name.startswith(_MISREAD)]
    if misread:
        raise AdapterError(
            f"diffusers reads {misread[0]} wrongly in the format kohya-diffusers.",
            "Write the format kohya or peft.",
        )
    owners: dict[str, str] = {}
    for name, spelling in spelled.items():
        _claim(owners, spelling, name)
    return spelled


def _claim(owners: dict[str, str], spelling: str, name: str) -> None:
    """Note whose an underscored name is, and refuse one that two layers would share."""
    other = owners.setdefault(spelling, name)
    if other != name:
        raise AdapterError(
            f"The layers {other} and {name} have one name in kohya's files.",
            "Write the format peft.",
        )
