"""Small drawings as SVG text: score bars between floor and ceiling, and curves of the loss.

Colours are left to the page: every shape bears a class, so light, dark and print share one SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

_BAR_WIDTH, _BAR_ROW, _BAR_LABEL = 360.0, 24.0, 104.0
_CHART_WIDTH, _CHART_HEIGHT = 430.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 10.0, 26.0, 36.0
_MOST_POINTS = 800

_Scale: TypeAlias = Callable[[float], float]


@dataclass(frozen=True)
class Bar:
    """One score of a bar drawing."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    kind: str = "score"
    """Becomes part of the shape's class, so that the page can colour it."""


def score_bars(
    bars: Sequence[Bar],
    floor: float | None = None,
    ceiling: float | None = None,
    *,
    floor_label: str = "floor",
    ceiling_label: str = "ceiling",
) -> str:
    """Draw scores with their intervals on one scale, between the floor and the ceiling.

    The scale spans everything drawn, so a score above the ceiling stays visible. Floor and ceiling
    are named on different sides, below and above, so that their labels never collide.

    Raises:
        ValueError: If there is no score to draw.
    """
    if not bars:
        raise ValueError("there must be at least one score")
    shown = [bar.value for bar in bars] + [v for v in (floor, ceiling) if v is not None]
    shown += [end for bar in bars if bar.interval for end in bar.interval]
    low, high = min(shown), max(shown)
    margin = 0.08 * (high - low) or 0.05
    left, right = _BAR_LABEL + 4, _BAR_WIDTH - 42
    top = 18.0 if ceiling is not None else 4.0
    bottom = top + _BAR_ROW * len(bars)
    height = bottom + (18.0 if floor is not None else 4.0)

    def x(value: float) -> float:
        return left + (right - left) * (value - low + margin) / (high - low + 2 * margin)

    parts = []
    if floor is not None and ceiling is not None and ceiling > floor:
        width = x(ceiling) - x(floor)
        parts.append(
            f'<rect class="span" x="{x(floor):.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{bottom - top:.1f}"/>'
        )
    for value, name, y, kind in (
        (floor, floor_label, bottom + 13, "floor"),
        (ceiling, ceiling_label, top - 7, "ceiling"),
    ):
        if value is not None:
            parts.append(
                f'<line class="{kind}" x1="{x(value):.1f}" x2="{x(value):.1f}" '
                f'y1="{top:.1f}" y2="{bottom:.1f}"/>'
                + _edge_text(f"{name} {value:.3f}", x(value), y, left, right)
            )
    for index, bar in enumerate(bars):
        parts.append(_bar(bar, top + _BAR_ROW * (index + 0.5), x))
    spoken = "; ".join(_spoken(bar) for bar in bars)
    return _svg(_BAR_WIDTH, height, "bars", spoken, parts)


def _bar(bar: Bar, y: float, x: _Scale) -> str:
    kind = escape(bar.kind)
    parts = [f'<text class="name" x="0" y="{y + 4:.1f}">{escape(bar.label)}</text>']
    if bar.interval is not None:
        start, end = x(bar.interval[0]), x(bar.interval[1])
        parts.append(
            f'<rect class="interval {kind}" x="{start:.1f}" y="{y - 5:.1f}" '
            f'width="{max(end - start, 1):.1f}" height="10" rx="5"/>'
        )
    parts.append(f'<circle class="dot {kind}" cx="{x(bar.value):.1f}" cy="{y:.1f}" r="4.5"/>')
    parts.append(
        f'<text class="value" x="{_BAR_WIDTH:.0f}" y="{y + 4:.1f}" text-anchor="end">'
        f"{bar.value:.3f}</text>"
    )
    return "".join(parts)


def _spoken(bar: Bar) -> str:
    between = f" ({bar.interval[0]:.3f} to {bar.interval[1]:.3f})" if bar.interval else ""
    return f"{bar.label}: {bar.value:.3f}{between}"


