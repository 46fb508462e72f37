"""Pairs of an adapter's picture and the base model's of the same prompt and seed, both measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from dreamloom.core.errors import PhotoError
from dreamloom.core.manifests import ImageSet, Picture
from dreamloom.data.image_io import open_upright
from dreamloom.evaluation.metrics.appearance import measure_appearance
from dreamloom.evaluation.metrics.measures import PictureRole, assign_roles
from dreamloom.report.story import Story

WAYS = (("darker", "lighter"), ("greener", "redder"), ("bluer", "yellower"))
"""What less and more of lightness, of green to red and of blue to yellow are called."""
SHARPER = ("less sharp", "sharper")
"""What less and more of sharpness are called."""

NO_BASE = "the base model’s pictures of the same prompts and seeds are not in this folder"
"""Why something cannot be told."""

Cell: TypeAlias = tuple[str, str, int, str]
"""Prompt, sampler and size in pixels of a picture, and the base model below it: all that two
pictures must share to be compared, beside the seed."""

Values: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
"""As `measure_appearance` gives them."""

Roles: TypeAlias = dict[tuple[str, str], PictureRole]
"""What a picture is for, by its prompt and that prompt's category."""

Measure: TypeAlias = Callable[[Path], Values | None]
"""Measures a picture's file; None where it cannot be read."""


class Pair(NamedTuple):
    """A picture, and what was measured of it and of the base model's."""

    picture: Picture
    own: Values
    base: Values


def name_roles(story: Story) -> Roles:
    """Say what each prompt of a folder names, by prompt and category.

    All sets are asked together: in one that holds the class alone, no prompt names the subject,
    and each would count as one of it.
    """
    pictures = [p for images in story.sets.values() for p in images.pictures]
    asked = list(dict.fromkeys((p.prompt, p.category) for p in pictures))
    prompts, categories = [prompt for prompt, _ in asked], [category for _, category in asked]
    # A folder without settings still has what the adapters told.
    taught = [images for name, images in story.sets.items() if story.place(name).is_subject]
    phrase = next((one.subject for one in taught if one.subject), story.subject)
    noun = next((one.class_noun for one in taught if one.class_noun), story.class_noun)
    roles = assign_roles(prompts, categories, phrase, noun)
    return dict(zip(asked, roles, strict=True))


def select_role(images: ImageSet, roles: Roles, role: PictureRole) -> ImageSet:
    """Keep the pictures of a set whose prompts name this."""
    kept = tuple(p for p in images.pictures if roles[p.prompt, p.category] == role)
    return images.model_copy(update={"pictures": kept})


def cell_of(images: ImageSet, picture: Picture) -> Cell:
    """Say what a picture must share with another to be compared with it."""
    return picture.prompt, picture.sampler, images.resolution_px, base_of(images)


def base_of(images: ImageSet) -> str:
    """Say which base model drew a set, or lies below what did."""
    return images.base.get("fingerprint", images.base_name)


def _list_base(story: Story) -> dict[tuple[Cell, int], Path]:
    """List the base model's pictures by what they were drawn from; of two alike the main set's."""
    sets = [
        (story.place(name).purpose != "main", images)
        for name, images in story.sets.items()
        if story.place(name).role == "base"
    ]
    found: dict[tuple[Cell, int], Path] = {}
    for _, images in sorted(sets, key=lambda one: one[0]):
        for picture in images.pictures:
            # Pictures without a known prompt have no partners.
            if picture.prompt:
                path = images.folder / picture.file
                found.setdefault((cell_of(images, picture), picture.seed), path)
    return found


def pair_up(story: Story, images: ImageSet, measure: Measure) -> list[Pair]:
    """Measure pictures and the base model's of the same prompts and seeds."""
    base, pairs = _list_base(story), []
    for picture in images.pictures:
        partner = base.get((cell_of(images, picture), picture.seed))
        if partner is None:
            continue
        before, after = measure(partner), measure(images.folder / picture.file)
        if before is not None and after is not None:
            pairs.append(Pair(picture, after, before))
    return pairs


def group_base(
    story: Story, images: ImageSet, pairs: Iterable[Pair], measure: Measure
) -> dict[Cell, Values]:
    """Measure what the base model drew of the pairs' prompts: a row for each seed."""
    wanted = dict.fromkeys(cell_of(images, pair.picture) for pair in pairs)
    found: dict[Cell, list[Values]] = {cell: [] for cell in wanted}
    for (cell, _), path in _list_base(story).items():
        if cell in found and (values := measure(path)) is not None:
            found[cell].append(values)
    return {cell: np.stack(rows) for cell, rows in found.items()}


def _measure(path: Path) -> Values | None:
    try:
        return measure_appearance(open_upright(path))
    except (PhotoError, ValueError):
        return None  # missing, damaged, or hardly a picture at all


def remember_appearances() -> Measure:
    """Make what measures a picture's file, each file once."""
    return cache(_measure)
