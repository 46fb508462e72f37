"""What eyes show: the colour of an iris, and whether two eyes are shaped like a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from dreamloom.evaluation.detectors.colour import (
    LUMINANCE,
    Lab,
    colour_difference,
    to_lab,
    to_light,
)
from dreamloom.evaluation.detectors.landmarks import Eye, Points

EyePixels = UInt8[np.ndarray, "height width 3"]

LIGHTNESS_SCALE = 2.0
"""Lightness counts half in differences of irises: light from one side changes it most."""

MOST_PATCHY = 10.0
"""If the halves of an iris differ more than this, it has no colour that could be compared."""

AHEAD = 0.12
"""The `EyeShape.divergence` of real eyes: the inner corner lies further from the iris. From seven
photos, 0.08 to 0.15."""

# In iris radii: inside is the pupil, outside the dark ring at the edge.
_IRIS = (0.45, 0.9)
_SCLERA_FROM = 1.15
_FEWEST_PIXELS = 12
# Shares of an iris's pixels, by lightness: lashes and the lid's shadow are darker, mirrored lamps
# and windows lighter.
_LASHES, _LAMPS = 0.1, 0.25
# A sclera is set to this much light, so that irises in light and shade can be compared.
_SCLERA_LIGHT = 0.7
_LEAST_CONTRAST = 1.5


@dataclass(frozen=True)
class Abstention:
    """Why something cannot be told from a picture; one clause to stand behind a number."""

    reason: str


class EyeShape(NamedTuple):
    """How far two eyes are from a pair of round, equal irises that look the same way."""

    elongation: float
    """The longer diameter of the less round iris by its shorter one; 1 is round."""
    size_ratio: float
    """The larger iris by the smaller one; 1 is equal."""
    divergence: float
    """How much further right the second iris stands between the corners of its eye than the first
    between its own, in eyes' widths; about `AHEAD` where both look at one thing."""
    overhang: float
    """How far the centre of an iris lies outside its lids, in its radii; 0 is inside."""


def read_iris(pixels: EyePixels, eye: Eye) -> Lab | Abstention:
    """Read the colour of an iris as if its sclera were white.

    The median over a ring between pupil and edge, inside the lids, without the darkest tenth and
    the lightest quarter. The lighter half of what else lies between the lids is taken for the
    sclera; each channel is scaled so that it becomes a light grey.

    Args:
        pixels: The whole picture, sRGB.
        eye: From a source of landmarks for this picture.

    Returns:
        The colour, or why there is none: too few pixels, or a sclera that is not clearly lighter
        than the iris (sunglasses, deep shadow, or no eye).
    """
    light, rings, inside = _cut_out(pixels, eye)
    iris = inside & (rings >= _IRIS[0]) & (rings <= _IRIS[1])
    sclera = inside & (rings >= _SCLERA_FROM)
    if min(iris.sum(), sclera.sum()) < _FEWEST_PIXELS:
        return Abstention("too little of the iris or the sclera shows between the lids")
    brightness = light @ LUMINANCE
    lighter = sclera & (brightness >= np.median(brightness[sclera]))
    white = np.median(light[lighter], axis=0)
    if white.min() <= 0 or white @ LUMINANCE < _LEAST_CONTRAST * np.median(brightness[iris]):
        return Abstention("the white of the eye is not clearly lighter than the iris")
    colours = to_lab(light[iris] * (_SCLERA_LIGHT / white))
    on_left = np.nonzero(iris)[1] < np.median(np.nonzero(iris)[1])
    if iris_difference(_plain(colours[on_left]), _plain(colours[~on_left])) > MOST_PATCHY:
        return Abstention("the iris is not of one colour: reflections, lashes or too few pixels")
    return _plain(colours)


def _plain(colours: Float[np.ndarray, "pixels 3"]) -> Lab:
    """Take the median of an iris's pixels without those of lashes and lamps."""
    low, high = np.quantile(colours[:, 0], (_LASHES, 1 - _LAMPS))
    return middle_colour(colours[(colours[:, 0] >= low) & (colours[:, 0] <= high)])


