"""Who is on trial: drawn persons whom nothing was trained on, their photos and further drawings."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from dreamloom.picturebook.world import (
    JUDGING_SEED_START,
    Drawing,
    Identity,
    Scene,
    sample_drawing,
    vary,
)
from tools.picturebook.drawing import draw

_PEOPLE_SEED_START = JUDGING_SEED_START + 400_000
_ALIKE_AMONG = 5
_PHOTO_PX = 256
# Night, snow and Oktoberfest are left for prompts.
_PHOTO_SCENES: tuple[Scene, ...] = ("city", "beach", "forest", "studio", "mountains")
_SIDE_VIEW = 3  # the number of the one photo that is not from the front


def choose_people(count: int) -> list[Identity]:
    """Choose persons whom nothing was trained on, any five in a row of different looks.

    They differ in the colour of their hair, in hair style and in skin, so that a likeness to the
    one is none to another.
    """
    chosen: list[Identity] = []
    seed = _PEOPLE_SEED_START
    while len(chosen) < count:
        drawing = sample_drawing(seed, kind="person")
        one, seed = drawing.identity, seed + 1
        unlike = all(
            one.hair != other.hair and one.style != other.style and one.skin != other.skin
            for other in chosen[1 - _ALIKE_AMONG :]
        )
        # Known persons have names, which training told the base model.
        if unlike and not drawing.name:
            chosen.append(one)
    return chosen


def describe(person: Identity) -> str:
    """Say in a few words how somebody looks."""
    words = [f"{person.skin} skin"]
    words += ["bald"] if person.style == "bald" else [f"{person.hair} hair, {person.style}"]
    words += [] if person.beard == "none" else [person.beard]
    return ", ".join(words)


def photo_records(person: Identity, number: int, count: int) -> list[Drawing]:
    """Say what a subject's photos show: different scenes, one side view, nothing worn.

    Whatever all photos share is learned as part of the subject; hats and glasses are not.
    """
    rng = random.Random(f"photos of subject {number}")
    return [
        vary(
            person,
            rng,
            medium="photo",
            scene=_PHOTO_SCENES[place % len(_PHOTO_SCENES)],
            view="side" if place == _SIDE_VIEW else "front",
            glasses="none",
            hat="none",
        )
        for place in range(count)
    ]


def draw_photos(person: Identity, number: int, count: int, folder: Path) -> None:
    """Draw a subject's photos into a folder, as a user would bring them."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, record in enumerate(photo_records(person, number, count)):
        draw(record, _PHOTO_PX).save(folder / f"{place}.png")


def draw_held_out(
    person: Identity, count: int, shown: Mapping[str, str], changed: Mapping[str, str]
) -> list[Image.Image]:
    """Draw somebody in other moments than the photos', as a prompt asks.

    Args:
        person: Who is drawn.
        count: How many drawings.
        shown: Fields of `Drawing` that the prompt fixes; without word of them, a photo with
            nothing worn.
        changed: Fields of `Identity` that the prompt contradicts: everything else is who it was.
    """
    who: dict[str, Any] = dict(changed)
    fixed: dict[str, Any] = {"medium": "photo", "glasses": "none", "hat": "none", **shown}
    rng = random.Random(f"held out {sorted(fixed.items())} {sorted(who.items())}")
    return [draw(replace(vary(replace(person, **who), rng), **fixed)) for _ in range(count)]
