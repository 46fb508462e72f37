"""People, and the door to all figures: `draw_figure` draws whoever a record shows.

A head's centre is the pen's origin and its height is about 124 picture units: half the picture.
"""

import math
from itertools import pairwise

from dreamloom.picturebook.pen import Colour, Pen, PenPoint, Units, colour, darker, lighter, mix
from dreamloom.picturebook.wear import (
    EYE_PAINT,
    SHIRT_PAINT,
    draw_eye,
    draw_front_glasses,
    draw_hat,
    draw_mouth,
    draw_side_glasses,
)
from dreamloom.picturebook.world import Drawing, Earrings, Hair, Identity, Skin
from tools.picturebook.animals import draw_animal, draw_robot

SKIN_PAINT: dict[Skin, Colour] = {
    "porcelain": colour("fbe0d0"),
    "fair": colour("f3c39b"),
    "tan": colour("dca06a"),
    "bronze": colour("b9763f"),
    "brown": colour("97602f"),
    "dark": colour("6d4630"),
}
HAIR_PAINT: dict[Hair, Colour] = {
    "black": colour("26222c"),
    "brown": colour("5c341c"),
    "blonde": colour("f2c84b"),
    "red": colour("d2481a"),
    "gray": colour("b3b6c0"),
    "blue": colour("3d6fe6"),
}
_EARRING_PAINT: dict[Earrings, Colour] = {
    "gold": colour("ffc72e"),
    "pearl": colour("fbf8f2"),
    "turquoise": colour("22b8b0"),
}


def draw_figure(pen: Pen, drawing: Drawing) -> None:
    """Draw the figure of ``drawing`` around the pen's origin, the centre of its head."""
    kind = drawing.identity.kind
    if kind == "robot":
        draw_robot(pen, drawing)
    elif kind != "person":
        draw_animal(pen, drawing)
    elif drawing.view == "front":
        _draw_front(pen, drawing)
    else:
        _draw_side(pen, drawing)


def _draw_front(pen: Pen, drawing: Drawing) -> None:
    who = drawing.identity
    half = 55 * who.face_width
    skin = SKIN_PAINT[who.skin]
    _draw_front_back_hair(pen, who, half)
    _draw_body(pen, skin, SHIRT_PAINT[drawing.shirt], side=False)
    for side in (-1, 1):
        pen.ellipse(side * half, 4, 11, 15, darker(skin, 0.08))
        pen.ellipse(side * (half + 1), 4, 5, 8, darker(skin, 0.25))
    pen.blob(_face_outline(half), skin)
    _draw_front_marks(pen, who, half)
    if who.beard == "beard":
        _draw_front_beard(pen, who, half)
    _draw_front_nose(pen, who)
    draw_mouth(pen, drawing.mood, 0, 37)
    if who.beard == "mustache":
        _draw_mustache(pen, who, 0)
    _draw_front_hair(pen, who, half, covered=drawing.hat != "none")
    for side in (-1, 1):
        x = side * 24 * (0.5 + 0.5 * who.face_width)
        draw_eye(pen, x, -3, EYE_PAINT[who.eyes])
        _draw_brow(pen, who, x, -22, side)
        if who.earrings != "none":
            pen.ellipse(side * (half + 2), 25, 8, 8, darker(_EARRING_PAINT[who.earrings], 0.3))
            pen.ellipse(side * (half + 2), 25, 6.5, 6.5, _EARRING_PAINT[who.earrings])
    draw_front_glasses(pen, drawing.glasses, 24 * (0.5 + 0.5 * who.face_width), -3, half)
    draw_hat(pen, drawing, half, -63)


def _draw_side(pen: Pen, drawing: Drawing) -> None:
    who = drawing.identity
    depth = 0.55 + 0.45 * who.face_width
    skin = SKIN_PAINT[who.skin]
    _draw_side_back_hair(pen, who, depth)
    _draw_body(pen, skin, SHIRT_PAINT[drawing.shirt], side=True)
    pen.blob(_profile_outline(who.nose, depth), skin)
    _draw_side_marks(pen, who)
    if who.beard == "beard":
        _draw_side_beard(pen, who)
    _draw_side_mouth(pen, drawing)
    if who.beard == "mustache":
        _draw_mustache(pen, who, -44)
    _draw_side_hair(pen, who, depth, covered=drawing.hat != "none")
    pen.ellipse(16, 5, 11, 16, darker(skin, 0.1))
    pen.ellipse(15, 5, 5.5, 9, darker(skin, 0.28))
    if who.earrings != "none":
        pen.ellipse(16, 28, 8, 8, darker(_EARRING_PAINT[who.earrings], 0.3))
        pen.ellipse(16, 28, 6.5, 6.5, _EARRING_PAINT[who.earrings])
    draw_eye(pen, -28, -3, EYE_PAINT[who.eyes], gaze=-3.5)
    _draw_brow(pen, who, -29, -22, -1)
    draw_side_glasses(pen, drawing.glasses, -30, -3)
    draw_hat(pen, drawing, 53 * depth, -63)


