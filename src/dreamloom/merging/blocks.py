"""Block weights of a LoRA: by pattern, by a block's name, or by the lists of sd-webui.

A weight multiplies the adapter's own once, in every kind of layer: attention, convolutions, and
whatever stands between the blocks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from dreamloom.core.errors import ConfigError
from dreamloom.lora.patterns import B_LORA_BLOCKS, matches


def _number(word: str, count: int, start: int = 0) -> list[str]:
    return [f"{word}{number:02}" for number in range(start, count)]


LISTS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        12: ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *_number("OUT", 6)),
        17: (
            *("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
            *_number("OUT", 12, start=3),
        ),
        20: ("BASE", *_number("IN", 9), "MID", *_number("OUT", 9)),
        26: ("BASE", *_number("IN", 12), "MID", *_number("OUT", 12)),
    }
)
"""Which blocks the numbers of a list are for, by how many there are: 12 for SDXL's attention, 20
for all of SDXL, 17 and 26 for Stable Diffusion 1.x. IN and OUT count the denoiser's input and
output blocks, BASE are the text encoders.

Source:
    The LoRA Block Weight extension of stable-diffusion-webui, README, "Weights Setting".
"""

_LIST_NAMES = (
    "12 for SDXL's attention, 20 for all of SDXL, 17 or 26 for Stable Diffusion 1.x and 2.x"
)
_PER_LEVEL = 3  # input and output blocks at each level of the denoiser, resampling included
_INNER = ("resnets", "attentions")
_BEFORE = ("unet.conv_in", "unet.time_embedding", "unet.add_embedding")


def _place(level: str, number: int) -> tuple[str, ...]:
    return tuple(f"{level}.{kind}.{number}" for kind in _INNER)


def _find_patterns(position: str) -> tuple[str, ...]:
    """The layers of a position such as OUT02, as patterns."""
    if position == "BASE":
        return ("text_encoder", "text_encoder_2")
    if position == "MID":
        return ("unet.mid_block",)
    if position == "IN00":
        return _BEFORE
    if position.startswith("IN"):
        level, number = divmod(int(position[2:]) - 1, _PER_LEVEL)
        block = f"unet.down_blocks.{level}"
        return (f"{block}.downsamplers",) if number == _PER_LEVEL - 1 else _place(block, number)
    level, number = divmod(int(position[3:]), _PER_LEVEL)
    block = f"unet.up_blocks.{level}"
    between = (f"{block}.upsamplers",) if number == _PER_LEVEL - 1 else ()
    return (*_place(block, number), *between)


POSITIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {position: _find_patterns(position) for position in LISTS[26]}
)
"""The layers of each block that lists name, as patterns in diffusers' names."""

WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "all": ("*",),
        **{word: (pattern,) for word, pattern in B_LORA_BLOCKS.items()},
        "text": ("text_encoder", "text_encoder_2"),
        "down": ("unet.down_blocks",),
        "mid": ("unet.mid_block",),
        "up": ("unet.up_blocks",),
        "self-attention": ("attn1",),
        "cross-attention": ("attn2",),
        "feed-forward": ("ff",),
        "convolutions": ("resnets", "downsamplers", "upsamplers", "conv_in", "conv_out"),
        **POSITIONS,
    }
)
"""Names of blocks, as patterns of the layers in them."""


