"""Faces in picturebook's drawings, so that detectors can be tried without photographs.

A person drawn from the front has two large eyes of one known build: a white ellipse, a round iris,
a dark pupil. They are looked for as such, by comparing brightness with a drawn eye wherever an eye
may lie. Side views, animals and eyes behind glasses are no such eyes, and are not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from dreamloom.evaluation.detectors.landmarks import Eye, Face, FaceLandmarks, SourceKind
from dreamloom.picturebook.pen import UNITS_HIGH, Pen
from dreamloom.picturebook.wear import EYE_PAINT, draw_eye

LEAST_LIKENESS = 0.6
"""Correlation of brightness with a drawn eye from which on it is one; 1 is the same."""

_ONLY_EYES = "drawn faces are only found from the front"
_ZOOMS = (0.86, 0.92, 0.98, 1.04, 1.1)
# In picture units, from world.py and figures.py: where eyes can lie, before the zoom.
_EYE_APART, _EYE_Y = (22.1, 25.9), -3.0
_HEAD_X, _HEAD_Y = 128.0, 139.0
_SHIFT_X, _SHIFT_Y = (-0.06, 0.06), (-0.02, 0.04)
_IRIS, _LIDS, _DOWN = 10.5, (13.0, 11.5), 1.0
_REACH, _OUTLINE = 15.0, (14.5, 13.0)
_MOST_SLANTED = 2.5
_FINE = 4
_ROUND = np.linspace(0, 2 * np.pi, 24, endpoint=False)


class _Found(NamedTuple):
    likeness: float
    x: float
    y: float
    zoom: float


class DrawnFaces:
    """Finds the two eyes of a person that picturebook drew from the front."""

    key = "picturebook-drawn-eyes-1"
    kind: SourceKind = "drawings"
    least_iris_px = 6.0
    cannot: Mapping[str, str] = {
        "eye_shape": "all drawn eyes are taken for one shape",
        "teeth": "drawn mouths have no single teeth",
        "extra_faces": _ONLY_EYES,
        "missing_face": _ONLY_EYES,
    }

    def find(self, image: Image.Image) -> FaceLandmarks:
        """Find the face of a square RGB drawing; none if its eyes are not seen from the front."""
        size = (image.height, image.width)
        grey = np.asarray(image.convert("L"), dtype=float)
        unit_px = image.height / UNITS_HIGH
        pairs = (self._pair(grey, unit_px, zoom) for zoom in _ZOOMS)
        first, second = max(pairs, key=lambda pair: min(eye.likeness for eye in pair))
        if min(first.likeness, second.likeness) < LEAST_LIKENESS:
            return FaceLandmarks(size, ())
        half = 62 * first.zoom * unit_px
        middle = (first.x + second.x) / 2
        face = Face(
            box=(middle - half, first.y - half, middle + half, first.y + half),
            eyes=(_draw_round(first, unit_px), _draw_round(second, unit_px)),
            turn_degrees=(0.0, 0.0, 0.0),
        )
        return FaceLandmarks(size, (face,))

    def _pair(
        self, grey: Float[np.ndarray, "height width"], unit_px: float, zoom: float
    ) -> tuple[_Found, _Found]:
        """Find the best pair of eyes of one size: level, and as far apart as eyes are drawn."""
        likeness, corner = _compare(grey, unit_px, zoom)
        if not likeness.size:
            nothing = _Found(-1.0, 0.0, 0.0, zoom)
            return nothing, nothing
        best, rows, columns = (-1.0, 0, 0, 0, 0), *likeness.shape
        nearest, farthest = (2 * apart * zoom * unit_px for apart in _EYE_APART)
        slant = round(_MOST_SLANTED * unit_px)
        gaps = range(int(nearest), int(np.ceil(farthest)) + 1)
        for gap, drop in product(gaps, range(-slant, slant + 1)):
            if gap >= columns or abs(drop) >= rows:
                continue
            upper, lower = max(0, -drop), rows - max(0, drop)
            left = likeness[upper:lower, : columns - gap]
            right = likeness[upper + drop : lower + drop, gap:]
            both = np.minimum(left, right)
            row, column = np.unravel_index(int(both.argmax()), both.shape)
            if both[row, column] > best[0]:
                best = (
                    float(both[row, column]),
                    *(int(row) + upper, int(column), int(row) + upper + drop, int(column) + gap),
                )
        first, second = (
            _Found(float(likeness[row, column]), corner[0] + column, corner[1] + row, zoom)
            for row, column in (best[1:3], best[3:5])
        )
        return first, second


def _compare(
    grey: Float[np.ndarray, "height width"], unit_px: float, zoom: float
) -> tuple[Float[np.ndarray, "rows columns"], tuple[float, float]]:
    """Correlate all places where eyes may lie with a drawn eye.

    Returns:
        The likeness by place of the eye's centre, and where the first place is.
    """
    middle, reach = grey.shape[1] / 2, (_REACH + _EYE_APART[1]) * zoom
    left = max(0, int(middle + (_SHIFT_X[0] * UNITS_HIGH - reach) * unit_px))
    right = int(np.ceil(middle + (_SHIFT_X[1] * UNITS_HIGH + reach) * unit_px)) + 1
    highest = _HEAD_Y + _SHIFT_Y[0] * UNITS_HIGH + (_EYE_Y - _REACH) * zoom
    lowest = _HEAD_Y + _SHIFT_Y[1] * UNITS_HIGH + (_EYE_Y + _REACH) * zoom
    top, bottom = max(0, int(highest * unit_px)), int(np.ceil(lowest * unit_px)) + 1
    templates = _templates(round(unit_px, 6), zoom)
    likenesses = [_correlate(grey[top:bottom, left:right], template) for template in templates]
    half = templates[0].shape[0] // 2
    return np.max(likenesses, axis=0), (left + half + 0.5, top + half + 0.5)


@cache
def _templates(unit_px: float, zoom: float) -> tuple[Float[np.ndarray, "side side"], ...]:
    """Draw eyes of a dark and a light iris, in grey and centred; nan around them."""
    side = 2 * round(_REACH * zoom * unit_px) + 1
    middle = side * _FINE / 2
    places = (np.arange(side) - side // 2) / (unit_px * zoom)
    around = np.hypot(places[None, :] / _OUTLINE[0], places[:, None] / _OUTLINE[1]) > 1
    drawn = []
    for iris in (EYE_PAINT["brown"], EYE_PAINT["gray"]):
        image = Image.new("RGB", (side * _FINE, side * _FINE))
        draw_eye(Pen(image, middle, middle, unit_px * zoom * _FINE), 0, 0, iris)
        grey = image.convert("L").resize((side, side), Image.Resampling.BOX)
        drawn.append(np.where(around, np.nan, np.asarray(grey, dtype=float)))
    return tuple(drawn)


def _correlate(
    area: Float[np.ndarray, "height width"], template: Float[np.ndarray, "side side"]
) -> Float[np.ndarray, "rows columns"]:
    """Correlate a template with each place of an area; brightness and contrast do not matter."""
    if min(area.shape) < len(template):
        return np.zeros((0, 0))
    known = np.isfinite(template)
    windows = sliding_window_view(area, template.shape)[..., known]
    wanted = template[known] - template[known].mean()
    spread = np.maximum(windows.std(axis=-1), 1.0)
    return np.asarray((windows @ wanted) / (len(wanted) * spread * wanted.std()))


def _draw_round(found: _Found, unit_px: float) -> Eye:
    scale = found.zoom * unit_px
    centre = np.array([found.x, found.y + _DOWN * scale])
    circle = np.column_stack([np.cos(_ROUND), np.sin(_ROUND)])
    return Eye(
        centre=centre,
        rim=centre + circle * _IRIS * scale,
        lids=centre + circle * np.array(_LIDS) * scale,
    )
