"""Finding pictures that repeat a photo: cut, mirrored, scaled or saved again, but the same.

A likeness score rewards a copy more than anything else, so a copy must be found by something that
looks at the picture and not at who is in it. Pictures and photos are shrunk until only their
layout is left, and compared pixel by pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

KEY = "layout-correlation-v1"
"""Names what is compared, and how; see `read_layout`."""

LIMIT = 0.98
"""From this correlation on a picture repeats a photo, where no other limit is known."""

_SIDE_PX = 24
_PHOTO_PX = 96
# A copy may be cut to these shares of the photo's shorter side, beginning anywhere on a grid.
_SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
_STEP = 0.06
# Between these correlations a better view may lie near by, at most so many pixels away.
_NEAR, _SURE = 0.6, 0.97
_REACH_PX = 3
_NO_CONTRAST = 1e-3  # what rounding leaves of a plain colour


def read_layout(image: Image.Image) -> Float[np.ndarray, " layout"]:
    """Shrink a picture to its layout: colours and edges of 24 by 24 fields, of zero mean.

    Colours alone are alike for any two portraits before one wall, and edges alone for any two
    snowy hills; both halves have the same length, so that each counts as much.

    Returns:
        A vector of length 1; all zeros for a picture of one plain colour.
    """
    square = image.convert("RGB").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX)
    layout: np.ndarray[Any, Any] = _describe(np.asarray(square, np.float32)[None] / 255)[0]
    return layout


@dataclass(frozen=True)
class Views:
    """A photo as its copies could show it.

    Args:
        pixels: The photo, its shorter side `_PHOTO_PX`, with values in [0, 1].
        cuts: The squares that are looked at first.
        layouts: Their layouts, one row for each.
    """

    pixels: Float[np.ndarray, "height width 3"]
    cuts: tuple[Cut, ...]
    layouts: Float[np.ndarray, "views layout"]


class Cut(NamedTuple):
    """A square of a photo, in pixels of `Views`, perhaps mirrored."""

    side: int
    top: int
    left: int
    mirrored: bool


def read_views(image: Image.Image) -> Views:
    """Read the layouts of the squares that a copy of a photo could have been cut to."""
    scale = _PHOTO_PX / min(image.size)
    width, height = (max(_PHOTO_PX, round(side * scale)) for side in image.size)
    small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float32) / 255
    cuts = tuple(
        Cut(side, top, left, mirrored)
        for side in (round(share * _PHOTO_PX) for share in _SHARES)
        for mirrored in (False, True)
        for top in _places(height - side)
        for left in _places(width - side)
    )
    return Views(pixels, cuts, _read_cuts(pixels, cuts))


def _read_cuts(
    pixels: Float[np.ndarray, "height width 3"], cuts: Sequence[Cut]
) -> Float[np.ndarray, "cuts layout"]:
    found = []
    for side, members in groupby(cuts, key=lambda cut: cut.side):
        some = list(members)
        windows = np.stack([pixels[c.top : c.top + side, c.left : c.left + side] for c in some])
        shrink = _average_fields(side)
        fields = np.einsum("ih,nhwc,jw->nijc", shrink, windows, shrink, optimize=True)
        mirrored = np.array([cut.mirrored for cut in some])
        fields[mirrored] = fields[mirrored][:, :, ::-1]
        found.append(_describe(fields))
    return np.concatenate(found)


def _places(room_px: int) -> list[int]:
    """Spread beginnings over what is left beside a cut, both ends included."""
    count = math.ceil(room_px / (_STEP * _PHOTO_PX)) + 1
    return [round(place) for place in np.linspace(0, room_px, count)]


@cache
def _average_fields(side_px: int) -> Float[np.ndarray, "fields side"]:
    """Weigh pixels by how much of them lies in each field: PIL's box filter as a matrix."""
    ends = np.arange(side_px + 1)
    low = np.arange(_SIDE_PX)[:, None] * side_px / _SIDE_PX
    high = low + side_px / _SIDE_PX
    inside = np.minimum(ends[1:], high) - np.maximum(ends[:-1], low)
    weights: np.ndarray[Any, Any] = inside.clip(min=0) * _SIDE_PX / side_px
    return weights.astype(np.float32)


def _describe(fields: Float[np.ndarray, "n side side 3"]) -> Float[np.ndarray, "n layout"]:
    colours = fields - fields.mean(axis=(1, 2), keepdims=True)
    grey = fields.mean(axis=3)
    across = np.diff(grey, axis=2, append=grey[:, :, -1:])
    down = np.diff(grey, axis=1, append=grey[:, -1:])
    halves = []
    for half in (colours, np.stack([across, down], axis=3)):
        flat = half.reshape(len(fields), -1)
        length = np.linalg.norm(flat, axis=1, keepdims=True)
        halves.append(flat / np.where(length > _NO_CONTRAST, length, np.inf))
    layouts: np.ndarray[Any, Any] = np.concatenate(halves, axis=1) / np.float32(np.sqrt(2))
    return layouts.astype(np.float32)


def correlate_layouts(
    pictures: Float[np.ndarray, "pictures layout"], photos: Sequence[Views]
) -> Float[Tensor, "pictures photos"]:
    """Compare each picture with every view of each photo, and keep the best of each photo.

    Where a view comes near, the squares around it are looked at too: the layout of a square that
    is a fiftieth off is another one.

    Args:
        pictures: From `read_layout`.
        photos: From `read_views`, one entry per photo.

    Returns:
        Correlations in [-1, 1]: 1 for the photo itself; 0 where a picture has no layout.

    Raises:
        ValueError: If there is no photo.
    """
    if not photos:
        raise ValueError("there must be at least one photo")
    columns = []
    for views in photos:
        best, places = (torch.from_numpy(pictures) @ torch.from_numpy(views.layouts).T).max(dim=1)
        for row in torch.nonzero((best > _NEAR) & (best < _SURE)).flatten().tolist():
            around = _cuts_around(views, views.cuts[int(places[row])])
            refined = _read_cuts(views.pixels, around) @ pictures[row]
            best[row] = max(float(best[row]), float(refined.max()))
        columns.append(best)
    return torch.stack(columns, dim=1)


def _cuts_around(views: Views, cut: Cut) -> list[Cut]:
    """List the squares that share most of their pixels with one, sorted by side."""
    height, width = views.pixels.shape[:2]
    reach = range(-_REACH_PX, _REACH_PX + 1, 1)
    return [
        Cut(side, top, left, cut.mirrored)
        for side in range(cut.side - _REACH_PX, min(cut.side + _REACH_PX, height, width) + 1)
        for top in (cut.top + step for step in reach)
        for left in (cut.left + step for step in reach)
        if 0 <= top <= height - side and 0 <= left <= width - side
    ]


def find_copies(
    correlations: Float[Tensor, "pictures photos"], among_photos: Float[Tensor, "photos photos"]
) -> Bool[Tensor, " pictures"]:
    """Say which pictures repeat a photo more closely than the photos repeat each other.

    Args:
        correlations: Of pictures with photos, from `correlate_layouts`.
        among_photos: Of photos with photos; the diagonal is not read.

    Returns:
        True where a picture lies above `LIMIT`, or, where the photos of one sitting resemble each
        other more than that, above them.
    """
    apart = among_photos.masked_fill(torch.eye(len(among_photos), dtype=torch.bool), -1.0)
    limit = max(LIMIT, float(apart.max()))
    return correlations.amax(dim=1) > limit