@dataclass(frozen=True)
class BlockWeights:
    """What an adapter's weight is multiplied by in each layer.

    Args:
        rules: Pairs of a pattern and a weight; the last pattern that matches a layer's name
            counts. A layer that none matches has weight 1.
        words: What the user named and must be there, each with its pattern: patterns, and blocks
            that only some base models have.
        positions: The blocks that a list has numbers for, if a list was given.
    """

    rules: Sequence[tuple[str, float]] = ()
    words: Sequence[tuple[str, str]] = ()
    positions: Sequence[str] = ()
    _known: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, layer: str) -> float:
        """The weight of a layer, by its name such as ``unet.mid_block.attentions.0.proj_in``."""
        if layer not in self._known:
            found = (weight for pattern, weight in reversed(self.rules) if matches(pattern, layer))
            self._known[layer] = next(found, 1.0)
        return self._known[layer]

    def check(self, layers: Iterable[str]) -> None:
        """Refuse weights that are for other layers than there are.

        Args:
            layers: The names of all layers that some adapter changes.

        Raises:
            ConfigError: If a pattern matches none of them, or a list has no number for a block
                whose attention changes: it is a list for another base model.
        """
        known = sorted(layers)
        for word, pattern in self.words:
            if not any(matches(pattern, layer) for layer in known):
                raise ConfigError(
                    f"The block weights name {word!r}, which is in no layer that changes.",
                    f"Layers have names such as {known[0]}; write whole parts of them.",
                )
        if not self.positions:
            return
        for layer in known:
            position = find_position(layer)
            if ".attentions." in layer and position and position not in self.positions:
                raise ConfigError(
                    f"The list of {len(self.positions)} block weights has none for {position}, "
                    f"where {layer} changes.",
                    f"Give as many as the base model has blocks: {_LIST_NAMES}.",
                )


NO_BLOCKS = BlockWeights()
"""Weight 1 in every layer."""


def find_position(layer: str) -> str:
    """The block of a layer as lists name it, such as OUT01; empty if they have no name for it."""
    return next(
        (
            position
            for position, patterns in POSITIONS.items()
            if any(matches(pattern, layer) for pattern in patterns)
        ),
        "",
    )


