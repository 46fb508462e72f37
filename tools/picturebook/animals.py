"""Dogs, cats and robots, as large and as simple as the people."""

from dreamloom.picturebook.pen import WHITE, Colour, Pen, Units, colour, darker, lighter, mix
from dreamloom.picturebook.wear import (
    EYE_PAINT,
    SHIRT_PAINT,
    draw_eye,
    draw_front_glasses,
    draw_hat,
    draw_side_glasses,
)
from dreamloom.picturebook.world import Coat, Drawing, Identity

COAT_PAINT: dict[Coat, Colour] = {
    "black": colour("34313c"),
    "brown": colour("7d4c2c"),
    "golden": colour("eebb52"),
    "ginger": colour("e2762c"),
    "gray": colour("9a9fab"),
    "white": colour("f1ece4"),
    "silver": colour("b9c2cc"),
    "red": colour("d9534a"),
    "blue": colour("5a8fd8"),
    "green": colour("62b07c"),
}
_EAR_PINK = colour("f0a3a6")
_MOUTH = colour("8a2436")
_STEEL = colour("5c6472")


def draw_animal(pen: Pen, drawing: Drawing) -> None:
    """Draw a dog or a cat, with its collar in the shirt's colour."""
    who = drawing.identity
    coat = COAT_PAINT[who.coat]
    shade = lighter(coat, 0.22) if who.coat == "black" else darker(coat, 0.16)
    pen.blob([(0, 52), (46, 70), (66, 128), (70, 240), (-70, 240), (-66, 128), (-46, 70)], shade)
    pen.ellipse(0, 140, 34, 44, _muzzle_paint(who))
    pen.box(-44, 62, 44, 80, 9, SHIRT_PAINT[drawing.shirt])
    pen.ellipse(0, 84, 10, 10, colour("ffd24a"))
    if drawing.view == "front":
        _draw_front_animal(pen, drawing)
    else:
        _draw_side_animal(pen, drawing)


def _draw_front_animal(pen: Pen, drawing: Drawing) -> None:
    who = drawing.identity
    half = 57 * who.face_width
    coat, muzzle = COAT_PAINT[who.coat], _muzzle_paint(who)
    is_cat = who.kind == "cat"
    for side in (-1, 1):
        _draw_ear(pen, who, side, half)
    pen.blob(
        [(0, -56), (half * 0.7, -44), (half, -4), (half * 0.84, 36), (0, 58),
         (-half * 0.84, 36), (-half, -4), (-half * 0.7, -44)],
        coat,
    )  # fmt: skip
    _draw_front_patch(pen, who, half)
    if is_cat:
        for side in (-1, 1):
            pen.ellipse(side * 13, 31, 17, 14, muzzle)
            for y in (27, 38):
                pen.line(
                    [(side * 26, y), (side * (half + 6), y + (y - 32) * 0.8)],
                    3.5,
                    darker(muzzle, 0.35),
                )
    else:
        pen.ellipse(0, 30, 31, 25, muzzle)
    if who.kind == "dog" and who.ears != "pointed":
        for side in (-1, 1):
            _draw_floppy_ear(pen, who, side, half)
    _draw_animal_mouth(pen, drawing, 0, 38)
    nose = colour("e8828e") if is_cat and who.coat != "white" else colour("2c2430")
    pen.ellipse(0, 18, (8 if is_cat else 12) * (0.6 + 0.4 * who.nose), 6 if is_cat else 8.5, nose)
    for side in (-1, 1):
        draw_eye(pen, side * 25, -8, EYE_PAINT[who.eyes])
    draw_front_glasses(pen, drawing.glasses, 25, -8, half)
    draw_hat(pen, drawing, half * 0.9, -55)


def _draw_ear(pen: Pen, who: Identity, side: int, half: Units) -> None:
    coat = COAT_PAINT[who.coat]
    if who.ears == "pointed" or who.kind == "cat":
        lean = 0.2 if who.ears == "pointed" else 0.55
        tip = (side * half * (0.9 + lean), -92 + 44 * lean)
        pen.polygon([(side * half * 0.98, -14), tip, (side * half * 0.18, -50)], coat)
        pen.polygon(
            [(side * half * 0.86, -28), (tip[0] * 0.94, tip[1] + 16), (side * half * 0.4, -46)],
            _EAR_PINK,
        )