def _draw_body(pen: Pen, skin: Colour, shirt: Colour, *, side: bool) -> None:
    reach = 66 if side else 88
    shoulders: list[PenPoint] = [
        (-28, 80), (28, 80), (reach - 16, 92), (reach, 116), (reach + 6, 180), (reach, 240),
        (-reach, 240), (-reach - 6, 180), (-reach, 116), (16 - reach, 92),
    ]  # fmt: skip
    pen.blob(shoulders, shirt)
    shade = darker(skin, 0.22)
    if side:
        pen.ellipse(8, 90, 33, 13, lighter(shirt, 0.3))
        pen.ellipse(8, 87, 25, 9, shade)
        pen.polygon([(-14, 44), (32, 36), (33, 87), (-17, 87)], shade)
    else:
        pen.slice(0, 80, 30, 26, (0, 180), lighter(shirt, 0.3))
        pen.slice(0, 78, 22, 19, (0, 180), shade)
        pen.box(-22, 44, 22, 79, 0, shade)


def _face_outline(half: Units) -> list[PenPoint]:
    right: list[PenPoint] = [
        (half * 0.6, -54), (half * 0.96, -26), (half, 6), (half * 0.86, 36), (half * 0.48, 58),
    ]  # fmt: skip
    left = [(-x, y) for x, y in reversed(right)]
    return [(0, -64), *right, (0, 65), *left]


def _profile_outline(nose: float, depth: float) -> list[PenPoint]:
    tip = -55 - 14 * nose
    return [
        (-8, -64), (-40, -50), (-52, -24), (-50, -8), (tip + 4, 12), (tip + 2, 19),
        (-52, 23), (-55, 31), (-51, 36), (-54, 43), (-49, 48), (-50, 58), (-38, 67),
        (-10, 58), (22, 46), (46 * depth, 26), (57 * depth, -6), (48 * depth, -42), (22, -60),
    ]  # fmt: skip


def _draw_front_marks(pen: Pen, who: Identity, half: Units) -> None:
    skin = SKIN_PAINT[who.skin]
    if who.mark == "mole":
        pen.ellipse(half * 0.55, 29, 5.5, 5.5, darker(skin, 0.72))
    elif who.mark == "freckles":
        for x, y in ((0.78, 13), (0.6, 21), (0.42, 14)):
            for side in (-1, 1):
                pen.ellipse(side * half * x, y + 3, 4, 4, mix(skin, (120, 44, 12), 0.6))
    elif who.mark == "blush":
        for side in (-1, 1):
            pen.ellipse(side * half * 0.64, 21, 13, 9, mix(skin, (240, 64, 84), 0.5))
    elif who.mark == "scar":
        _draw_scar(pen, skin, -half * 0.62, 24)


def _draw_side_marks(pen: Pen, who: Identity) -> None:
    skin = SKIN_PAINT[who.skin]
    if who.mark == "mole":
        pen.ellipse(-22, 29, 5.5, 5.5, darker(skin, 0.72))
    elif who.mark == "freckles":
        for x, y in ((-36, 14), (-25, 21), (-14, 15)):
            pen.ellipse(x, y + 3, 4, 4, mix(skin, (120, 44, 12), 0.6))
    elif who.mark == "blush":
        pen.ellipse(-20, 21, 15, 10, mix(skin, (240, 64, 84), 0.5))
    elif who.mark == "scar":
        _draw_scar(pen, skin, -16, 24)


def _draw_scar(pen: Pen, skin: Colour, x: Units, y: Units) -> None:
    paint = mix(skin, (176, 30, 46), 0.7)
    pen.line([(x - 9, y - 11), (x + 9, y + 11)], 5, paint)
    pen.line([(x - 7, y + 5), (x + 7, y - 5)], 4, paint)


def _draw_front_beard(pen: Pen, who: Identity, half: Units) -> None:
    right: list[PenPoint] = [
        (half * 1.01, 6), (half * 0.94, 38), (half * 0.56, 66), (0, 77),
    ]  # fmt: skip
    inner: list[PenPoint] = [(half * 0.82, 14), (half * 0.55, 25)]
    left = [(-x, y) for x, y in reversed(right[:-1])]
    inner_left = [(-x, y) for x, y in inner]
    pen.polygon(
        [*_bowed(right), *_bowed(left), *inner_left, (0, 22), *reversed(inner)],
        HAIR_PAINT[who.hair],
    )


