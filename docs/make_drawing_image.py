"""Lay sets of one run out, a row each: ``make_drawing_image.py RUN SET=LABEL…``."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dreamloom.core.manifests import read_image_set
from dreamloom.data.image_io import open_upright

SIDE, GAP, LABEL, COLUMNS = 128, 6, 22, 4
PAPER, INK = "#faf8f4", "#24221e"


def main(run: Path, rows: list[str], out: Path) -> None:
    """Draw a row for each set: its first pictures, nothing chosen."""
    width = COLUMNS * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + LABEL + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        name, _, label = row.partition("=")
        top = GAP + number * (SIDE + LABEL + GAP)
        pen.text((GAP, top + 4), label, INK, ImageFont.load_default(13))
        for column, path in enumerate(read_image_set(run / "images" / name).paths()[:COLUMNS]):
            picture = open_upright(path).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(picture, (GAP + column * (SIDE + GAP), top + LABEL))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(192, dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], Path(__file__).parent / "images" / "drawing.png")