def _draw_floppy_ear(pen: Pen, who: Identity, side: int, half: Units) -> None:
    coat = COAT_PAINT[who.coat]
    paint = lighter(coat, 0.2) if who.coat == "black" else darker(coat, 0.32)
    pen.blob(
        [(side * half * 0.5, -50), (side * (half + 8), -38), (side * (half + 20), 8),
         (side * (half + 8), 42), (side * half * 0.84, 22), (side * half * 0.8, -18)],
        paint,
    )  # fmt: skip


def _draw_front_patch(pen: Pen, who: Identity, half: Units) -> None:
    paint = _patch_paint(who)
    if who.patch == "eye patch":
        pen.ellipse(26, -10, 25, 25, paint)
    elif who.patch == "blaze":
        pen.blob([(0, -58), (13, -40), (9, 0), (20, 26), (-20, 26), (-9, 0), (-13, -40)], paint)
    elif who.patch == "cheeks":
        for side in (-1, 1):
            pen.ellipse(side * half * 0.66, 22, 19, 17, paint)


def _draw_side_animal(pen: Pen, drawing: Drawing) -> None:
    who = drawing.identity
    coat, muzzle = COAT_PAINT[who.coat], _muzzle_paint(who)
    is_cat = who.kind == "cat"
    depth = 0.5 + 0.5 * who.face_width
    snout = -58 if is_cat else -80 - 8 * who.nose
    pen.ellipse(6, 0, 56 * depth, 56, coat)
    if who.patch == "eye patch":
        pen.ellipse(-22, -10, 25, 25, _patch_paint(who))
    elif who.patch == "cheeks":
        pen.ellipse(-4, 26, 20, 18, _patch_paint(who))
    top = 14 if is_cat else 4
    pen.blob(
        [(-24, top), (snout + 14, top), (snout, top + 14), (snout + 6, 42), (-26, 48), (-8, 30)],
        muzzle,
    )
    if who.patch == "blaze":
        pen.blob(
            [(-6, -56), (-34, -44), (-50, -14), (-52, 12), (-40, 10), (-36, -20)], _patch_paint(who)
        )
    if is_cat:
        for y in (26, 37):
            pen.line([(-34, y), (0, y + (y - 32) * 0.9)], 3.5, darker(muzzle, 0.35))
    nose = colour("e8828e") if is_cat and who.coat != "white" else colour("2c2430")
    pen.ellipse(snout + 6, top + 5, 8 if is_cat else 12, 7 if is_cat else 9, nose)
    if drawing.mood == "open":
        pen.ellipse(snout + 26, 42, 12, 10, _MOUTH)
        pen.ellipse(snout + 25, 47, 8, 6, colour("f0788c"))
    else:
        bend = 5 if drawing.mood == "smile" else 0
        pen.line([(snout + 6, 33), (snout + 20, 34 + bend), (snout + 36, 34 - bend)], 4.5, _MOUTH)
    _draw_side_ear(pen, who)
    draw_eye(pen, -26, -8, EYE_PAINT[who.eyes], gaze=-3.5)
    draw_side_glasses(pen, drawing.glasses, -28, -8)
    draw_hat(pen, drawing, 50 * depth, -55)


def _draw_side_ear(pen: Pen, who: Identity) -> None:
    coat = COAT_PAINT[who.coat]
    dark = lighter(coat, 0.2) if who.coat == "black" else darker(coat, 0.32)
    if who.ears == "pointed":
        pen.polygon([(4, -42), (34, -96), (54, -26)], darker(coat, 0.12))
        pen.polygon([(16, -44), (34, -78), (44, -36)], _EAR_PINK)
    elif who.kind == "cat":
        pen.polygon([(4, -44), (62, -70), (56, -20)], darker(coat, 0.12))
        pen.polygon([(18, -44), (52, -60), (48, -30)], _EAR_PINK)
    else:
        pen.blob([(10, -34), (36, -36), (50, 0), (40, 44), (20, 34), (14, 0)], dark)


def _draw_animal_mouth(pen: Pen, drawing: Drawing, x: Units, y: Units) -> None:
    if drawing.mood == "open":
        pen.ellipse(x, y + 4, 13, 11, _MOUTH)
        pen.ellipse(x, y + 10, 9, 7, colour("f0788c"))
    elif drawing.mood == "smile":
        for side in (-1, 1):
            pen.arc(x + side * 9, y - 3, 10, 9, (10, 170), 4.5, _MOUTH)
    else:
        pen.line([(x - 11, y + 2), (x + 11, y + 2)], 4.5, _MOUTH)


