"""Lay a finished demo out as the README's picture: ``make_journey_image.py runs/demo``."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dreamloom.core.manifests import ImageSet, read_image_set, read_photo_set
from dreamloom.data.image_io import crop_centre, open_upright

SIDE, GAP, LABEL, COLUMNS = 128, 6, 22, 6
PAPER, INK = "#faf8f4", "#24221e"


def main(demo: Path, out: Path) -> None:
    """Draw one row each for the photos, the base model, the adapter's prompts, and the merge."""
    photos = [crop_centre(open_upright(path)) for path in read_photo_set(demo / "photos").paths()]
    rows = [("six photos of one person", photos)]
    # The first seed of every prompt: nothing is chosen.
    for name, label in (("base", "the base model"), ("with_prior", "with the adapter")):
        images = read_image_set(demo / "images" / name)
        first = images.pictures[0].seed
        rows.append((f"{label}, each prompt's first seed", _open(images.select(seed=first))))
    rows.append(("merged with pixel art", _open(read_image_set(demo / "images" / "merged"))))
    width = COLUMNS * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + LABEL + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (label, pictures) in enumerate(rows):
        top = GAP + number * (SIDE + LABEL + GAP)
        pen.text((GAP, top + 4), label, INK, ImageFont.load_default(13))
        for column, picture in enumerate(pictures[:COLUMNS]):
            place = (GAP + column * (SIDE + GAP), top + LABEL)
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), place)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(192, dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)


def _open(images: ImageSet) -> list[Image.Image]:
    return [open_upright(path) for path in images.paths()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "images" / "journey.png")
