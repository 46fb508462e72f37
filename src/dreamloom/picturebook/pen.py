"""A pen for large soft shapes: Pillow's drawing in picture units instead of pixels.

One picture unit is 1/256 of the picture's height. Colours are (red, green, blue), 0 to 255.
"""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
# Lengths in picture units. Both are named because the tests check annotations at run time.
Units = int | float
PenPoint = tuple[Units, Units]

UNITS_HIGH = 256
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
_STEPS_PER_SEGMENT = 6


def colour(code: str) -> Colour:
    """Read a colour from six hexadecimal digits such as ``"c83c3c"``."""
    return (int(code[0:2], 16), int(code[2:4], 16), int(code[4:6], 16))


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blend two colours; ``share`` is the second one's part, 0 to 1."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return (red, green, blue)


def darker(base: Colour, share: float) -> Colour:
    """Blend towards a cool black, which keeps shadows friendlier than pure black."""
    return mix(base, (24, 16, 40), share)


def lighter(base: Colour, share: float) -> Colour:
    """Blend towards white."""
    return mix(base, WHITE, share)


def smooth_outline(corners: Sequence[PenPoint]) -> list[PenPoint]:
    """Round a closed outline that passes through all ``corners`` (a Catmull-Rom spline)."""
    count = len(corners)
    outline: list[PenPoint] = []
    for i in range(count):
        before, start = corners[i - 1], corners[i]
        end, after = corners[(i + 1) % count], corners[(i + 2) % count]
        for step in range(_STEPS_PER_SEGMENT):
            t = step / _STEPS_PER_SEGMENT
            # Catmull-Rom basis with tension 1/2.
            a = -0.5 * t**3 + t**2 - 0.5 * t
            b = 1.5 * t**3 - 2.5 * t**2 + 1
            c = -1.5 * t**3 + 2 * t**2 + 0.5 * t
            d = 0.5 * t**3 - 0.5 * t**2
            outline.append(
                (
                    a * before[0] + b * start[0] + c * end[0] + d * after[0],
                    a * before[1] + b * start[1] + c * end[1] + d * after[1],
                )
            )
    return outline


class Pen:
    """Draws on an image, in units around an origin; y grows downwards."""

    def __init__(
        self, image: Image.Image, origin_x_px: float, origin_y_px: float, unit_px: float
    ) -> None:
        self._draw = ImageDraw.Draw(image)
        self._origin_x_px = origin_x_px
        self._origin_y_px = origin_y_px
        self._unit_px = unit_px

    def ellipse(self, x: Units, y: Units, radius_x: Units, radius_y: Units, fill: Colour) -> None:
        """Fill an ellipse around (x, y)."""
        self._draw.ellipse(self._box(x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill)

    def ring(
        self,
        x: Units,
        y: Units,
        radius_x: Units,
        radius_y: Units,
        width: Units,
        outline: Colour,
    ) -> None:
        """Draw an ellipse's rim, ``width`` wide, inside the given radii."""
        box = self._box(x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self._draw.ellipse(box, outline=outline, width=self._width_px(width))

    def box(
        self, left: Units, top: Units, right: Units, bottom: Units, radius: Units, fill: Colour
    ) -> None:
        """Fill a rectangle whose corners are rounded by ``radius``."""
        box = self._box(left, top, right, bottom)
        self._draw.rounded_rectangle(box, radius * self._unit_px, fill)

    def polygon(self, corners: Sequence[PenPoint], fill: Colour) -> None:
        """Fill a shape with straight sides."""
        self._draw.polygon([self._at(x, y) for x, y in corners], fill)

    def blob(self, corners: Sequence[PenPoint], fill: Colour) -> None:
        """Fill a smooth shape that passes through all ``corners``."""
        self.polygon(smooth_outline(corners), fill)

    def line(self, corners: Sequence[PenPoint], width: Units, fill: Colour) -> None:
        """Draw a line with round ends."""
        points = [self._at(x, y) for x, y in corners]
        width_px = self._width_px(width)
        self._draw.line(points, fill, width_px, joint="curve")
        radius_px = width_px / 2
        for x_px, y_px in (points[0], points[-1]):
            self._draw.ellipse(
                (x_px - radius_px, y_px - radius_px, x_px + radius_px, y_px + radius_px), fill
            )

    def slice(
        self,
        x: Units,
        y: Units,
        radius_x: Units,
        radius_y: Units,
        degrees: tuple[int, int],
        fill: Colour,
    ) -> None:
        """Fill an ellipse's part between two angles, clockwise from the right, and its chord."""
        box = self._box(x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self._draw.chord(box, degrees[0], degrees[1], fill)

    def arc(
        self,
        x: Units,
        y: Units,
        radius_x: Units,
        radius_y: Units,
        degrees: tuple[int, int],
        width: Units,
        fill: Colour,
    ) -> None:
        """Draw an ellipse's rim between two angles, clockwise from the right.

        The line runs inside the radii and has round ends.
        """
        box = self._box(x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self._draw.arc(box, degrees[0], degrees[1], fill, self._width_px(width))
        for degree in degrees:
            across, down = math.cos(math.radians(degree)), math.sin(math.radians(degree))
            end_x, end_y = x + (radius_x - width / 2) * across, y + (radius_y - width / 2) * down
            self.ellipse(end_x, end_y, width / 2, width / 2, fill)

    def _at(self, x: Units, y: Units) -> PenPoint:
        return (
            self._origin_x_px + x * self._unit_px,
            self._origin_y_px + y * self._unit_px,
        )

    def _box(
        self, left: Units, top: Units, right: Units, bottom: Units
    ) -> tuple[float, float, float, float]:
        return (*self._at(left, top), *self._at(right, bottom))

    def _width_px(self, width: Units) -> int:
        return max(1, round(width * self._unit_px))
