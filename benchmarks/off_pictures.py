"""How often pictures count as off in colour or sharpness: a base model's own, and spoiled ones.

A base model's pictures stand for an adapter's that changed nothing: of some seeds they set the
limits, and of other seeds they are judged by them. That asks for more than an adapter has to stand,
whose pictures share their seeds, and so their scenes, with the base model's. The same is done with
drawings of the world that picturebook learned from. Then those that set the limits are spoiled.

    dreamloom generate --base picturebook --pack picturebook-v1 --pack picturebook-class-v1 \
        --subject "rraj person" --class-noun person --seeds 12 --scheduler ddim \
        --steps 30 --out runs/base12
    python benchmarks/off_pictures.py runs/base12/images/pictures
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageFilter

from dreamloom.core.manifests import read_image_set
from dreamloom.data.image_io import open_upright
from dreamloom.evaluation.metrics.appearance import (
    AXES,
    measure_appearance,
    measure_deviation,
    measure_shift,
    measure_spread,
)
from dreamloom.picturebook.world import JUDGING_SEED_START, MEDIA, SCENES, sample_drawing, vary
from tools.picturebook.drawing import draw

ROUNDS, SEEDS = 300, 12
SPLITS = ((12, 3), (12, 2), (8, 2), (4, 4))
"""Prompts and seeds that set the limits."""
CLASS_PROMPTS = 7
_FIRST, _NEXT = slice(0, 3), slice(3, 6)

Pictures: TypeAlias = dict[str, list[Image.Image]]
"""By prompt, a picture for each seed."""


def read_pictures(folder: Path) -> Pictures:
    """Read a set."""
    images, found = read_image_set(folder), defaultdict(list)
    for picture in images.pictures:
        found[picture.prompt].append(open_upright(images.folder / picture.file))
    return dict(found)


def draw_pictures() -> Pictures:
    """Draw twelve persons in each scene and medium."""
    found: Pictures = {}
    for scene in SCENES:
        for medium in MEDIA:
            rng, seed = random.Random(f"{scene} {medium}"), JUDGING_SEED_START + 100 * len(found)
            persons = [sample_drawing(seed + k, kind="person").identity for k in range(SEEDS)]
            drawings = [vary(person, rng, scene=scene, medium=medium) for person in persons]
            found[f"{scene}, {medium}"] = [draw(one) for one in drawings]
    return found


def spoil(image: Image.Image, how: str) -> Image.Image:
    """Make a picture blue, dark or blurred."""
    if how.startswith("blurred"):
        return image.filter(ImageFilter.GaussianBlur(float(how.split()[1])))
    scale, add = {
        "bluish": ((0.6, 0.75, 1.0), (0, 0.02, 0.15)),
        "blue": ((0.35, 0.55, 1.0), (0, 0.02, 0.3)),
        "dark": ((0.4, 0.4, 0.4), (0, 0, 0)),
    }[how]
    pixels = np.asarray(image, float) / 255 * scale + add
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def measure(pictures: Pictures) -> list[np.ndarray]:
    """Measure each prompt's pictures."""
    return [np.stack([measure_appearance(one) for one in own]) for own in pictures.values()]


def share_off(groups: Sequence[np.ndarray], judged: Sequence[np.ndarray]) -> float:
    """Say which share of the judged pictures is off, where the groups set the limits."""
    spread = measure_spread(groups)
    if spread is None:
        return float("nan")
    off = [
        np.abs(measure_deviation(picture, group, spread)).max() > 1
        for group, own in zip(groups, judged, strict=True)
        for picture in own
    ]
    return float(np.mean(off))


def tell_false_alarms(name: str, groups: Sequence[np.ndarray]) -> None:
    """Print the share of pictures off, and of unchanged classes that are told to have moved."""
    rng, told = np.random.default_rng(0), []
    for prompts, seeds in SPLITS:
        shares = []
        for _ in range(ROUNDS):
            chosen = [rng.permutation(groups[k]) for k in rng.permutation(len(groups))[:prompts]]
            shares.append(
                share_off(
                    [one[:seeds] for one in chosen], [one[seeds : 2 * seeds] for one in chosen]
                )
            )
        told.append(f"{prompts} × {seeds}: {np.mean(shares):.2%}")
    print(f"{name}: off, limits from prompts × seeds {', '.join(told)}")
    moved = sharper = 0
    for _ in range(ROUNDS):
        order = rng.permutation(len(groups))[:CLASS_PROMPTS]
        chosen = [rng.permutation(groups[k]) for k in order]
        before, after = (np.concatenate([one[part] for one in chosen]) for part in (_FIRST, _NEXT))
        shift = measure_shift(before, after, [str(k) for k in order for _ in range(3)])
        moved += shift.has_moved
        low, high = shift.sharpness.interval or (0.0, 0.0)
        sharper += low > 0 or high < 0
    print(f"  said to have moved {moved / ROUNDS:.1%}, in sharpness {sharper / ROUNDS:.1%}")


def tell_found(name: str, pictures: Pictures) -> None:
    """Print the share of spoiled pictures that is off, beside the pictures that were spoiled."""
    some = {prompt: own[:3] for prompt, own in list(pictures.items())[:12]}
    groups = measure(some)
    for how in ("bluish", "blue", "dark", "blurred 1", "blurred 2"):
        harmed = measure({prompt: [spoil(one, how) for one in own] for prompt, own in some.items()})
        moved = (np.concatenate(harmed) - np.concatenate(groups)).mean(axis=0)
        told = ", ".join(f"{axis} {by:+.1f}" for axis, by in zip(AXES, moved, strict=True))
        print(f"  {name}, {how}: {share_off(groups, harmed):.0%} off ({told})")


def main() -> None:
    """Measure and print."""
    for name, pictures in (
        *((folder, read_pictures(Path(folder))) for folder in sys.argv[1:]),
        ("drawings", draw_pictures()),
    ):
        tell_false_alarms(name, measure(pictures))
        tell_found(name, pictures)


if __name__ == "__main__":
    main()
