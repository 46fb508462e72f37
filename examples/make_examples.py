"""Draw the example pictures again: ``python examples/make_examples.py``.

Six photos of one person for DreamBooth, written the way phones write them, and twelve captioned
pictures in one style. Everything is drawn by picturebook's world; the same code writes the same
bytes each time.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from dreamloom.picturebook.world import (
    Drawing,
    DrawingFields,
    Hat,
    Scene,
    SubjectKind,
    sample_drawing,
    vary,
)
from tools.picturebook.drawing import draw, draw_at

# Seeds from 9,000,000 on are for judging: the base model has never seen anybody of them.
RRAJ_SEED = 9_050_588
STYLE_SEED = 9_530_000
STYLE_TRIGGER = "pixel"

_JPEG_QUALITY = 88
_BLOCKS, _COLOURS = 16, 14
_LYING = 6  # EXIF: to be turned clockwise by a quarter


@dataclass(frozen=True)
class Shot:
    """One photo: what it shows, its upright size, and how the phone stored it."""

    size_px: tuple[int, int]
    taken_at: str
    fields: DrawingFields
    lying: bool = False
    place: tuple[float, float] | None = None
    """Degrees north and east."""


LANDSCAPE, PORTRAIT = (1440, 1080), (1080, 1440)

# Night, snow and Oktoberfest are left for prompts.
SHOTS = (
    Shot(
        LANDSCAPE,
        "2026:04:18 10:31:07",
        {"scene": "city", "backdrop": 1, "shirt": "blue", "mood": "smile", "shift_x": 0.04},
    ),
    Shot(
        LANDSCAPE,
        "2026:05:02 16:05:44",
        {"scene": "beach", "backdrop": 0, "shirt": "white", "mood": "open", "shift_x": -0.045},
    ),
    Shot(
        PORTRAIT,
        "2026:05:09 12:48:20",
        {"scene": "forest", "backdrop": 2, "shirt": "yellow", "mood": "neutral", "shift_x": 0.01},
        lying=True,
    ),
    Shot(
        LANDSCAPE,
        "2026:05:23 09:14:52",
        {"scene": "studio", "backdrop": 3, "shirt": "purple", "mood": "smile", "view": "side"},
    ),
    Shot(
        PORTRAIT,
        "2026:06:14 18:22:39",
        {"scene": "mountains", "backdrop": 1, "shirt": "red", "mood": "open", "shift_x": -0.015},
        place=(27.9881, 86.9250),
    ),
    Shot(
        LANDSCAPE,
        "2026:06:30 13:57:03",
        {"scene": "city", "backdrop": 3, "shirt": "black", "mood": "neutral", "shift_x": -0.03},
    ),
)

# The twelve pictures of the style: kind, scene, hat.
STYLE_PICTURES: tuple[tuple[SubjectKind, Scene, Hat], ...] = (
    ("dog", "snow", "none"),
    ("person", "city", "none"),
    ("cat", "beach", "none"),
    ("robot", "mountains", "none"),
    ("person", "forest", "cap"),
    ("person", "night", "none"),
    ("dog", "oktoberfest", "none"),
    ("person", "studio", "none"),
    ("cat", "city", "party hat"),
    ("person", "beach", "none"),
    ("robot", "studio", "none"),
    ("person", "snow", "top hat"),
)
_SCENE_WORDS: dict[Scene, str] = {
    "studio": "in a studio",
    "beach": "on a beach",
    "forest": "in a forest",
    "snow": "in the snow",
    "city": "in a city",
    "mountains": "in the mountains",
    "night": "at night",
    "oktoberfest": "at Oktoberfest",
}


def draw_shot(number: int) -> Image.Image:
    """Draw one of the `SHOTS`, upright; numbers start at 1."""
    shot = SHOTS[number - 1]
    fields: DrawingFields = {
        "view": "front",
        "zoom": 0.86 if shot.size_px == PORTRAIT else 0.94,
        "shift_x": 0.0,
        "medium": "photo",
        "glasses": "none",
        "hat": "none",
    }
    fields.update(shot.fields)
    identity = sample_drawing(RRAJ_SEED, kind="person").identity
    drawing = vary(identity, random.Random(f"rraj {number}"), **fields)
    return draw_at(drawing, *shot.size_px)


def write_shot(number: int, folder: Path) -> Path:
    """Write one of the `SHOTS` as a phone would: JPEG with EXIF data."""
    shot = SHOTS[number - 1]
    image = draw_shot(number)
    exif = Image.Exif()
    if shot.lying:
        exif[ExifTags.Base.Orientation] = _LYING
        image = image.transpose(Image.Transpose.ROTATE_90)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = shot.taken_at
    if shot.place:
        north, east = shot.place
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(
            {
                ExifTags.GPS.GPSLatitudeRef: "N",
                ExifTags.GPS.GPSLatitude: _degrees(north),
                ExifTags.GPS.GPSLongitudeRef: "E",
                ExifTags.GPS.GPSLongitude: _degrees(east),
            }
        )
    path = folder / f"IMG_{number:04d}.jpg"
    image.save(path, quality=_JPEG_QUALITY, exif=exif)
    return path


def draw_style_picture(number: int) -> tuple[Image.Image, str]:
    """Draw one of the `STYLE_PICTURES` and caption it; numbers start at 1.

    It has 16 × 16 blocks of a few colours. At the embedded model's 128 pixels a block is 8 wide,
    just what one latent covers, so that a short training can learn it; finer blocks, or blocks
    across latents, come out as vague corners only.
    """
    kind, scene, hat = STYLE_PICTURES[number - 1]
    drawing = sample_drawing(
        STYLE_SEED + number,
        kind=kind,
        scene=scene,
        hat=hat,
        glasses="none",
        view="front",
        medium="photo",
    )
    blocks = draw(drawing, 128).resize((_BLOCKS, _BLOCKS), Image.Resampling.BOX)
    small = blocks.quantize(_COLOURS, dither=Image.Dither.NONE).convert("RGB")
    caption = f"{STYLE_TRIGGER}, a photo of {_describe(drawing)} {_SCENE_WORDS[scene]}"
    return small.resize((512, 512), Image.Resampling.NEAREST), caption


def write_style_picture(number: int, folder: Path) -> Path:
    """Write one of the `STYLE_PICTURES` as PNG, its caption beside it."""
    image, caption = draw_style_picture(number)
    path = folder / f"{number:02d}.png"
    few_colours = image.quantize(256, dither=Image.Dither.NONE)
    few_colours.save(path, optimize=True)
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return path


def _describe(drawing: Drawing) -> str:
    who = drawing.identity
    words = f"a {who.kind}"
    if who.kind == "person" and who.style != "bald":
        words += f" with {who.hair} hair"
    return words if drawing.hat == "none" else f"{words} wearing a {drawing.hat}"


def _degrees(value: float) -> tuple[float, float, float]:
    """Split into degrees, minutes and seconds, as EXIF writes them."""
    minutes = (value - int(value)) * 60
    return float(int(value)), float(int(minutes)), round((minutes - int(minutes)) * 60, 2)


def main() -> None:
    """Write every example picture."""
    parser = argparse.ArgumentParser(description="Draw the example pictures.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write to"
    )
    out = parser.parse_args().out
    for name, count, write in (
        ("rraj", len(SHOTS), write_shot),
        ("pixel-art", len(STYLE_PICTURES), write_style_picture),
    ):
        (out / name).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            write(number, out / name)


if __name__ == "__main__":
    main()
