"""Plot the Pareto front of a search: what is kept of the subject against what of the style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TypeAlias

from dreamloom.experiments.merge_search.findings import Tried
from dreamloom.report.plots import ticks

_WIDTH, _HEIGHT = 560.0, 460.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 24.0, 34.0, 58.0
_COLOURS = ("#d9e6f2", "#08306b")
"""Of the least and the greatest share of the prompts."""
_CURVE_POINTS = 60

_Place: TypeAlias = Callable[[float, float], tuple[float, float]]


def draw_front(
    tried: Sequence[Tried], front: Sequence[str], winner: str, labelled: dict[str, str]
) -> str:
    """Draw candidates by what they keep, as an SVG that stands alone.

    Across is the subject, up is the style, and the darker a point the more is kept of the prompts.
    Candidates on the front have a ring; thin curves join what is worth the same by the harmonic
    mean of both.

    Args:
        tried: Candidates that have drawn the same pictures.
        front: Names of those on the front.
        winner: Its name.
        labelled: What others are called, by name.

    Raises:
        ValueError: If no candidate has both subject and style measured.
    """
    shown = [one for one in tried if {"identity", "style"} <= set(one.kept)]
    if not shown:
        raise ValueError("no candidate has both subject and style measured")
    columns = _span([one.kept["identity"] for one in shown])
    rows = _span([one.kept["style"] for one in shown])
    prompts = [one.kept["prompt"] for one in shown if "prompt" in one.kept]

    def place(across: float, up: float) -> tuple[float, float]:
        x = (across - columns[0]) / (columns[-1] - columns[0])
        y = (up - rows[0]) / (rows[-1] - rows[0])
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * x,
            _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * y,
        )

    parts = [*_draw_axes(columns, rows, place), *_draw_curves(columns, rows, place)]
    names = {**labelled, winner: f"winner{': ' + labelled[winner] if winner in labelled else ''}"}
    # What is named is drawn last, on top.
    for one in sorted(shown, key=lambda one: one.name in names):
        x, y = place(one.kept["identity"], one.kept["style"])
        colour = _shade(one.kept.get("prompt"), prompts)
        kept = ", ".join(f"{aim} {_number(share)}" for aim, share in one.kept.items())
        if one.name in front:
            parts.append(f'<circle class="front" cx="{x:.1f}" cy="{y:.1f}" r="9"/>')
        parts.append(
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}">'
            f"<title>{escape(f'{one.name}: {kept}')}</title></circle>"
        )
        if one.name in names:
            # Near the right edge a label stands on the other side of its point.
            is_right = x > _WIDTH - 150
            at, anchor = (x - 13, "end") if is_right else (x + 13, "start")
            parts.append(
                f'<text class="name" x="{at:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
                f"{escape(names[one.name])}</text>"
            )
    parts += _draw_legend(prompts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" '
        f'width="{_WIDTH:.0f}" height="{_HEIGHT:.0f}" role="img">'
        f"<title>What each candidate keeps of subject, style and prompts</title>"
        f"<style>{_STYLE}</style>"
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}"
    ".name{font-weight:600;paint-order:stroke;stroke:#fff;stroke-width:3px}"
    ".grid{stroke:#e4e4e4}.curve{fill:none;stroke:#c9b37e;stroke-dasharray:3 3}"
    ".mark{fill:#9a844c;font-size:11px}.point{stroke:#333;stroke-width:.8}"
    ".front{fill:none;stroke:#c2410c;stroke-width:1.8}"
)


def _span(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), 0.05)
    return ticks(low - margin, high + margin)


def _draw_axes(columns: Sequence[float], rows: Sequence[float], place: _Place) -> list[str]:
    parts = []
    for value in columns:
        (x, low), (_, high) = place(value, rows[0]), place(value, rows[-1])
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            f'<text x="{x:.1f}" y="{low + 18:.1f}" text-anchor="middle">{_number(value)}</text>'
        )
    for value in rows:
        (left, y), (right, _) = place(columns[0], value), place(columns[-1], value)
        parts.append(
            f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    upright = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{_HEIGHT - 16:.1f}" text-anchor="middle">subject kept</text>'
        f'<text transform="translate(15 {upright:.1f}) rotate(-90)" text-anchor="middle">'
        f"style kept</text>"
    )
    return parts


def _draw_curves(columns: Sequence[float], rows: Sequence[float], place: _Place) -> list[str]:
    """Draw where the harmonic mean of both is the same: y = h x / (2 x − h)."""
    parts = []
    for tenth in range(1, 10):
        mean = tenth / 10
        points = []
        for step in range(_CURVE_POINTS + 1):
            x = mean / 2 + 0.01 + (1.0 - mean / 2) * step / _CURVE_POINTS
            y = mean * x / (2 * x - mean)
            if columns[0] <= x <= columns[-1] and rows[0] <= y <= rows[-1]:
                points.append(place(x, y))
        if len(points) > 2:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            x, y = points[-1]
            parts.append(
                f'<polyline class="curve" points="{path}"/>'
                f'<text class="mark" x="{x - 4:.1f}" y="{y - 4:.1f}" text-anchor="end">'
                f"{mean}</text>"
            )
    return parts


def _draw_legend(prompts: Sequence[float]) -> list[str]:
    parts = [
        f'<circle class="front" cx="{_LEFT + 8:.1f}" cy="16" r="8"/>'
        f'<text x="{_LEFT + 22:.1f}" y="20">on the front</text>'
    ]
    if len(set(prompts)) > 1:
        for place, (value, colour) in enumerate(
            zip((min(prompts), max(prompts)), _COLOURS, strict=True)
        ):
            x = _LEFT + 130 + 150 * place
            parts.append(
                f'<circle class="point" cx="{x:.1f}" cy="16" r="5.5" fill="{colour}"/>'
                f'<text x="{x + 12:.1f}" y="20">{_number(value)} of the prompts</text>'
            )
    return parts


def _shade(value: float | None, prompts: Sequence[float]) -> str:
    """Mix the colour of a share of the prompts; the darker, the more."""
    if value is None or len(set(prompts)) < 2:
        return _COLOURS[1]
    share = (value - min(prompts)) / (max(prompts) - min(prompts))
    ends = zip(*(bytes.fromhex(colour[1:]) for colour in _COLOURS), strict=True)
    return "#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in ends)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "−")