def _bowed(corners: list[PenPoint]) -> list[PenPoint]:
    """Add bulging midpoints, so that a few straight sides read as a curve."""
    bowed: list[PenPoint] = []
    for start, end in pairwise(corners):
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        bowed += [start, (middle[0] * 1.05, middle[1] * 1.03 + 1)]
    return [*bowed, corners[-1]]


def _draw_side_beard(pen: Pen, who: Identity) -> None:
    pen.blob(
        [
            (12, 12), (2, 26), (-22, 27), (-46, 25), (-58, 30), (-53, 38), (-57, 50), (-52, 70),
            (-34, 80), (-8, 70), (18, 48), (24, 24),
        ],
        HAIR_PAINT[who.hair],
    )  # fmt: skip


def _draw_mustache(pen: Pen, who: Identity, x: Units) -> None:
    paint = HAIR_PAINT[who.hair]
    pen.blob([(x, 23), (x + 14, 22), (x + 30, 32), (x + 14, 34), (x, 30)], paint)
    pen.blob(
        [(x, 23), (x - 14, 22), (x - (30 if x == 0 else 17), 32), (x - 14, 34), (x, 30)], paint
    )


def _draw_front_nose(pen: Pen, who: Identity) -> None:
    skin = SKIN_PAINT[who.skin]
    size = who.nose
    pen.ellipse(0, 14, 8.5 * size, 7.5 * size, mix(darker(skin, 0.2), (200, 70, 50), 0.2))
    pen.ellipse(-1.5 * size, 12, 5.5 * size, 4.5 * size, lighter(skin, 0.12))


def _draw_side_mouth(pen: Pen, drawing: Drawing) -> None:
    lip = colour("a8323f")
    if drawing.mood == "smile":
        pen.line([(-52, 36), (-42, 39), (-31, 33)], 5.5, lip)
    elif drawing.mood == "neutral":
        pen.line([(-52, 37), (-34, 37)], 5.5, lip)
    else:
        pen.ellipse(-47, 38, 10, 9, colour("7a1526"))
        pen.ellipse(-46, 43, 6, 4, colour("e0606c"))


def _draw_brow(pen: Pen, who: Identity, x: Units, y: Units, side: int) -> None:
    paint = darker(HAIR_PAINT[who.hair], 0.4 if who.hair != "black" else 0.0)
    if who.brows == "arched":
        pen.arc(x, y + 7, 15, 13, (205, 335), 5.5, paint)
    elif who.brows == "thick":
        pen.line([(x - 13, y + side), (x + 13, y - side)], 9, paint)
    else:
        pen.line([(x - 12, y), (x + 12, y)], 4, paint)


def _draw_front_back_hair(pen: Pen, who: Identity, half: Units) -> None:
    paint = HAIR_PAINT[who.hair]
    if who.style == "long":
        right: list[PenPoint] = [
            (half * 0.8, -62), (half + 17, -24), (half + 22, 40), (half + 20, 106), (half - 4, 116),
        ]  # fmt: skip
        pen.blob([(0, -76), *right, *[(-x, y) for x, y in reversed(right)]], darker(paint, 0.12))
    elif who.style == "curly":
        _draw_curls(pen, 0, -18, half + 9, 56, paint)
    elif who.style == "bun":
        pen.ellipse(0, -80, 27, 23, paint)
        pen.arc(0, -80, 15, 12, (180, 330), 5, lighter(paint, 0.3))


def _draw_front_hair(pen: Pen, who: Identity, half: Units, *, covered: bool) -> None:
    paint, shine = HAIR_PAINT[who.hair], lighter(HAIR_PAINT[who.hair], 0.3)
    if who.style == "bald":
        if not covered:
            pen.ellipse(-half * 0.35, -46, 12, 6, lighter(SKIN_PAINT[who.skin], 0.45))
        return
    if who.style == "mohawk":
        for side in (-1, 1):
            pen.blob(
                [(side * half * 0.45, -56), (side * half * 0.92, -34), (side * half, -8),
                 (side * half * 0.9, -18), (side * half * 0.6, -40)],
                mix(SKIN_PAINT[who.skin], paint, 0.55),
            )  # fmt: skip
        if not covered:
            pen.polygon(
                [(-20, -38), (-25, -84), (-13, -76), (-10, -104), (0, -88), (10, -106),
                 (14, -78), (25, -86), (20, -38), (0, -48)],
                paint,
            )  # fmt: skip
            pen.line([(-4, -56), (-4, -80)], 5, shine)
        return
    if who.style == "curly":
        pen.ellipse(0, -56, half * 0.85, 14, paint)
        for x in (-0.78, -0.3, 0.22, 0.74):
            pen.ellipse(x * half, -51 + 8 * abs(x), 18, 16, paint)
        pen.arc(-half * 0.3, -58, 10, 9, (180, 300), 5, shine)
        return
    _draw_fringe(pen, who, half, paint)
    if not covered:
        pen.arc(-2, -22, half * 0.8, 44, (212, 262), 6, shine)


