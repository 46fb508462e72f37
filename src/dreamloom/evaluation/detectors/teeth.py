"""Teeth in an open mouth, judged without weights: an experiment, and the weakest of the detectors.

It sees two coarse faults only: more than two rows of teeth one above the other, and teeth on one
side of the mouth. Teeth of a wrong number, size or shape are beyond it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from dreamloom.evaluation.detectors.colour import LUMINANCE, to_lab, to_light
from dreamloom.evaluation.detectors.eyes import Abstention, EyePixels
from dreamloom.evaluation.detectors.landmarks import Points

LEAST_OPENING = 0.2
"""A mouth is open if the lips' inner edge is this high, by its width."""
LEAST_WIDTH_PX = 32.0
# Of CIELAB, once the mouth's brightest spot is set to white: lips, tongue and gums are redder.
_TOOTH_LIGHTNESS, _TOOTH_REDNESS = 55.0, 14.0
_FEWEST_SHARE = 0.05
_LEAST_ROW = 0.06


class Teeth(NamedTuple):
    """What an open mouth shows."""

    crowded: float
    """Share of the columns with teeth that have three or more rows of them, 0 to 1."""
    lopsided: float
    """How far the middle of the teeth lies beside the mouth's, in half widths: 0 is centred."""


def measure_teeth(pixels: EyePixels, mouth: Points) -> Teeth | Abstention:
    """Measure how teeth lie in a mouth.

    Args:
        pixels: The whole picture, sRGB.
        mouth: The closed contour of the lips' inner edge.

    Returns:
        The measure, or why there is none: the mouth is closed or small, or shows no teeth.
    """
    height, width = pixels.shape[:2]
    left, top = np.floor(mouth.min(axis=0)).astype(int)
    right, bottom = np.ceil(mouth.max(axis=0)).astype(int) + 1
    if left < 0 or top < 0 or right > width or bottom > height:
        return Abstention("the mouth reaches beyond the picture")
    wide, high = np.ptp(mouth, axis=0)
    if high < LEAST_OPENING * wide:
        return Abstention("the mouth is closed")
    if wide < LEAST_WIDTH_PX:
        return Abstention(f"the mouth is less than {LEAST_WIDTH_PX:.0f} px wide")
    mask = Image.new("1", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(mask).polygon([(float(x - left), float(y - top)) for x, y in mouth], fill=1)
    inside = np.asarray(mask)
    light = to_light(pixels[top:bottom, left:right].astype(float) / 255)
    brightest = float(np.quantile((light @ LUMINANCE)[inside], 0.98))
    colours = to_lab(light / max(brightest, 1e-6))
    teeth = inside & (colours[..., 0] >= _TOOTH_LIGHTNESS) & (colours[..., 1] <= _TOOTH_REDNESS)
    if teeth.sum() < _FEWEST_SHARE * inside.sum():
        return Abstention("no teeth show")
    across = np.nonzero(teeth)[1] / (inside.shape[1] - 1)
    columns = teeth[:, teeth.any(axis=0)]
    rows = [_count_rows(column, _LEAST_ROW * wide) for column in columns.T]
    return Teeth(
        crowded=float(np.mean(np.array(rows) >= 3)), lopsided=float(abs(2 * across.mean() - 1))
    )


def _count_rows(column: Bool[np.ndarray, " high"], least_px: float) -> int:
    """Count the runs of teeth from top to bottom that are ``least_px`` long or more."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], column, [False]])))
    return int(((edges[1::2] - edges[::2]) >= least_px).sum())
