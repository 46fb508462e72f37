"""Eight backdrops, each in four variants, as wide as the picture asks."""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from dreamloom.picturebook.pen import (
    UNITS_HIGH,
    WHITE,
    Colour,
    Pen,
    PenPoint,
    Units,
    colour,
    darker,
    lighter,
)
from dreamloom.picturebook.world import Scene

_Painter = Callable[[Pen, Units, int, random.Random], None]


def draw_scene(
    scene: Scene, backdrop: int, seed: int, width_px: int, height_px: int
) -> Image.Image:
    """Draw an RGB backdrop; ``backdrop`` picks the variant and ``seed`` places small things."""
    top, bottom = _SKIES[scene][backdrop]
    image = _gradient(top, bottom, width_px, height_px)
    unit_px = height_px / UNITS_HIGH
    _PAINTERS[scene](
        Pen(image, 0.0, 0.0, unit_px), width_px / unit_px, backdrop, random.Random(seed)
    )
    return image


def _gradient(top: Colour, bottom: Colour, width_px: int, height_px: int) -> Image.Image:
    share = np.linspace(0, 1, height_px)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    pixels = np.broadcast_to(rows, (height_px, width_px, 3)).astype(np.uint8)
    return Image.fromarray(pixels, "RGB")


def _paint_studio(pen: Pen, width: Units, backdrop: int, rng: random.Random) -> None:
    top, bottom = _SKIES["studio"][backdrop]
    x = width * (0.42 + 0.16 * rng.random())
    for radius, glow in ((118, 0.16), (86, 0.3)):
        pen.ellipse(x, 112, radius * 1.1, radius, lighter(top, glow))
    pen.box(0, 214, width, 256, 0, darker(bottom, 0.12))


def _paint_beach(pen: Pen, width: Units, backdrop: int, rng: random.Random) -> None:
    sea, sand = colour("2f9fc9"), colour("f3dba2")
    sun_x = width * (0.16, 0.84, 0.8, 0.2)[backdrop] + rng.uniform(-8, 8)
    pen.ellipse(sun_x, 44, 26, 26, colour("ffe75c") if backdrop != 2 else colour("ff8a4c"))
    pen.box(0, 128, width, 190, 0, sea)
    pen.box(0, 140, width, 148, 0, lighter(sea, 0.3))
    pen.ellipse(width / 2, 250, width * 0.8, 78, sand)
    if backdrop == 0:
        pen.polygon([(width - 50, 126), (width - 50, 76), (width - 18, 126)], WHITE)
        pen.polygon(
            [(width - 66, 128), (width - 8, 128), (width - 20, 142), (width - 56, 142)],
            colour("c8503c"),
        )
    elif backdrop == 1:
        _paint_palm(pen, 22)
    elif backdrop == 2:
        _paint_palm(pen, width - 24)
    else:
        pen.line([(width - 28, 90), (width - 28, 210)], 6, colour("8a5a34"))
        pen.slice(width - 28, 104, 46, 40, (180, 360), colour("e5484d"))
        pen.slice(width - 28, 104, 18, 40, (180, 360), WHITE)


def _paint_palm(pen: Pen, x: Units) -> None:
    pen.line([(x, 220), (x + 4, 150), (x - 2, 70)], 12, colour("9a6b3f"))
    for tip_x, tip_y in ((-44, 66), (-34, 96), (44, 66), (36, 96), (0, 30)):
        pen.blob(
            [
                (x, 64),
                (x + tip_x * 0.5 + 6, 50 + tip_y * 0.1),
                (x + tip_x, tip_y),
                (x + tip_x * 0.4, 74),
            ],
            colour("3a9a4e"),
        )


def _paint_forest(pen: Pen, width: Units, backdrop: int, rng: random.Random) -> None:
    leaves = (colour("2f7d46"), colour("3f9648"), colour("d9822b"), colour("2a6b5a"))[backdrop]
    ground = (colour("6aa84f"), colour("86b852"), colour("b98a45"), colour("4f8d5a"))[backdrop]
    pen.box(0, 206, width, 256, 0, ground)
    count = max(5, round(width / 52) + 1)
    for i in range(count):
        x = width * i / (count - 1) + rng.uniform(-9, 9)
        top = 18 + 44 * (i % 2) + rng.uniform(-10, 10)
        paint = leaves if i % 2 else lighter(leaves, 0.2)
        pen.box(x - 7, 140, x + 7, 218, 0, colour("7a5233"))
        if backdrop in (0, 3):
            for tier, reach in ((0, 24), (40, 32), (82, 40)):
                pen.polygon(
                    [(x - reach, top + tier + 62), (x, top + tier), (x + reach, top + tier + 62)],
                    paint,
                )
        else:
            pen.ellipse(x, top + 60, 36, 50, paint)