def _edge_text(text: str, x: float, y: float, left: float, right: float) -> str:
    """Write a text centred on ``x``, pushed inwards where it would leave the drawing."""
    half = 2.9 * len(text)
    x = min(max(x, left + half - 20), right + 42 - half)
    return f'<text class="mark" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def loss_chart(
    updates: Sequence[int],
    lines: Mapping[str, Sequence[float | None]],
    *,
    highest: float | None = None,
    title: str = "Loss",
) -> str:
    """Draw losses over updates: every value light, their moving mean strong.

    Args:
        updates: The number of each logged update, rising.
        lines: Values by name, as long as ``updates``; None where there is none.
        highest: Top of the scale, so that two charts can share it; None fits it to the values.
        title: What a screen reader says of the drawing.

    Raises:
        ValueError: If there is no update, or a line's length differs.
    """
    if not updates or any(len(values) != len(updates) for values in lines.values()):
        raise ValueError("each line needs as many values as there are updates, and at least one")
    known = [v for values in lines.values() for v in values if v is not None and math.isfinite(v)]
    rows = ticks(0.0, highest or max(known, default=1.0) or 1.0)
    first, last = float(updates[0]), float(max(updates[-1], updates[0] + 1))

    def x(update: float) -> float:
        return _LEFT + (_CHART_WIDTH - _LEFT - _RIGHT) * (update - first) / (last - first)

    def y(value: float) -> float:
        share = min(value / rows[-1], 1.0)
        return _CHART_HEIGHT - _BOTTOM - (_CHART_HEIGHT - _TOP - _BOTTOM) * share

    parts = _axes(rows, [t for t in ticks(first, last) if first <= t <= last], x, y)
    strong: list[str] = []
    legend: list[str] = []
    for name, values in lines.items():
        points = [
            (float(u), v)
            for u, v in zip(updates, values, strict=True)
            if v is not None and math.isfinite(v)
        ]
        if not points:
            continue
        kind = escape(name)
        parts.append(_line(f"raw {kind}", thin(points), x, y))
        means = smooth([value for _, value in points], smoothing_window(len(points)))
        smoothed = [(at, mean) for (at, _), mean in zip(points, means, strict=True)]
        strong.append(_line(f"smooth {kind}", thin(smoothed), x, y))
        start = _LEFT + 84 * len(legend)
        legend.append(
            f'<line class="smooth {kind}" x1="{start:.0f}" x2="{start + 16:.0f}" y1="9" y2="9"/>'
            f'<text x="{start + 22:.0f}" y="13">{kind}</text>'
        )
    return _svg(_CHART_WIDTH, _CHART_HEIGHT, "curve", title, parts + strong + legend)


def _axes(rows: list[float], columns: list[float], x: _Scale, y: _Scale) -> list[str]:
    parts = []
    for value in rows:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_CHART_WIDTH - _RIGHT}" '
            f'y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{_LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    base = _CHART_HEIGHT - _BOTTOM
    for value in columns:
        parts.append(
            f'<text x="{x(value):.1f}" y="{base + 16:.1f}" text-anchor="middle">{value:g}</text>'
        )
    middle = (_LEFT + _CHART_WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{_CHART_HEIGHT - 4}" text-anchor="middle">update</text>'
    )
    return parts


def _line(kind: str, points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def smoothing_window(count: int) -> int:
    """How many values the moving mean of a curve covers: about a fifteenth, and an odd number."""
    return max(1, count // 15) | 1


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Take the mean around each value; at the ends over as much as there is.

    Args:
        values: The values, in order.
        window: How many values each mean covers, an odd number.

    Example:
        >>> smooth([0.0, 3.0, 6.0, 3.0], 3)
        [1.5, 3.0, 4.0, 4.5]
    """
    reach = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for index in range(len(values)):
        start, end = max(0, index - reach), min(len(values), index + reach + 1)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def thin(
    points: Sequence[tuple[float, float]], most: int = _MOST_POINTS
) -> list[tuple[float, float]]:
    """Keep a long curve's look with few points: the lowest and highest of each stretch."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly apart, from at or below ``low`` to at or above ``high``.

    Example:
        >>> ticks(0.0, 0.37)
        [0.0, 0.1, 0.2, 0.3, 0.4]
    """
    rough = (high - low) / max(most - 1, 1) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    start = math.floor(low / step + 1e-9)
    end = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(start, end + 1)]


def _svg(width: float, height: float, kind: str, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
