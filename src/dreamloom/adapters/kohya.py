"""The names of SDXL's layers in the files of kohya-ss, which ComfyUI and AUTOMATIC1111 read.

Those files name the denoiser's layers as in Stability AI's own code (``input_blocks``,
``middle_block``, ``output_blocks``) and the text encoders' as in older transformers, with ``_``
for every dot. Names alone do not tell where a dot was, so all of SDXL's are listed here once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from types import MappingProxyType

from dreamloom.errors import AdapterError

LAYOUT_KEY = "dreamloom.layout"
"""Where an adapter's header says whether its base has SDXL's published blocks: ``sdxl`` if so."""

_LAYERS_PER_BLOCK = 2
# Transformer blocks at each level of the denoiser, from the finest; the middle is as the coarsest.
_DEPTHS = (0, 2, 10)
# How many layers each text encoder has, and where transformers keeps them.
_TEXT_ENCODERS = {
    "text_encoder": ("te1", 12, "encoder.layers"),
    "text_encoder_2": ("te2", 32, "text_model.encoder.layers"),
}

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_LAYERS = (
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2"),
)
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


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
    known = _kohya_names()
    spelled = {name: _respell_text(name) for name in names}
    foreign = [name for name, spelling in spelled.items() if spelling not in known]
    if foreign or metadata.get(LAYOUT_KEY, "sdxl") != "sdxl":
        example = f" ({foreign[0]})" if foreign else ""
        raise AdapterError(
            "The adapter's base model has other blocks than the published SDXL"
            f"{example}, and kohya's format has names for that one's only.",
            "Write the format peft, which diffusers and ComfyUI read.",
        )
    return {name: known[spelling] for name, spelling in spelled.items()}


def name_from_kohya(names: Iterable[str]) -> dict[str, str]:
    """Translate kohya's names of SDXL's layers back; the inverse of `name_for_kohya`.

    Names that are no SDXL layer's are left out.
    """
    known = {kohya: name for name, kohya in _kohya_names().items()}
    return {name: known[name] for name in names if name in known}


def _respell_text(name: str) -> str:
    """Spell a text encoder's layer as transformers does now: one has a wrapper, one lost it."""
    component, _, inner = name.partition(".")
    if component not in _TEXT_ENCODERS:
        return name
    where = _TEXT_ENCODERS[component][2]
    return f"{component}.{where}{inner.removeprefix('text_model.').removeprefix('encoder.layers')}"


@cache
def _kohya_names() -> Mapping[str, str]:
    """Every layer of SDXL by its name in diffusers, with its name in kohya's files."""
    dotted = dict(_list_unet())
    names = {f"unet.{ours}": f"lora_unet_{theirs}" for ours, theirs in dotted.items()}
    for component, (short, layers, where) in _TEXT_ENCODERS.items():
        for number, part in product(range(layers), _TEXT_LAYERS):
            theirs = f"lora_{short}_text_model.encoder.layers.{number}.{part}"
            names[f"{component}.{where}.{number}.{part}"] = theirs
    return MappingProxyType({name: kohya.replace(".", "_") for name, kohya in names.items()})


def _list_unet() -> Iterator[tuple[str, str]]:
    yield from _OUTSIDE.items()
    for level, depth in enumerate(_DEPTHS):
        for place in range(_LAYERS_PER_BLOCK):
            theirs = f"input_blocks.{1 + level * (_LAYERS_PER_BLOCK + 1) + place}"
            yield from _list_place(f"down_blocks.{level}", place, theirs, depth)
        if level < len(_DEPTHS) - 1:
            number = (level + 1) * (_LAYERS_PER_BLOCK + 1)
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
    yield from _list_resnet("mid_block.resnets.0", "middle_block.0")
    yield from _list_transformer("mid_block.attentions.0", "middle_block.1", _DEPTHS[-1])
    yield from _list_resnet("mid_block.resnets.1", "middle_block.2")
    for level, depth in enumerate(reversed(_DEPTHS)):
        for place in range(_LAYERS_PER_BLOCK + 1):
            theirs = f"output_blocks.{level * (_LAYERS_PER_BLOCK + 1) + place}"
            yield from _list_place(f"up_blocks.{level}", place, theirs, depth)
        if level < len(_DEPTHS) - 1:
            number = level * (_LAYERS_PER_BLOCK + 1) + _LAYERS_PER_BLOCK
            # The last place of a level holds resnet, attention and what enlarges.
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.2.conv"


def _list_place(block: str, place: int, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    yield from _list_resnet(f"{block}.resnets.{place}", f"{theirs}.0")
    if depth:
        yield from _list_transformer(f"{block}.attentions.{place}", f"{theirs}.1", depth)


def _list_resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for mine, other in _RESNET.items():
        yield f"{ours}.{mine}", f"{theirs}.{other}"


def _list_transformer(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    inner = ["proj_in", "proj_out"]
    for number in range(depth):
        block = f"transformer_blocks.{number}"
        inner += [f"{block}.{attn}.{to}" for attn in ("attn1", "attn2") for to in _ATTENTION]
        inner += [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    for name in inner:
        yield f"{ours}.{name}", f"{theirs}.{name}"
