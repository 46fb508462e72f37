"""How long all scores of many pictures take with picturebook's judges.

Draws the pictures first, in all scenes and media; only the evaluation is timed. A second
evaluation of the same pictures shows what is saved by looking at each of them once.

    python benchmarks/evaluate_speed.py [--pictures 800] [--side 224] [--threads 2] [--json FILE]
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dreamloom.core.manifests import ImageSet, Picture
from dreamloom.core.run_folder import RunFolder, library_versions
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.scoring import evaluate_images, pick_encoders
from dreamloom.picturebook.world import JUDGING_SEED_START, sample_drawing
from tools.picturebook.drawing import draw

PROMPTS, PHOTOS = 25, 6


def draw_set(folder: Path, count: int, side_px: int) -> ImageSet:
    """Draw pictures of as many prompts as a pack has, equally many seeds of each."""
    folder.mkdir()
    pictures = []
    for number in range(count):
        record = sample_drawing(JUDGING_SEED_START + 900_000 + number, kind="person")
        draw(record, side_px).save(folder / f"{number}.png")
        pictures.append(
            Picture(
                file=f"{number}.png",
                prompt=f"a photo of rraj person, number {number % PROMPTS}",
                seed=number // PROMPTS,
                scheduler="ddim",
                steps=25,
                guidance=4,
            )
        )
    return ImageSet(
        folder=folder,
        base={"name": "picturebook"},
        resolution_px=side_px,
        pictures=tuple(pictures),
    )


def main() -> None:
    """Draw, evaluate twice, and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=800)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    with TemporaryDirectory() as scratch:
        work = Path(scratch)
        images = draw_set(work / "pictures", given.pictures, given.side)
        draw_set(work / "photos", PHOTOS, given.side)
        photos = load_photos(work / "photos", RunFolder(work / "run"), given.side)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            card = evaluate_images(
                images,
                photos,
                subject=SubjectWords("rraj person", "person"),
                encoders=pick_encoders("auto", images.base_name, "cpu"),
            )
            seconds.append(round(time.perf_counter() - start, 1))
    measured = [name for name, score in card.scores.items() if score.value is not None]
    print(
        f"{given.pictures} pictures and {PHOTOS} photos of {given.side} px: {', '.join(measured)}"
    )
    print(f"first evaluation {seconds[0]} s, second {seconds[1]} s, {given.threads} threads")
    if given.json:
        found = {"seconds": seconds, "scores": measured, **vars(given), "json": None}
        given.json.write_text(json.dumps({**found, "versions": library_versions()}, indent=2))


if __name__ == "__main__":
    main()
