"""What figures share: eyes, mouths, glasses and hats."""

from dreamloom.picturebook.pen import WHITE, Colour, Pen, Units, colour, darker, lighter
from dreamloom.picturebook.world import Drawing, Eyes, Glasses, Mood, Shirt

EYE_PAINT: dict[Eyes, Colour] = {
    "brown": colour("7a431c"),
    "blue": colour("2b86ea"),
    "green": colour("2f9e44"),
    "gray": colour("8b97a3"),
}
SHIRT_PAINT: dict[Shirt, Colour] = {
    "red": colour("d63a3a"),
    "blue": colour("2f62d0"),
    "green": colour("2f9a55"),
    "yellow": colour("f0c92f"),
    "white": colour("f2f2f0"),
    "purple": colour("8a45b5"),
    "orange": colour("f0842a"),
    "black": colour("33333d"),
}
_RIM = colour("1c1c26")
_LENS = colour("16161e")


def draw_eye(pen: Pen, x: Units, y: Units, iris: Colour, gaze: Units = 0.0) -> None:
    """Draw a large eye; ``gaze`` moves the iris sideways, in units."""
    pen.ellipse(x, y, 14.5, 13, darker(iris, 0.75))
    pen.ellipse(x, y + 1, 13, 11.5, WHITE)
    pen.ellipse(x + gaze, y + 1, 10.5, 10.5, iris)
    pen.ellipse(x + gaze, y + 1, 5, 5.5, colour("101018"))
    pen.ellipse(x + gaze - 3.5, y - 3, 3.2, 3.2, WHITE)


def draw_mouth(pen: Pen, mood: Mood, x: Units, y: Units) -> None:
    """Draw a mouth seen from the front: smiling, neutral or open."""
    if mood == "smile":
        pen.slice(x, y - 5, 21, 16, (0, 180), colour("a8323f"))
        pen.box(x - 15, y - 5, x + 15, y, 2, WHITE)
    elif mood == "neutral":
        pen.line([(x - 14, y), (x + 14, y)], 5.5, colour("a8323f"))
    else:
        pen.ellipse(x, y + 2, 12, 12, colour("7a1526"))
        pen.ellipse(x, y + 8, 8, 5, colour("e0606c"))


def draw_front_glasses(pen: Pen, glasses: Glasses, eye_x: Units, y: Units, half: Units) -> None:
    """Draw glasses over two eyes at ±``eye_x`` on a head ``half`` units wide to each side."""
    if glasses == "none":
        return
    for side in (-1, 1):
        pen.line([(side * half, y - 4), (side * (eye_x + 20), y - 4)], 6, _RIM)
    pen.line([(-eye_x + 18, y - 3), (eye_x - 18, y - 3)], 6, _RIM)
    for x in (-eye_x, eye_x):
        _draw_lens(pen, glasses, x, y)


def draw_side_glasses(pen: Pen, glasses: Glasses, x: Units, y: Units) -> None:
    """Draw glasses in profile: one lens at (x, y) and the temple to the ear."""
    if glasses == "none":
        return
    pen.line([(x + 14, y - 4), (16, y - 4)], 6, _RIM)
    pen.line([(x - 18, y - 3), (x - 26, y - 3)], 6, _RIM)
    _draw_lens(pen, glasses, x, y)


def _draw_lens(pen: Pen, glasses: Glasses, x: Units, y: Units) -> None:
    if glasses == "sunglasses":
        pen.ellipse(x, y, 22, 19, _LENS)
        pen.line([(x - 9, y - 3), (x - 3, y - 9)], 4.5, colour("6e7896"))
    else:
        pen.ring(x, y, 22, 21, 6, _RIM)


def draw_hat(pen: Pen, drawing: Drawing, half: Units, crown_y: Units) -> None:
    """Draw the hat of ``drawing`` on a head.

    ``half`` is half the head's width and ``crown_y`` the height of its top, in units; a side
    view has the cap's visor on the left.
    """
    if drawing.hat == "cap":
        _draw_cap(pen, drawing, half, crown_y)
    elif drawing.hat == "top hat":
        black, edge = colour("2a2833"), colour("4a4858")
        pen.polygon(
            [(-half * 0.78, crown_y + 20), (-half * 0.86, crown_y - 50),
             (half * 0.86, crown_y - 50), (half * 0.78, crown_y + 20)],
            black,
        )  # fmt: skip
        pen.ellipse(0, crown_y - 50, half * 0.86, 8, edge)
        pen.box(-half * 0.8, crown_y - 4, half * 0.8, crown_y + 14, 0, colour("d03a44"))
        pen.ellipse(0, crown_y + 19, half + 24, 12, black)
        pen.ellipse(0, crown_y + 16, half + 17, 5, edge)
        pen.box(-half * 0.79, crown_y + 2, half * 0.79, crown_y + 15, 3, colour("d03a44"))
    elif drawing.hat == "party hat":
        _draw_party_hat(pen, crown_y)


def _draw_cap(pen: Pen, drawing: Drawing, half: Units, crown_y: Units) -> None:
    base = SHIRT_PAINT[drawing.shirt]
    paint = darker(base, 0.18) if drawing.shirt != "black" else lighter(base, 0.15)
    pen.slice(0, crown_y + 36, half + 8, 54, (180, 360), paint)
    pen.slice(0, crown_y + 36, half * 0.36, 54, (180, 360), lighter(paint, 0.22))
    pen.ellipse(0, crown_y - 17, 8, 6, lighter(paint, 0.3))
    if drawing.view == "front":
        pen.slice(0, crown_y + 40, half + 6, 17, (180, 360), darker(paint, 0.4))
        pen.box(-half - 6, crown_y + 33, half + 6, crown_y + 41, 4, darker(paint, 0.4))
    else:
        pen.blob(
            [(-half - 44, crown_y + 40), (-half - 6, crown_y + 22), (4, crown_y + 28),
             (4, crown_y + 38), (-half - 6, crown_y + 37), (-half - 38, crown_y + 46)],
            darker(paint, 0.4),
        )  # fmt: skip


def _draw_party_hat(pen: Pen, crown_y: Units) -> None:
    pink, yellow = colour("f0569c"), colour("ffd94a")
    base, tip = crown_y + 18, crown_y - 56
    pen.polygon([(-38, base), (0, tip), (38, base)], pink)
    pen.slice(0, base, 38, 9, (0, 180), pink)
    for low, high in ((0.12, 0.34), (0.56, 0.78)):
        low_y, high_y = base + (tip - base) * low, base + (tip - base) * high
        low_x, high_x = 38 * (1 - low), 38 * (1 - high)
        pen.polygon([(-low_x, low_y), (low_x, low_y), (high_x, high_y), (-high_x, high_y)], yellow)
    pen.ellipse(0, tip + 2, 12, 12, WHITE)