def _cut_out(
    pixels: EyePixels, eye: Eye
) -> tuple[
    Float[np.ndarray, "high wide 3"], Float[np.ndarray, "high wide"], Bool[np.ndarray, "high wide"]
]:
    """Cut an eye's surroundings out of a picture.

    Returns:
        Its light, each pixel's distance from the iris's centre in radii, and which pixels lie
        between the lids.
    """
    height, width = pixels.shape[:2]
    around = np.concatenate([eye.lids, eye.rim])
    left, top = np.maximum(np.floor(around.min(axis=0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(around.max(axis=0)).astype(int) + 1, (width, height))
    if right <= left or bottom <= top:
        empty = np.zeros((0, 0))
        return np.zeros((0, 0, 3)), empty, empty.astype(bool)
    light = to_light(pixels[top:bottom, left:right].astype(float) / 255)
    rows, columns = np.mgrid[top:bottom, left:right]
    away = np.hypot(columns - eye.centre[0], rows - eye.centre[1]) / max(eye.radius_px, 1e-6)
    mask = Image.new("1", (int(right - left), int(bottom - top)))
    corners = [(float(x - left), float(y - top)) for x, y in eye.lids]
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    return light, away, np.asarray(mask)


def iris_difference(first: Lab, second: Lab) -> float:
    """Say how different two irises look, lightness counted half; see `colour_difference`."""
    return colour_difference(first, second, LIGHTNESS_SCALE)


def middle_colour(colours: Sequence[Lab] | Float[np.ndarray, "colours 3"]) -> Lab:
    """Take the median of each coordinate."""
    lightness, green_red, blue_yellow = np.median(np.array(colours), axis=0)
    return float(lightness), float(green_red), float(blue_yellow)


def distance_from(colour: Lab, pair: tuple[Lab, Lab]) -> float:
    """Say how far the iris that is further off lies from a colour."""
    return max(iris_difference(iris, colour) for iris in pair)


def leave_one_out(pairs: Sequence[tuple[Lab, Lab]]) -> list[float]:
    """Say for each pair of irises how far it lies from the middle of the others; two or more."""
    return [
        distance_from(
            middle_colour(
                [iris for other in (*pairs[:place], *pairs[place + 1 :]) for iris in other]
            ),
            pair,
        )
        for place, pair in enumerate(pairs)
    ]


def measure_shape(first: Eye, second: Eye) -> EyeShape:
    """Measure whether two eyes of a face that looks ahead are shaped like a pair.

    Args:
        first: The eye further left in the picture.
        second: The other.
    """
    sizes = sorted((first.radius_px, second.radius_px))
    # The spread of the rims' points along their two main directions.
    spreads = [
        np.linalg.svd(eye.rim - eye.rim.mean(axis=0), compute_uv=False) for eye in (first, second)
    ]
    return EyeShape(
        elongation=max(float(spread[0] / max(spread[1], 1e-6)) for spread in spreads),
        size_ratio=sizes[1] / max(sizes[0], 1e-6),
        divergence=_place(second) - _place(first),
        overhang=max(_overhang(eye) for eye in (first, second)),
    )


def _place(eye: Eye) -> float:
    """Say where the iris stands between the corners: 0 at the left one, 1 at the right one."""
    corners = eye.lids[[int(eye.lids[:, 0].argmin()), int(eye.lids[:, 0].argmax())]]
    across = corners[1] - corners[0]
    return float((eye.centre - corners[0]) @ across / max(float(across @ across), 1e-6))


def _overhang(eye: Eye) -> float:
    """Measure how far the iris's centre lies outside the contour of the lids, in radii."""
    starts, ends = eye.lids, np.roll(eye.lids, -1, axis=0)
    if _is_inside(eye.centre, starts, ends):
        return 0.0
    sides = ends - starts
    along = ((eye.centre - starts) * sides).sum(axis=1) / np.maximum((sides**2).sum(axis=1), 1e-9)
    nearest = starts + np.clip(along, 0, 1)[:, None] * sides
    away = np.linalg.norm(nearest - eye.centre, axis=1).min()
    return float(away / max(eye.radius_px, 1e-6))


def _is_inside(point: Float[np.ndarray, " 2"], starts: Points, ends: Points) -> bool:
    """Count how often a ray to the right crosses the contour: an odd number is inside."""
    straddles = (starts[:, 1] > point[1]) != (ends[:, 1] > point[1])
    fall = np.where(straddles, ends[:, 1] - starts[:, 1], 1.0)
    crossing = starts[:, 0] + (point[1] - starts[:, 1]) / fall * (ends[:, 0] - starts[:, 0])
    return bool((straddles & (crossing > point[0])).sum() % 2)