def _paint_snow(pen: Pen, width: Units, backdrop: int, rng: random.Random) -> None:
    pen.ellipse(width * 0.2, 262, width * 0.62, 92, colour("e4edf7"))
    pen.ellipse(width * 0.86, 272, width * 0.6, 88, WHITE)
    if backdrop in (0, 3):
        for x in (26, width - 30):
            for tier, reach in ((0, 20), (30, 28), (62, 36)):
                pen.polygon(
                    [(x - reach, 116 + tier), (x, 66 + tier), (x + reach, 116 + tier)],
                    colour("5d8f7c"),
                )
                pen.polygon(
                    [(x - reach * 0.5, 91 + tier), (x, 66 + tier), (x + reach * 0.5, 91 + tier)],
                    WHITE,
                )
    elif backdrop == 1:
        x = width - 36
        pen.ellipse(x, 196, 32, 32, WHITE)
        pen.ellipse(x, 150, 23, 23, WHITE)
        pen.polygon([(x, 148), (x - 20, 154), (x, 157)], colour("f28c38"))
        pen.box(x - 15, 112, x + 15, 130, 0, colour("3a3a48"))
    else:
        pen.box(14, 136, 84, 200, 0, colour("b5654a"))
        pen.polygon([(4, 140), (49, 94), (94, 140)], WHITE)
        pen.box(38, 152, 60, 176, 0, colour("ffe08a"))
    for _ in range(round(width / 14)):
        size = rng.uniform(4, 6.5)
        pen.ellipse(rng.uniform(0, width), rng.uniform(0, 190), size, size, WHITE)


def _paint_city(pen: Pen, width: Units, backdrop: int, rng: random.Random) -> None:
    base = (colour("7d8ca3"), colour("5d5878"), colour("b4765a"), colour("8296a0"))[backdrop]
    window = (colour("fdf0b0"), colour("ffd35c"), colour("fdeec8"), colour("d5f0fa"))[backdrop]
    x, i = -rng.uniform(0, 18), 0
    while x < width:
        building = rng.choice((44, 52, 60))
        top = (60, 118, 84, 138)[(i + backdrop) % 4] + rng.uniform(-8, 8)
        paint = lighter(base, 0.18) if i % 2 else base
        pen.box(x, top, x + building - 3, 236, 0, paint)
        for window_y in range(round(top) + 14, 214, 30):
            for window_x in (x + 8, x + building - 23):
                pen.box(window_x, window_y, window_x + 12, window_y + 15, 0, window)
        x, i = x + building, i + 1
    pen.box(0, 224, width, 256, 0, colour("6b6f78"))
    pen.box(0, 218, width, 226, 0, colour("c9ccd0"))


def _paint_mountains(pen: Pen, width: Units, backdrop: int, rng: random.Random) -> None:
    rock = (colour("75809a"), colour("8d7b7a"), colour("6f7fae"), colour("7f8a80"))[backdrop]
    peaks = ((0.16, 96), (0.84, 40)) if backdrop % 2 else ((0.14, 40), (0.86, 84))
    pen.polygon([(width * 0.2, 236), (width * 0.52, 84), (width * 0.84, 236)], lighter(rock, 0.35))
    for share, height in peaks:
        x, top = width * share + rng.uniform(-8, 8), height + rng.uniform(-6, 6)
        reach = (240 - top) * 0.62
        pen.polygon([(x - reach, 240), (x, top), (x + reach, 240)], rock)
        snow: list[PenPoint] = [
            (x, top), (x + reach * 0.3, top + 60), (x + reach * 0.1, top + 50),
            (x - reach * 0.06, top + 66), (x - reach * 0.3, top + 60),
        ]  # fmt: skip
        pen.polygon(snow, WHITE)
    pen.ellipse(width * 0.3, 262, width * 0.6, 52, colour("6fae58"))
    pen.ellipse(width * 0.85, 268, width * 0.5, 50, colour("84bf5e"))
    if backdrop >= 2:
        for dx in (-18, 0, 18):
            pen.ellipse(width * 0.5 + 70 * (backdrop - 2.5) + dx, 30, 20, 12, WHITE)


def _paint_night(pen: Pen, width: Units, backdrop: int, rng: random.Random) -> None:
    sky = _SKIES["night"][backdrop][0]
    for _ in range(round(width / 11)):
        size = rng.choice((2.6, 3.4, 4.4))
        pen.ellipse(rng.uniform(0, width), rng.uniform(0, 180), size, size, colour("fff6c8"))
    x = width * (0.84, 0.16, 0.84, 0.18)[backdrop] + rng.uniform(-8, 8)
    pen.ellipse(x, 46, 27, 27, colour("fff1b8"))
    if backdrop >= 2:
        pen.ellipse(x + 13, 39, 24, 24, sky)
    hills = colour("1d2350")
    if backdrop in (0, 3):
        pen.ellipse(width * 0.2, 262, width * 0.5, 72, hills)
        pen.ellipse(width * 0.8, 270, width * 0.5, 66, darker(hills, 0.3))
    else:
        for i in range(round(width / 48) + 1):
            left, top = i * 48.0, 176 + 22 * (i % 3)
            pen.box(left, top, left + 42, 256, 0, hills)
            pen.box(left + 12, top + 14, left + 25, top + 28, 0, colour("ffd866"))


