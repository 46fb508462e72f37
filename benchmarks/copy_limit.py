"""How far copies of photos and new pictures of the same subject lie apart: what sets the limit.

Draws held-out persons, six photos each, copies of those in three ways, and new drawings of the
same persons, a good third of them in a photo's own scene and view. Folders of real photos, one
subject each, can be named as arguments; they show how alike photos of one thing are.

    python benchmarks/copy_limit.py [FOLDER …]
"""

import io
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dreamloom.data.image_io import crop_centre, open_upright
from dreamloom.evaluation.copy_detection import LIMIT, correlate_layouts, read_layout, read_views
from dreamloom.picturebook.world import JUDGING_SEED_START, Drawing, Identity, sample_drawing, vary
from tools.picturebook.drawing import draw

PERSONS, SIDE_PX = 12, 256
SCENES = ("city", "beach", "forest", "studio", "mountains", "city")


def photo_records(person: Identity, number: int) -> list[Drawing]:
    """Say what a person's six photos show."""
    rng = random.Random(number)
    return [
        vary(
            person,
            rng,
            medium="photo",
            scene=scene,
            view="side" if place == 3 else "front",
            glasses="none",
            hat="none",
        )
        for place, scene in enumerate(SCENES)
    ]


def save_again(photo: Image.Image) -> Image.Image:
    """Halve a photo and save it badly."""
    kept = io.BytesIO()
    half = photo.resize((SIDE_PX // 2, SIDE_PX // 2), Image.Resampling.BICUBIC)
    half.save(kept, "JPEG", quality=60)
    return Image.open(kept).convert("RGB")


def cut(photo: Image.Image, rng: random.Random) -> Image.Image:
    """Cut a photo to 85 % of its side, anywhere."""
    side = int(0.85 * SIDE_PX)
    left, top = (rng.randrange(SIDE_PX - side) for _ in range(2))
    return photo.crop((left, top, left + side, top + side))


def disturb(photo: Image.Image, rng: random.Random) -> Image.Image:
    """Change a photo's brightness, add noise, and mirror it."""
    pixels = np.asarray(photo, float)
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 10, pixels.shape)
    changed = np.clip(pixels * 1.1 + rng.uniform(-15, 15) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(changed).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def correlate(pictures: list[Image.Image], photos: list[Image.Image]) -> np.ndarray:
    """Correlate each picture with each photo."""
    layouts = np.stack([read_layout(crop_centre(picture)) for picture in pictures])
    return correlate_layouts(layouts, [read_views(photo) for photo in photos]).numpy()


def tell(name: str, values: list[float]) -> None:
    """Print how many there are, and where they lie."""
    least, low, middle, high, most = np.quantile(values, [0, 0.1, 0.5, 0.9, 1])
    print(
        f"{name:36} n {len(values):4}  least {least:.3f}  10 % {low:.3f}  median {middle:.3f}  "
        f"90 % {high:.3f}  most {most:.3f}"
    )


def main() -> None:
    """Measure and print."""
    found: dict[str, list[float]] = {}
    for number in range(PERSONS):
        rng = random.Random(f"copies {number}")
        person = sample_drawing(JUDGING_SEED_START + 400_000 + 7 * number, kind="person").identity
        records = photo_records(person, number)
        photos = [draw(record, SIDE_PX) for record in records]
        others = [draw(vary(person, rng, medium="photo"), 128) for _ in range(30)]
        near = [
            draw(
                vary(
                    person,
                    rng,
                    medium="photo",
                    scene=record.scene,
                    view=record.view,
                    glasses="none",
                    hat="none",
                ),
                128,
            )
            for record in records
            for _ in range(3)
        ]
        for name, pictures in (
            ("copies, saved again at half size", [save_again(photo) for photo in photos]),
            ("copies, cut to 85 %", [cut(photo, rng) for photo in photos]),
            ("copies, brighter, noisy, mirrored", [disturb(photo, rng) for photo in photos]),
            ("new drawings", others),
            ("new drawings, same scene and view", near),
        ):
            found.setdefault(name, []).extend(correlate(pictures, photos).max(axis=1).tolist())
    for folder in map(Path, sys.argv[1:]):
        images = [open_upright(path) for path in sorted(folder.glob("*.jpg"))]
        among = correlate(images, images)
        np.fill_diagonal(among, -1)
        found.setdefault("real photos of one subject", []).extend(among.max(axis=1).tolist())
    print(f"limit {LIMIT}")
    for name, values in found.items():
        tell(name, values)


if __name__ == "__main__":
    main()