def parse_blocks(text: str) -> BlockWeights:
    """Read block weights as typed.

    ``style=1.2, mid=0`` gives blocks their weights, and leaves 1 everywhere else; what is named
    later counts. A block is a word of `WORDS` or a pattern such as ``up_blocks.1.*.to_v``: whole
    parts of layers' names, ``*`` for anything. A word without a weight has 1, and then everything
    that is not named has 0: ``content`` keeps that block alone. 12, 17, 20 or 26 numbers are a
    list; see `LISTS`. A table in braces is diffusers' nested one, as JSON; see `read_blocks`.

    Raises:
        ConfigError: If it is none of these.

    Example:
        >>> blocks = parse_blocks("all=0.5, style=-1")
        >>> blocks.of("unet.up_blocks.0.attentions.1.proj_in"), blocks.of("unet.conv_in")
        (-1.0, 0.5)
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            return read_blocks(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"The block weights {text!r} are no JSON: {error}.",
                'Write {"down": 0.5, "up": {"block_0": [1, 0.2, 1]}}.',
            ) from None
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    items = [item.strip() for item in text.split(",")] if text else []
    if items and all(_is_number(item) for item in items):
        return _read_list([float(item) for item in items])
    rules: list[tuple[str, float]] = []
    words = []
    alone = False
    for item in items:
        word, equals, weight = (piece.strip() for piece in item.partition("="))
        if not word or _is_number(word) or (equals and not _is_number(weight)):
            raise ConfigError(
                f"The block weights have {item!r}, which is no block with a weight.",
                "Write style=1.2, mid=0, or a list of 12, 17, 20 or 26 numbers.",
            )
        patterns = WORDS.get(word, (word,))
        words += _list_needed(word)
        rules += [(pattern, _check_weight(weight, word) if equals else 1.0) for pattern in patterns]
        alone |= not equals and word != "all"
    return BlockWeights((("*", 0.0), *rules) if alone else tuple(rules), tuple(words))


def read_blocks(value: object) -> BlockWeights:
    """Read block weights from a file: text as typed, a list of numbers, or a table.

    A table has a weight for each block, ``{"style": 1.2, "attn2.to_v": 0}``, or diffusers' nested
    form: ``down``, ``mid`` and ``up``, within ``unet`` or by themselves, each with one weight or
    with ``block_0``, ``block_1`` … of one weight or one for each place of the block. The weight of
    a place holds for its convolutions as for its attention, the last one for what follows the
    places. What is absent has weight 1.

    Raises:
        ConfigError: If it is none of these.

    Example:
        >>> blocks = read_blocks({"up": {"block_1": [0.1, 0.2, 0.3]}})
        >>> blocks.of("unet.up_blocks.1.resnets.1.conv1")
        0.2
    """
    if isinstance(value, str):
        return parse_blocks(value)
    if isinstance(value, list | tuple):
        return _read_list([_check_weight(weight, "the list") for weight in value])
    if isinstance(value, Mapping):
        words: list[tuple[str, str]] = []
        rules = tuple(_read_table(value, words))
        return BlockWeights(rules, tuple(words))
    raise ConfigError(
        f"Block weights cannot be {value!r}.", "Give text, a list of numbers, or a table."
    )


def _read_list(weights: Sequence[float]) -> BlockWeights:
    if len(weights) not in LISTS:
        raise ConfigError(
            f"There is no list of {len(weights)} block weights.", f"Give {_LIST_NAMES}."
        )
    if not all(map(math.isfinite, weights)):
        raise ConfigError("Block weights must be finite numbers.")
    positions = LISTS[len(weights)]
    named = dict(zip(positions, weights, strict=True))
    rules = [("*", 0.0)]
    rules += [
        (pattern, named[position]) for position in positions for pattern in POSITIONS[position]
    ]
    # What follows the last block goes with it, if the list has the last block of its model.
    last = {20: "OUT08", 17: "OUT11", 26: "OUT11"}.get(len(weights))
    rules += [("unet.conv_out", named[last])] if last else []
    return BlockWeights(tuple(rules), positions=positions)


def _read_table(
    table: Mapping[object, object], words: list[tuple[str, str]]
) -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        word = str(key)
        if isinstance(value, Mapping):
            if word == "unet":
                yield from _read_table(value, words)
            elif word in ("down", "up"):
                yield from _read_levels(WORDS[word][0], value)
            else:
                raise ConfigError(
                    f"The block weights have a table for {word!r}.",
                    "Only unet, down and up are made of blocks that can have weights of their own.",
                )
            continue
        patterns = WORDS.get(word, (word,))
        words += _list_needed(word)
        if isinstance(value, list | tuple) and word in ("down", "up"):
            yield from _read_places(f"{patterns[0]}.*", patterns[0], value)
        else:
            if isinstance(value, list | tuple) and len(value) == 1:
                value = value[0]
            weight = _check_weight(value, word)
            yield from ((pattern, weight) for pattern in patterns)


def _read_levels(blocks: str, levels: Mapping[object, object]) -> Iterator[tuple[str, float]]:
    for key, value in levels.items():
        level = re.fullmatch(r"block_(\d+)", str(key))
        if level is None:
            raise ConfigError(
                f"The block weights have {key!r} where a block of down or up belongs.",
                "Name it block_0, block_1 or block_2.",
            )
        block = f"{blocks}.{level[1]}"
        if isinstance(value, list | tuple):
            yield from _read_places(block, block, value)
        else:
            yield block, _check_weight(value, str(key))


def _read_places(block: str, whole: str, weights: Sequence[object]) -> Iterator[tuple[str, float]]:
    numbers = [_check_weight(weight, whole) for weight in weights]
    if not numbers:
        raise ConfigError(f"The block weights of {whole} are an empty list.", "Give numbers.")
    yield whole, numbers[-1]
    if len(numbers) > 1:
        for place, number in enumerate(numbers):
            yield from ((pattern, number) for pattern in _place(block, place))


def _list_needed(word: str) -> list[tuple[str, str]]:
    """What must be there for a word to mean anything: nothing, for what any adapter may lack."""
    if word in WORDS and word not in B_LORA_BLOCKS:
        return []
    return [(word, B_LORA_BLOCKS.get(word, word))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_weight(value: object, where: str) -> float:
    """Turn a weight into a number.

    Raises:
        ConfigError: If it is none, or not finite.
    """
    if isinstance(value, str) and _is_number(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(
            f"The block weight of {where} cannot be {value!r}.", "Give a finite number."
        )
    return float(value)
