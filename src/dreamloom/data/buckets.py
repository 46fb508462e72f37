"""Aspect-ratio buckets and crops: where to cut a picture so that it keeps its subject.

Sizes are (height, width) and boxes (top, left, bottom, right), all in pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

Size: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[int, int, int, int]

_STEPS_PER_SIDE = 16
_LEAST_AREA = Fraction(9, 10)


def suggest_step(resolution_px: int, pixels_per_latent: int) -> int:
    """Choose how finely buckets differ: a sixteenth of the resolution, as SDXL's 64 of 1024.

    Returns:
        A multiple of ``pixels_per_latent``, at least one.

    Raises:
        ValueError: If an argument is below 1.

    Example:
        >>> suggest_step(1024, 8), suggest_step(64, 8)
        (64, 8)
    """
    _require_positive(resolution_px=resolution_px, pixels_per_latent=pixels_per_latent)
    wanted = Fraction(resolution_px, _STEPS_PER_SIDE * pixels_per_latent)
    return max(1, round(wanted)) * pixels_per_latent


def list_buckets(resolution_px: int, step_px: int, max_aspect: float = 2.0) -> list[Size]:
    """List the sizes of crops that cost about as much as a square of ``resolution_px``.

    A bucket's area is 90 % to 100 % of the square's; where a coarse step leaves none so near, it
    is as large as the step allows.

    Args:
        resolution_px: Side of the square.
        step_px: Sides are multiples of it.
        max_aspect: The longer side is at most so many times the shorter, 1 or more.

    Returns:
        Heights and widths, from the widest to the highest; as many lie as stand.

    Raises:
        ValueError: If a length is below 1, ``step_px`` above ``resolution_px``, or ``max_aspect``
            below 1.

    Source:
        Podell et al., SDXL (arXiv:2307.01952), section 2.3 and appendix I: at 1024 pixels, with a
        step of 64 and an aspect of 4, these are the sizes listed there, and 1344 × 704, which is
        missing there beside 704 × 1344.

    Example:
        >>> list_buckets(1024, 64, max_aspect=1.2)
        [(960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960)]
    """
    _require_positive(resolution_px=resolution_px, step_px=step_px)
    if step_px > resolution_px:
        raise ValueError(f"step_px must be {resolution_px} or less, got {step_px}")
    if not max_aspect >= 1:
        raise ValueError(f"max_aspect must be 1 or more, got {max_aspect}")
    area, unit = Fraction(resolution_px**2), step_px**2
    found = []
    for short in range(1, resolution_px // step_px + 1):
        for long in range(short, min(int(area / (short * unit)), int(short * max_aspect)) + 1):
            could_grow = (short + 1) * long * unit <= area or short * (long + 1) * unit <= area
            if short * long * unit >= _LEAST_AREA * area or not could_grow:
                found += [(short * step_px, long * step_px), (long * step_px, short * step_px)]
    # A step just below the resolution and an aspect of 1 can leave only what could still grow.
    side = resolution_px // step_px * step_px
    return sorted({*found, (side, side)}, key=lambda size: (Fraction(*size), size))


def choose_bucket(size_px: Size, buckets: Sequence[Size]) -> Size:
    """Choose the bucket of the nearest shape: the least distance between logarithms of aspects.

    Of equally near ones the largest is taken, then the one that lies rather than stands; the
    order of ``buckets`` does not matter.

    Raises:
        ValueError: If there is no bucket, or a side is below 1.

    Example:
        >>> choose_bucket((3000, 4000), list_buckets(1024, 64))
        (896, 1152)
    """
    if not buckets:
        raise ValueError("there must be at least one bucket")
    _require_positive(height=size_px[0], width=size_px[1])

    def rank(bucket: Size) -> tuple[Fraction, int, int]:
        # |log a - log b| grows with max(a / b, b / a), which fractions tell exactly.
        ratio = Fraction(size_px[0] * bucket[1], size_px[1] * bucket[0])
        return max(ratio, 1 / ratio), -bucket[0] * bucket[1], bucket[0]

    return min(buckets, key=rank)


def scale_to_cover(size_px: Size, bucket_px: Size) -> Size:
    """Find the smallest size of the same proportions from which a bucket can be cut.

    Returns:
        Height and width; one is the bucket's own, and neither is less.

    Raises:
        ValueError: If a side is below 1.

    Example:
        >>> scale_to_cover((3000, 4000), (1024, 1024))
        (1024, 1365)
    """
    for name, size in (("size_px", size_px), ("bucket_px", bucket_px)):
        _require_positive(**{f"{name} height": size[0], f"{name} width": size[1]})
    factor = max(bucket_px[0] / size_px[0], bucket_px[1] / size_px[1])
    height, width = (
        max(least, round(side * factor)) for side, least in zip(size_px, bucket_px, strict=True)
    )
    return height, width


def scale_box(box: Sequence[float], size_px: Size, scaled_px: Size) -> Box:
    """Move a box along as its picture is scaled; it grows to whole pixels.

    Args:
        box: Top, left, bottom and right within ``size_px``.
        size_px: Height and width of the picture that the box was drawn in.
        scaled_px: Height and width of the scaled picture.
    """
    top, left, bottom, right = box
    down, across = (new / old for new, old in zip(scaled_px, size_px, strict=True))
    return (
        max(0, math.floor(top * down)),
        max(0, math.floor(left * across)),
        min(scaled_px[0], math.ceil(bottom * down)),
        min(scaled_px[1], math.ceil(right * across)),
    )


def place_crop(
    scaled_px: Size, crop_px: Size, grid_px: int, rng: random.Random, box: Box | None = None
) -> tuple[int, int]:
    """Choose at random where to cut a crop, among the places of `list_places`.

    Args:
        scaled_px: Height and width of the picture.
        crop_px: Height and width of the crop.
        grid_px: Tops and lefts are multiples of it wherever the box allows.
        rng: Random numbers; the same ones give the same place.
        box: What the crop must keep, where known.

    Returns:
        Top and left of the crop.

    Raises:
        ValueError: As `list_places`.
    """
    tops, lefts = list_places(scaled_px, crop_px, grid_px, box)
    return rng.choice(tops), rng.choice(lefts)


def list_places(
    scaled_px: Size, crop_px: Size, grid_px: int, box: Box | None = None
) -> tuple[list[int], list[int]]:
    """List the tops and lefts that a crop may have; each top goes with each left.

    They lie on a grid, and at the far edge, which the grid may miss: so few that each crop can be
    kept once it is encoded. With a box they are those that keep all of it; if the grid has none,
    there is one beside it; and of a box larger than the crop the middle is kept. Without a box
    they lie in the middle half of the room, so that a subject near the middle is not cut off.

    Args:
        scaled_px: Height and width of the picture.
        crop_px: Height and width of the crop.
        grid_px: Spacing of the grid, 1 or more.
        box: What the crop must keep, where known.

    Returns:
        Tops and lefts, at least one of each, in rising order.

    Raises:
        ValueError: If the crop is larger than the picture, the box is empty or not inside it, or
            ``grid_px`` is below 1.

    Example:
        >>> list_places((64, 100), (64, 64), 8, box=(0, 20, 64, 90))
        ([0], [23])
        >>> list_places((64, 100), (64, 64), 8, box=(10, 40, 60, 100))
        ([0], [36])
    """
    _require_positive(grid_px=grid_px)
    top, left, bottom, right = box or (0, 0, *scaled_px)
    if not (0 <= top < bottom <= scaled_px[0] and 0 <= left < right <= scaled_px[1]):
        raise ValueError(f"the box {box} does not lie inside a picture of {scaled_px}")
    if not (1 <= crop_px[0] <= scaled_px[0] and 1 <= crop_px[1] <= scaled_px[1]):
        raise ValueError(f"a crop of {crop_px} cannot be cut from a picture of {scaled_px}")
    spans = ((top, bottom), (left, right)) if box else (None, None)
    tops, lefts = (
        _list_starts(length, side, grid_px, span)
        for length, side, span in zip(scaled_px, crop_px, spans, strict=True)
    )
    return tops, lefts


def _list_starts(length: int, side: int, grid: int, span: tuple[int, int] | None) -> list[int]:
    """List where a crop may begin along one direction."""
    room = length - side
    if span is None:
        least, most = math.ceil(room / 4), math.floor(room * 3 / 4)
        between = room // 2
    else:
        begin, end = span
        least, most = max(0, end - side), min(room, begin)
        between = (begin + end - side) // 2 if end - begin > side else (least + most) // 2
    allowed = [start for start in (*range(0, room, grid), room) if least <= start <= most]
    return allowed or [between]


def mirror_left(left_px: int, crop_width_px: int, width_px: int) -> int:
    """Find the left of a crop in the mirrored picture, where the crop shows the same, mirrored."""
    return width_px - crop_width_px - left_px


def _require_positive(**lengths: int) -> None:
    for name, length in lengths.items():
        if length < 1:
            raise ValueError(f"{name} must be 1 or more, got {length}")