def _muzzle_paint(who: Identity) -> Colour:
    coat = COAT_PAINT[who.coat]
    if who.coat == "white":
        return mix(coat, (226, 190, 160), 0.5)
    return lighter(coat, 0.62 if who.coat != "black" else 0.42)


def _patch_paint(who: Identity) -> Colour:
    coat = COAT_PAINT[who.coat]
    if who.coat in ("white", "golden", "gray"):
        return mix(coat, (92, 56, 36), 0.72)
    return lighter(coat, 0.72)


def draw_robot(pen: Pen, drawing: Drawing) -> None:
    """Draw a robot, with the shirt's colour on its chest and cheeks."""
    who = drawing.identity
    half = 58 * who.face_width
    metal, panel = COAT_PAINT[who.coat], SHIRT_PAINT[drawing.shirt]
    pen.box(-16, 44, 16, 90, 0, _STEEL)
    pen.box(-74, 78, 74, 250, 26, darker(metal, 0.2))
    pen.box(-40, 92, 40, 170, 12, panel)
    for x in (-18, 0, 18):
        pen.ellipse(x, 106, 6, 6, lighter(panel, 0.6))
    _draw_antennas(pen, who, half, covered=drawing.hat != "none")
    if drawing.view == "front":
        for side in (-1, 1):
            pen.box(side * half - 11, -20, side * half + 11, 22, 8, _STEEL)
        pen.box(-half, -56, half, 58, 22, metal)
        _draw_robot_face(pen, drawing, (-26, 26), 0, half)
        draw_front_glasses(pen, drawing.glasses, 26, -10, half)
        draw_hat(pen, drawing, half * 0.9, -55)
    else:
        pen.box(-60, 16, -40, 36, 6, _STEEL)
        pen.box(-half * 0.9, -56, half, 58, 22, metal)
        pen.ellipse(24, 2, 18, 18, _STEEL)
        pen.ellipse(24, 2, 9, 9, lighter(metal, 0.4))
        _draw_robot_face(pen, drawing, (-30,), -30, half * 0.9)
        draw_side_glasses(pen, drawing.glasses, -32, -10)
        draw_hat(pen, drawing, half * 0.88, -55)


def _draw_antennas(pen: Pen, who: Identity, half: Units, *, covered: bool) -> None:
    bulb = colour("ff5a4e")
    if who.ears == "round":
        for side in (-1, 1):
            pen.ellipse(side * half, 0, 22, 24, bulb)
    elif who.ears == "floppy":
        for side in (-1, 1):
            pen.line([(side * half * 0.6, -50), (side * (half + 10), -84)], 7, _STEEL)
            pen.ellipse(side * (half + 10), -86, 11, 11, bulb)
    elif not covered:
        pen.line([(0, -50), (0, -86)], 7, _STEEL)
        pen.ellipse(0, -90, 13, 13, bulb)


def _draw_robot_face(
    pen: Pen, drawing: Drawing, eyes_x: tuple[Units, ...], mouth_x: Units, half: Units
) -> None:
    who = drawing.identity
    metal = COAT_PAINT[who.coat]
    trim = lighter(metal, 0.55)
    if who.patch == "eye patch":
        pen.box(-half + 4, -32, half - 4 if mouth_x == 0 else 2, 12, 16, darker(metal, 0.5))
    elif who.patch == "blaze":
        pen.box(mouth_x - 7, -56, mouth_x + 7, 10, 0, trim)
    elif who.patch == "cheeks":
        for x in eyes_x:
            pen.ellipse(x * 1.4 if mouth_x == 0 else x + 34, 24, 11, 11, trim)
    for x in eyes_x:
        pen.ellipse(x, -10, 19, 19, _STEEL)
        pen.ellipse(x, -10, 15, 15, WHITE)
        pen.ellipse(x, -10, 10, 10, EYE_PAINT[who.eyes])
        pen.ellipse(x - 3, -14, 3.5, 3.5, WHITE)
    dark = colour("2e3440")
    if drawing.mood == "smile":
        pen.arc(mouth_x, 22, 22, 18, (10, 170), 7, dark)
    elif drawing.mood == "neutral":
        pen.line([(mouth_x - 18, 34), (mouth_x + 18, 34)], 7, dark)
    else:
        pen.box(mouth_x - 22, 22, mouth_x + 22, 44, 6, dark)
        for i in range(3):
            pen.box(mouth_x - 17 + i * 12, 27, mouth_x - 9 + i * 12, 39, 2, colour("9ff0d0"))
