"""Colours as the eye tells them apart: CIELAB and the difference CIEDE2000."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

Lab: TypeAlias = tuple[float, float, float]
"""Lightness (0 black, 100 white), green to red, blue to yellow."""

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
"""How much red, green and blue light each add to brightness."""

_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _TO_XYZ.sum(axis=1)


def to_light(srgb: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Turn sRGB values in [0, 1] into amounts of light in [0, 1].

    Source:
        IEC 61966-2-1 (1999), the sRGB transfer function.
    """
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_lab(light: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Turn amounts of red, green and blue light into CIELAB, for the white of sRGB (D65).

    Args:
        light: From `to_light`; 1 is white, more is allowed.

    Source:
        CIE 15:2004, section 8.2.1, and the primaries of IEC 61966-2-1.
    """
    ratios = light @ _TO_XYZ.T / _WHITE
    knee = 6 / 29
    f = np.where(ratios > knee**3, np.cbrt(ratios), ratios / (3 * knee**2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def colour_difference(first: Lab, second: Lab, lightness_scale: float = 1.0) -> float:
    """Say how different two colours look (CIEDE2000).

    Args:
        first: A colour.
        second: Another; the order does not matter.
        lightness_scale: 1 as published for viewing side by side; 2 halves what lightness adds,
            infinity leaves it out.

    Returns:
        0 for one colour; about 1 is just seen side by side, 10 at a glance; black and white are
        100 apart.

    Raises:
        ValueError: If the scale is not above 0.

    Source:
        Sharma, Wu and Dalal, The CIEDE2000 Color-Difference Formula (Color Research and
        Application 30, 2005), equations 2 to 22; k_L is ``lightness_scale``.

    Example:
        >>> round(colour_difference((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485)), 4)
        2.0425
    """
    if not lightness_scale > 0:
        raise ValueError(f"lightness_scale must be above 0, got {lightness_scale}")
    mean_chroma = (math.hypot(*first[1:]) + math.hypot(*second[1:])) / 2
    stretch = 1.5 - 0.5 * math.sqrt(mean_chroma**7 / (mean_chroma**7 + 25.0**7))
    chroma1, hue1 = _chroma_and_hue(first, stretch)
    chroma2, hue2 = _chroma_and_hue(second, stretch)
    is_grey = chroma1 * chroma2 == 0
    turn = 0.0 if is_grey else hue2 - hue1
    if abs(turn) > 180:  # the other way round the circle is shorter
        turn -= math.copysign(360, turn)
    hue_step = 2 * math.sqrt(chroma1 * chroma2) * math.sin(math.radians(turn) / 2)
    lightness, chroma = (first[0] + second[0]) / 2, (chroma1 + chroma2) / 2
    # The middle of the shorter way round the circle; of a grey, which has no hue, the other's.
    hue = hue1 + hue2 if is_grey else hue1 + turn / 2

    def swing(times: int, shift: int) -> float:
        return math.cos(math.radians(times * hue + shift))

    weight = (
        1 - 0.17 * swing(1, -30) + 0.24 * swing(2, 0) + 0.32 * swing(3, 6) - 0.2 * swing(4, -63)
    )
    bend = (lightness - 50) ** 2
    by_lightness = (second[0] - first[0]) / (
        lightness_scale * (1 + 0.015 * bend / math.sqrt(20 + bend))
    )
    by_chroma = (chroma2 - chroma1) / (1 + 0.045 * chroma)
    by_hue = hue_step / (1 + 0.015 * chroma * weight)
    twist = 30 * math.exp(-((((hue % 360) - 275) / 25) ** 2))
    rotation = -2 * math.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * math.sin(math.radians(2 * twist))
    total = by_lightness**2 + by_chroma**2 + by_hue**2 + rotation * by_chroma * by_hue
    return math.sqrt(max(total, 0.0))


def _chroma_and_hue(lab: Lab, stretch: float) -> tuple[float, float]:
    """Give chroma and hue angle in degrees, with the green-red axis stretched."""
    _, a, b = lab
    return math.hypot(stretch * a, b), math.degrees(math.atan2(b, stretch * a)) % 360
