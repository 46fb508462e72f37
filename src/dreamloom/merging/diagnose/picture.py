"""Draw a diagnosis of two LoRAs: heat maps by block and kind of layer, error against rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from dreamloom.merging.diagnose.measuring import (
    KINDS,
    Diagnosis,
    Together,
    block_of,
    group_layers,
    kind_of,
    sort_blocks,
)

Rgb: TypeAlias = tuple[int, int, int]

_CELL = (52, 24)
_NAMES_PX, _HEAD_PX, _GAP_PX, _EDGE_PX = 168, 58, 26, 18
_INK, _FAINT, _PAPER, _ABSENT = (32, 33, 36), (110, 113, 118), (255, 255, 255), (238, 238, 240)
# Ends that stay apart for all kinds of colour vision; the middle is the paper's colour.
_BLUE, _ORANGE, _PURPLE = (33, 102, 172), (203, 90, 20), (84, 39, 143)


@dataclass(frozen=True)
class _Map:
    """One heat map: what it shows, and how a value becomes a colour and a text."""

    title: str
    value: Callable[[Together], float | None]
    colour: Callable[[float], Rgb]
    text: Callable[[float], str]


def draw_diagnosis(diagnosis: Diagnosis) -> Image.Image:
    """Draw four maps (energy, cosine, overlap of inputs and of outputs) and the cost of a rank.

    Each cell stands for the layers of one kind in one block, put together by their energy; a grey
    cell is not changed by both adapters.
    """
    blocks = sort_blocks({block_of(pair.layer) for pair in diagnosis.pairs})
    used = {kind_of(pair.layer) for pair in diagnosis.pairs}
    kinds = [kind for kind in KINDS if kind in used]
    cells = {group.name: group.together for group in group_layers(diagnosis, kinds=True)}
    maps = _list_maps(diagnosis)
    map_px = (_NAMES_PX + _CELL[0] * len(kinds), _HEAD_PX + _CELL[1] * len(blocks))
    columns = 2
    rows = math.ceil(len(maps) / columns)
    chart_px = 210
    width = max(columns * map_px[0] + (columns - 1) * _GAP_PX, 760) + 2 * _EDGE_PX
    height = 64 + rows * (map_px[1] + _GAP_PX) + chart_px + _EDGE_PX
    picture = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    _write_title(draw, diagnosis)
    for number, one in enumerate(maps):
        left = _EDGE_PX + (number % columns) * (map_px[0] + _GAP_PX)
        top = 64 + (number // columns) * (map_px[1] + _GAP_PX)
        _draw_map(draw, (left, top), one, blocks, kinds, cells)
    top = 64 + rows * (map_px[1] + _GAP_PX)
    _draw_errors(draw, (_EDGE_PX, top, width - _EDGE_PX, top + chart_px), diagnosis.together)
    return picture


def _list_maps(diagnosis: Diagnosis) -> list[_Map]:
    one, other = diagnosis.names
    return [
        _Map(
            f"energy of {one} : {other} (orange: {one} is stronger)",
            lambda together: together.ratio and 2 * math.log2(together.ratio),
            lambda value: _blend(_ORANGE if value > 0 else _BLUE, abs(value) / 6),
            lambda value: _spell_ratio(2**value),
        ),
        _Map(
            "cosine (orange: the same way, blue: against each other)",
            lambda together: together.cosine,
            lambda value: _blend(_ORANGE if value > 0 else _BLUE, abs(value)),
            lambda value: f"{value:+.2f}" if abs(value) >= 0.005 else "0",
        ),
        _Map(
            f"how much of {one} lies in the inputs of {other}, percent",
            lambda together: together.row_overlap and together.row_overlap[0],
            lambda value: _blend(_PURPLE, value),
            lambda value: f"{100 * value:.0f}",
        ),
        _Map(
            f"how much of {one} lies in the outputs of {other}, percent",
            lambda together: together.column_overlap and together.column_overlap[0],
            lambda value: _blend(_PURPLE, value),
            lambda value: f"{100 * value:.0f}",
        ),
    ]


def _spell_ratio(energy: float) -> str:
    if energy >= 1:
        return f"{min(energy, 999):.1f}:1" if energy < 10 else f"{min(energy, 999):.0f}:1"
    return f"1:{min(1 / energy, 999):.1f}" if energy > 0.1 else f"1:{min(1 / energy, 999):.0f}"


def _blend(colour: Rgb, share: float) -> Rgb:
    """Mix a colour with the paper: 0 is the paper, 1 the colour."""
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (
        round(paper + (end - paper) * share) for paper, end in zip(_PAPER, colour, strict=True)
    )
    return red, green, blue


def _write_title(draw: ImageDraw.ImageDraw, diagnosis: Diagnosis) -> None:
    together = diagnosis.together
    named = " and ".join(
        name if weight == 1 else f"{name} at {weight:g}"
        for name, weight in zip(diagnosis.names, diagnosis.weights, strict=True)
    )
    draw.text((_EDGE_PX, 14), named, _INK, _font(19))
    facts = [f"{together.layers} layers, {together.shared} of both"]
    facts.append(f"norms {together.norms[0]:.3g} and {together.norms[1]:.3g}")
    if together.cosine is not None:
        facts.append(f"cosine {together.cosine:+.3f}")
    if together.row_overlap and together.row_chance:
        facts.append(
            f"overlap of inputs {together.row_overlap[0]:.0%} "
            f"(by chance {together.row_chance[0]:.0%})"
        )
    draw.text((_EDGE_PX, 40), "    ".join(facts), _FAINT, _font(13))


def _draw_map(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    one: _Map,
    blocks: Sequence[str],
    kinds: Sequence[str],
    cells: dict[str, Together],
) -> None:
    left, top = corner
    draw.text((left, top), one.title, _INK, _font(14))
    for at, kind in enumerate(kinds):
        x = left + _NAMES_PX + at * _CELL[0] + _CELL[0] // 2
        for line, word in enumerate(kind.split(" ", 1)):
            draw.text((x, top + 26 + 13 * line), word, _FAINT, _font(11), anchor="mt")
    for row, block in enumerate(blocks):
        y = top + _HEAD_PX + row * _CELL[1]
        draw.text((left, y + _CELL[1] // 2), block, _INK, _font(12), anchor="lm")
        for at, kind in enumerate(kinds):
            x = left + _NAMES_PX + at * _CELL[0]
            box = (x, y, x + _CELL[0] - 2, y + _CELL[1] - 2)
            found = cells.get(f"{block} {kind}")
            value = None if found is None or not found.shared else one.value(found)
            if value is None:
                if found is not None:
                    draw.rectangle(box, _ABSENT)
                continue
            fill = one.colour(value)
            draw.rectangle(box, fill)
            ink = _PAPER if sum(fill) < 380 else _INK
            middle = (x + _CELL[0] // 2 - 1, y + _CELL[1] // 2 - 1)
            draw.text(middle, one.text(value), ink, _font(11), anchor="mm")


def _draw_errors(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], together: Together
) -> None:
    """Draw how far off the sum is once it is cut to a rank."""
    left, top, right, bottom = box
    draw.text((left, top), "error of the sum when it is cut to a rank", _INK, _font(14))
    ranks, errors = list(together.errors), list(together.errors.values())
    highest = max(errors) or 1.0
    x0, x1, y0, y1 = left + 44, min(right, left + 640), top + 46, bottom - 34
    points = []
    for at, (rank, error) in enumerate(zip(ranks, errors, strict=True)):
        x = x0 + 20 + (x1 - x0 - 40) * at / max(len(ranks) - 1, 1)
        y = y1 - (y1 - y0) * error / highest
        points.append((x, y))
        draw.text((x, y1 + 8), str(rank), _FAINT, _font(11), anchor="mt")
        draw.text((x, y - 8), f"{error:.1%}", _INK, _font(11), anchor="mb")
    draw.line((x0, y1, x1, y1), _FAINT)
    draw.text((x0 - 6, y1 + 8), "rank", _FAINT, _font(11), anchor="rt")
    if len(points) > 1:
        draw.line(points, _PURPLE, 2)
    for x, y in points:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), _PURPLE)


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)