def _draw_fringe(pen: Pen, who: Identity, half: Units, paint: Colour) -> None:
    """Frame the forehead: a side parting, straight bangs or hair combed up to a bun."""
    crown: list[PenPoint] = [
        (-half - 5, -6), (-half - 3, -38), (-half * 0.62, -66), (0, -75), (half * 0.62, -66),
        (half + 3, -38), (half + 5, -6),
    ]  # fmt: skip
    if who.style == "short":
        front: list[PenPoint] = [
            (half - 5, -14), (half * 0.8, -34), (half * 0.3, -40), (-half * 0.45, -29),
            (-half + 6, -12),
        ]  # fmt: skip
    elif who.style == "long":
        front = [
            (half - 4, 20), (half * 0.86, -18), (half * 0.3, -46), (0, -54), (-half * 0.3, -46),
            (-half * 0.86, -18), (-half + 4, 20),
        ]  # fmt: skip
    else:
        front = [
            (half - 1, -14), (half * 0.76, -42), (0, -52), (-half * 0.76, -42), (-half + 1, -14),
        ]  # fmt: skip
    # A shadow keeps brown hair apart from brown skin.
    shadow = darker(SKIN_PAINT[who.skin], 0.3)
    pen.blob([(x * 0.95, y + 5) for x, y in (*crown, *front)], shadow)
    pen.blob([*crown, *front], paint)


def _draw_side_back_hair(pen: Pen, who: Identity, depth: float) -> None:
    paint = HAIR_PAINT[who.hair]
    if who.style == "curly":
        _draw_curls(pen, 14, -14, 58 * depth, 54, paint)
    elif who.style == "bun":
        pen.ellipse(62 * depth, -42, 25, 23, paint)
        pen.arc(62 * depth, -42, 14, 12, (180, 330), 5, lighter(paint, 0.3))


def _draw_side_hair(pen: Pen, who: Identity, depth: float, *, covered: bool) -> None:
    paint, shine = HAIR_PAINT[who.hair], lighter(HAIR_PAINT[who.hair], 0.3)
    back = 64 * depth
    if who.style == "bald":
        if not covered:
            pen.ellipse(-6, -50, 14, 6, lighter(SKIN_PAINT[who.skin], 0.45))
        return
    if who.style == "mohawk":
        pen.blob(
            [(-34, -50), (-4, -46), (20, -20), (22, 10), (36, 20), (back - 6, 0),
             (back - 10, -40), (20, -64)],
            mix(SKIN_PAINT[who.skin], paint, 0.55),
        )  # fmt: skip
        if not covered:
            pen.polygon(
                [(-44, -46), (-50, -82), (-30, -74), (-22, -104), (-4, -84), (12, -108),
                 (24, -82), (46, -94), (48, -66), (70, -60), (60, -34), (72, -18), (50, -10),
                 (40, -46), (0, -58)],
                paint,
            )  # fmt: skip
        return
    if who.style == "curly":
        pen.ellipse(26, -24, 34, 40, paint)
        for x, y in ((-38, -50), (-14, -60), (12, -52), (34, -34), (44, -8), (36, 14)):
            pen.ellipse(x, y, 18, 16, paint)
        pen.arc(-14, -66, 10, 9, (180, 300), 5, shine)
        return
    top: list[PenPoint] = [(-50, -30), (-46, -58), (-8, -76), (30, -68), (back - 4, -38)]
    if who.style == "long":
        fall = [(back + 4, 10), (back + 2, 104), (30, 112), (6, 96), (4, 40), (-2, 0), (-14, -30)]
    elif who.style == "bun":
        fall = [(back, -12), (44, 16), (28, -4), (12, -18), (-22, -44)]
    else:
        fall = [(back, 2), (46, 34), (30, 30), (26, -8), (4, -10), (2, 6), (-8, 4), (-14, -28)]
    pen.blob([*top, *fall], paint)
    if not covered:
        pen.arc(4, -22, 44, 44, (220, 275), 6, shine)


def _draw_curls(
    pen: Pen, x: Units, y: Units, radius_x: Units, radius_y: Units, paint: Colour
) -> None:
    pen.ellipse(x, y, radius_x, radius_y, paint)
    for i in range(12):
        angle = math.tau * i / 12
        pen.ellipse(x + math.cos(angle) * radius_x, y + math.sin(angle) * radius_y, 19, 19, paint)
