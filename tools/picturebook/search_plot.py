"""The picture of the search: what each setting does to likeness and to obedience, with margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tools.picturebook.search_design import Effect

_WIDTH, _ROW, _TOP, _BOTTOM = 720.0, 34.0, 64.0, 40.0
_NAMES, _MARGIN, _REACH = 150.0, 24.0, 0.5
_COLOURS = ("#2b6777", "#b4641e")
_INK, _LINE = "#4a463f", "#d9d1c2"


def draw_effects(measures: Mapping[str, Mapping[str, Effect]]) -> str:
    """Draw the effects on two measures as an SVG: a bar for each, a line for its interval.

    Settings are sorted by what they do to the first. What is not clear is pale.

    Args:
        measures: Two measures by what they are called, each with the effects by setting.

    Raises:
        ValueError: If there are not two.
    """
    if len(measures) != 2:
        raise ValueError(f"two measures are drawn, got {len(measures)}")
    first = next(iter(measures.values()))
    order = sorted(first, key=lambda name: -first[name].value)
    height = _TOP + _ROW * len(order) + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:g}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{_WIDTH:g}" height="{height:g}" fill="#fffefb"/>',
        *_draw_legend(list(measures)),
        *_draw_scale(height),
    ]
    for row, name in enumerate(order):
        y = _TOP + _ROW * (row + 0.5)
        parts.append(_text(_NAMES - 12, y + 4, name, "end"))
        for place, effects in enumerate(measures.values()):
            parts += _draw_bar(effects[name], y + 11 * (place - 0.5), _COLOURS[place])
    return "\n".join([*parts, "</svg>", ""])


def _across(value: float) -> float:
    width = _WIDTH - _NAMES - _MARGIN
    return _NAMES + width * (value + _REACH) / (2 * _REACH)


def _draw_bar(effect: Effect, y: float, colour: str) -> list[str]:
    low, high = sorted((_across(0), _across(effect.value)))
    ends = [_across(effect.value + side * effect.margin) for side in (-1, 1)]
    shade = "1" if effect.is_clear else "0.3"
    return [
        f'<rect x="{low:.1f}" y="{y - 4:.1f}" width="{high - low:.1f}" height="8" '
        f'fill="{colour}" opacity="{shade}"/>',
        f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
        f'stroke="{_INK}" stroke-width="1"/>',
    ]


def _draw_scale(height: float) -> list[str]:
    parts = []
    for tenths in range(-4, 5, 2):
        x, value = _across(tenths / 10), tenths / 10
        colour = _INK if tenths == 0 else _LINE
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP:g}" y2="{height - _BOTTOM:g}" '
            f'stroke="{colour}"/>'
        )
        sign = "−" if value < 0 else "+" if value > 0 else ""
        parts.append(_text(x, height - _BOTTOM + 18, f"{sign}{abs(value):g}", "middle"))
    return parts


def _draw_legend(names: Sequence[str]) -> list[str]:
    parts = [_text(_NAMES, 20, "Effect from the lower value to the higher, with 95 %", "start")]
    for place, name in enumerate(names):
        x = _NAMES + 250 * place
        parts.append(f'<rect x="{x:g}" y="34" width="14" height="10" fill="{_COLOURS[place]}"/>')
        parts.append(_text(x + 20, 44, name, "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} fill="{_INK}">{escape(text)}</text>'
