"""Draw the sheet of samples: ``python -m tools.picturebook.samples --out FILE``."""

from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from dreamloom.core.device import prepare_threads
from tools.picturebook.dataset import PICTURE_PX
from tools.picturebook.measurements import GUIDANCE, load_pipeline

PROMPTS = (
    "a photo of a person",
    "a photo of rraj person",
    "a photo of rraj person with blonde hair",
    "a side view photo of rraj person",
    "a photo of rraj person wearing sunglasses",
    "a painting of rraj person at Oktoberfest",
    "a painting of rraj person in the style of Van Gogh",
    "a pencil sketch of a cat in a city",
    "a photo of a dog wearing a top hat at night",
    "a photo of a robot in the mountains",
)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A PNG or JPEG file.")
@click.option("--columns", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--guidance", type=float, default=GUIDANCE, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(out: Path, columns: int, steps: int, guidance: float, threads: int) -> None:
    """Draw one row of pictures per prompt."""
    prepare_threads(threads)
    pipeline = load_pipeline()
    sheet = Image.new("RGB", (PICTURE_PX * columns, PICTURE_PX * len(PROMPTS)))
    for row, prompt in enumerate(PROMPTS):
        pictures: Any = pipeline(
            prompt,
            num_images_per_prompt=columns,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(row),
        ).images
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (PICTURE_PX * column, PICTURE_PX * row))
    # A palette keeps the sheet small enough to look at in a browser at once.
    sheet.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