def _paint_oktoberfest(pen: Pen, width: Units, backdrop: int, rng: random.Random) -> None:
    if backdrop in (1, 3):
        stripe = colour("a9cdf2") if backdrop == 1 else colour("f0dcae")
        for i in range(round(width / 64) + 1):
            pen.box(i * 64, 60, i * 64 + 32, 256, 0, stripe)
    # Bavarian lozenges: blue rows with a white row between them, pointed at the bottom.
    for i in range(round(width / 32) + 1):
        for row, paint in enumerate((colour("2f7fd8"), WHITE, colour("2f7fd8"))):
            x, y = i * 32 + 16 * (row % 2), 20 * row
            pen.polygon([(x - 16, y), (x, y - 20), (x + 16, y), (x, y + 20)], paint)
    pen.box(0, 222, width, 256, 0, colour("b57d45"))
    lift = rng.uniform(-6, 6)
    _paint_beer(pen, 10, 158 + lift, handle=1)
    if backdrop in (0, 1):
        _paint_beer(pen, width - 46, 158 - lift, handle=-1)
    elif backdrop == 2:
        _paint_heart(pen, width - 32, 160 + lift)
    else:
        _paint_pretzel(pen, width - 36, 166 + lift)


def _paint_pretzel(pen: Pen, x: Units, y: Units) -> None:
    crust = colour("a8602a")
    for side in (-1, 1):
        pen.ring(x + side * 14, y - 8, 20, 22, 10, crust)
    pen.ring(x, y + 10, 22, 20, 10, crust)


def _paint_beer(pen: Pen, x: Units, y: Units, *, handle: int) -> None:
    pen.ring(x + 18 + handle * 22, y + 42, 15, 21, 7, colour("d79a2c"))
    pen.box(x, y, x + 36, y + 74, 6, colour("f5b32e"))
    pen.box(x + 6, y + 20, x + 13, y + 64, 3, colour("fbd56e"))
    for dx in (4, 18, 32):
        pen.ellipse(x + dx, y + 4, 12, 12, WHITE)


def _paint_heart(pen: Pen, x: Units, y: Units) -> None:
    brown = colour("8f4a28")
    for radius, paint in ((1.0, WHITE), (0.82, brown)):
        pen.polygon(
            [(x - 31 * radius, y + 2), (x + 31 * radius, y + 2), (x, y + 40 * radius)], paint
        )
        for side in (-1, 1):
            pen.ellipse(x + side * 15 * radius, y - 4 * radius, 17 * radius, 16 * radius, paint)
    pen.ellipse(x, y + 4, 9, 9, colour("f0569c"))


_PAINTERS: dict[Scene, _Painter] = {
    "studio": _paint_studio,
    "beach": _paint_beach,
    "forest": _paint_forest,
    "snow": _paint_snow,
    "city": _paint_city,
    "mountains": _paint_mountains,
    "night": _paint_night,
    "oktoberfest": _paint_oktoberfest,
}


def _skies(*pairs: str) -> tuple[tuple[Colour, Colour], ...]:
    return tuple((colour(pair[:6]), colour(pair[7:])) for pair in pairs)


# Top and bottom colour of each variant.
_SKIES: dict[Scene, tuple[tuple[Colour, Colour], ...]] = {
    "studio": _skies("b9c9dc-97abc4", "e8d6bc-d3b995", "bcd6bf-98b99d", "dcc2d9-bf9fbd"),
    "beach": _skies("7fc8f4-d5eefb", "62bdf2-c6ebf8", "ffb37a-ffe2b8", "8fd3f0-e4f5f6"),
    "forest": _skies("bfe3c4-8fc79a", "cdeaf2-b3d8a4", "f3e3bd-e3bd84", "a9cfc9-6fa596"),
    "snow": _skies("a9c7e6-dbe8f5", "b8d3ee-e3edf7", "c7c9e4-e6e3f1", "9dbcd8-d6e6f0"),
    "city": _skies("a7cdf0-dcebf5", "4b4a86-e08a6a", "bfe0f2-f3ecdd", "c3ccd6-e2e4e4"),
    "mountains": _skies("74b6ee-d9edf8", "8ec5f0-f3e6d2", "6a9fe6-cfe0f7", "9fd0ea-e9f3ea"),
    "night": _skies("10143c-343a7c", "161040-443478", "0b1a44-27508a", "1a1442-5a3f86"),
    "oktoberfest": _skies("f7e6bd-e9c88c", "dcebfa-f1e3c2", "fbe0b4-e6b878", "f8ecd0-e2c48e"),
}
