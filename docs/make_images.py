"""Lay pictures of a run out: ``make_images.py journey RUN`` or ``drawing RUN SET=LABEL…``.

The first is the README's picture of a finished demo, the second a row for each set of one run.
Nothing is chosen: rows hold the first pictures.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dreamloom.core.manifests import ImageSet, read_image_set, read_photo_set
from dreamloom.data.image_io import crop_centre, open_upright

SIDE, GAP, LABEL = 128, 6, 22
PAPER, INK = "#faf8f4", "#24221e"
IMAGES = Path(__file__).parent / "images"

Row = tuple[str, list[Image.Image]]


def list_journey(demo: Path) -> list[Row]:
    """List one row each for the photos, the base model, the adapter's prompts, and the merge."""
    photos = [crop_centre(open_upright(path)) for path in read_photo_set(demo / "photos").paths()]
    rows = [("six photos of one person", photos)]
    for name, label in (("base", "the base model"), ("with_prior", "with the adapter")):
        images = read_image_set(demo / "images" / name)
        first = images.pictures[0].seed
        rows.append((f"{label}, each prompt's first seed", _open(images.select(seed=first))))
    merged = read_image_set(demo / "images" / "merged")
    label = f"merged with pixel art, on “{merged.pictures[0].prompt}”"
    return [*rows, (label, _open(merged))]


def list_sets(run: Path, sets: list[str]) -> list[Row]:
    """List a row for each ``SET=LABEL``."""
    named = [text.partition("=") for text in sets]
    return [(label, _open(read_image_set(run / "images" / name))) for name, _, label in named]


def _open(images: ImageSet) -> list[Image.Image]:
    return [open_upright(path) for path in images.paths()]


def lay_out(rows: list[Row], columns: int, out: Path) -> None:
    """Write the rows' first pictures under their labels."""
    width = columns * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + LABEL + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (label, pictures) in enumerate(rows):
        top = GAP + number * (SIDE + LABEL + GAP)
        pen.text((GAP, top + 4), label, INK, ImageFont.load_default(13))
        for column, picture in enumerate(pictures[:columns]):
            place = (GAP + column * (SIDE + GAP), top + LABEL)
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), place)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(192, dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)


if __name__ == "__main__":
    what, run, *sets = sys.argv[1:]
    if what == "journey":
        lay_out(list_journey(Path(run)), 6, IMAGES / "journey.png")
    else:
        lay_out(list_sets(Path(run), sets), 4, IMAGES / "drawing.png")
