"""SDXL's layers, listed once, with the name that each has in the files of other programs.

Kohya's and Stability AI's own code name the denoiser's layers by ``input_blocks``,
``middle_block`` and ``output_blocks``; files write ``_`` for every dot of either naming. Where a
dot was, such a name does not tell, so every layer is listed here. A test holds the list against the
modules of the real classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import MappingProxyType

COMPONENTS = ("unet", "text_encoder_2", "text_encoder")
"""The parts of a pipeline that adapters change, by the first part of their layers' names."""

KOHYA_PREFIXES: Mapping[str, str] = MappingProxyType(
    {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
)

_LAYERS_PER_BLOCK = 2
# Transformer blocks at each level of the denoiser, from the finest; the middle is as the coarsest.
_DEPTHS = (0, 2, 10)
# How many layers each text encoder has, and where transformers keeps them: one has a wrapper, from
# the other transformers 5 took it off.
_TEXT_ENCODERS = {
    "text_encoder": (12, "encoder.layers"),
    "text_encoder_2": (32, "text_model.encoder.layers"),
}
_TEXT_PROJECTION = "text_encoder_2.text_projection"

_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
_SHORTCUT = ("conv_shortcut", "skip_connection")
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
# diffusers' denoisers convolve with these kernels, by the last part of the layer's name.
_KERNELS = {
    **dict.fromkeys(("conv", "conv1", "conv2", "conv_in", "conv_out"), (3, 3)),
    "conv_shortcut": (1, 1),
}


@dataclass(frozen=True)
class SdxlLayer:
    """One layer of SDXL and its names.

    Args:
        name: In diffusers and transformers, after the component, such as
            ``unet.mid_block.attentions.0.proj_in``.
        stability: The same layer in Stability AI's code, such as ``middle_block.1.proj_in``; empty
            for text encoders.
        kohya: In kohya's files, such as ``lora_unet_middle_block_1_proj_in``.
        kohya_diffusers: In files with kohya's endings and diffusers' blocks, such as
            ``lora_unet_mid_block_attentions_0_proj_in``.
    """

    name: str
    stability: str
    kohya: str
    kohya_diffusers: str


@cache
def sdxl_layers() -> Mapping[str, SdxlLayer]:
    """Every linear and convolutional layer of SDXL that adapters may change, by its name."""
    layers = {}
    for ours, theirs in _list_unet():
        name = f"unet.{ours}"
        kohya = KOHYA_PREFIXES["unet"] + theirs.replace(".", "_")
        layers[name] = SdxlLayer(name, theirs, kohya, underscore(name))
    text = [
        f"{component}.{where}.{number}.{part}"
        for component, (count, where) in _TEXT_ENCODERS.items()
        for number, part in product(range(count), _TEXT_LAYERS)
    ]
    for name in (*text, _TEXT_PROJECTION):
        layers[name] = SdxlLayer(name, "", underscore(name), underscore(name))
    return MappingProxyType(layers)


def underscore(name: str) -> str:
    """Name a layer of any base as files with kohya's endings and diffusers' blocks do."""
    component, _, inner = name.partition(".")
    if component.startswith("text_encoder") and inner.startswith("encoder."):
        inner = f"text_model.{inner}"
    return KOHYA_PREFIXES[component] + inner.replace(".", "_")


def respell_text(name: str) -> str:
    """Spell a text encoder's layer as transformers does now; leave other names as they are."""
    component, _, inner = name.partition(".")
    bare = inner.removeprefix("text_model.")
    if component not in _TEXT_ENCODERS or not bare.startswith("encoder.layers."):
        return name
    return f"{component}.{_TEXT_ENCODERS[component][1]}{bare.removeprefix('encoder.layers')}"


def kernel_of(name: str) -> tuple[int, ...]:
    """The kernel of a denoiser's convolution by its name; empty for a linear layer."""
    if not name.startswith("unet."):
        return ()
    return _KERNELS.get(name.rpartition(".")[2], ())


def _list_unet() -> Iterator[tuple[str, str]]:
    yield from _OUTSIDE.items()
    for level, depth in enumerate(_DEPTHS):
        for place in range(_LAYERS_PER_BLOCK):
            theirs = f"input_blocks.{1 + level * (_LAYERS_PER_BLOCK + 1) + place}"
            # Where a level begins, there are more channels than before: the shortcut is a layer.
            widens = level > 0 and place == 0
            yield from _list_place(f"down_blocks.{level}", place, theirs, depth, widens)
        if level < len(_DEPTHS) - 1:
            number = (level + 1) * (_LAYERS_PER_BLOCK + 1)
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
    yield from _list_resnet("mid_block.resnets.0", "middle_block.0", False)
    yield from _list_transformer("mid_block.attentions.0", "middle_block.1", _DEPTHS[-1])
    yield from _list_resnet("mid_block.resnets.1", "middle_block.2", False)
    for level, depth in enumerate(reversed(_DEPTHS)):
        for place in range(_LAYERS_PER_BLOCK + 1):
            theirs = f"output_blocks.{level * (_LAYERS_PER_BLOCK + 1) + place}"
            # Each takes in what the way down kept, and so has a shortcut.
            yield from _list_place(f"up_blocks.{level}", place, theirs, depth, True)
        if level < len(_DEPTHS) - 1:
            number = level * (_LAYERS_PER_BLOCK + 1) + _LAYERS_PER_BLOCK
            # The last place of a level holds resnet, attention and what enlarges.
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.2.conv"


def _list_place(
    block: str, place: int, theirs: str, depth: int, widens: bool
) -> Iterator[tuple[str, str]]:
    yield from _list_resnet(f"{block}.resnets.{place}", f"{theirs}.0", widens)
    if depth:
        yield from _list_transformer(f"{block}.attentions.{place}", f"{theirs}.1", depth)


def _list_resnet(ours: str, theirs: str, widens: bool) -> Iterator[tuple[str, str]]:
    for mine, other in (*_RESNET.items(), *((_SHORTCUT,) if widens else ())):
        yield f"{ours}.{mine}", f"{theirs}.{other}"


def _list_transformer(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    inner = ["proj_in", "proj_out"]
    for number in range(depth):
        block = f"transformer_blocks.{number}"
        inner += [f"{block}.{attn}.{to}" for attn in ("attn1", "attn2") for to in _ATTENTION]
        inner += [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    for name in inner:
        yield f"{ours}.{name}", f"{theirs}.{name}"
