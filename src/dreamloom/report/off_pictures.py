"""Pictures that are off: no colour or sharpness that the base model has for the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dreamloom.evaluation.metrics.appearance import measure_deviation, measure_spread
from dreamloom.report.answers import pick_set
from dreamloom.report.pairs import (
    NO_BASE,
    SHARPER,
    WAYS,
    Values,
    cell_of,
    group_base,
    name_roles,
    pair_up,
    remember_appearances,
    select_role,
)
from dreamloom.report.story import Story, order_of, tell_count

MOST_SHOWN = 4
"""How many of them are shown a second time, before all."""


@dataclass(frozen=True)
class OffPictures:
    """Pictures of the subject that are off in colour or sharpness, the farthest off first."""

    name: str
    """The set that they are of."""
    reasons: dict[str, str]
    """Why, by file."""
    note: str
    """How many there are of how many, or why that cannot be told."""


def find_off_pictures(story: Story) -> OffPictures | None:
    """Find pictures of the main set that lie outside what the base model draws of their prompts.

    Returns:
        None where no adapter of the subject drew anything; without pictures and with the reason
        where it cannot be told.
    """
    name = pick_set(story, "identity") or _pick_main(story)
    images = story.sets.get(name) if name else None
    if name is None or images is None:
        return None
    roles, measure = name_roles(story), remember_appearances()
    subject = select_role(images, roles, "subject")
    pairs = pair_up(story, subject, measure)
    cannot = "Whether colour or sharpness of a picture is off cannot be told"
    if not pairs:
        return OffPictures(name, {}, f"{cannot}: {NO_BASE}.") if subject.pictures else None
    groups = group_base(story, images, pairs, measure)
    spread = measure_spread(list(groups.values()))
    if spread is None:
        few = "it takes four prompts of three seeds, or eight of two, to know how far the base"
        return OffPictures(name, {}, f"{cannot}: {few} model’s own pictures lie apart.")
    found = {
        pair.picture.file: measure_deviation(
            pair.own, groups[cell_of(images, pair.picture)], spread
        )
        for pair in pairs
    }
    off = {file: one for file, one in found.items() if np.abs(one).max() > 1}
    worst = sorted(off, key=lambda file: -float(np.abs(off[file]).max()))
    return OffPictures(
        name,
        {file: _tell_reason(off[file]) for file in worst},
        _tell_off(len(off), len(pairs)),
    )


def _pick_main(story: Story) -> str | None:
    """Pick the set that an adapter of the subject drew, where none was scored."""
    places = {name: story.place(name) for name in story.sets}
    drawn = [n for n, place in places.items() if place.is_subject and place.purpose == "main"]
    return max(drawn, key=order_of, default=None)


def _tell_reason(deviation: Values) -> str:
    """Say in which ways a picture is off, the farthest first."""
    told = []
    for value, ways in zip(deviation, (*WAYS, SHARPER), strict=True):
        if abs(value) > 1:
            how = "far" if ways is SHARPER else "much"
            told.append((-abs(float(value)), f"{how} {ways[bool(value > 0)]}"))
    return " and ".join(text for _, text in sorted(told)) + " than the base model’s"


def _tell_off(off: int, judged: int) -> str:
    told = (
        f"By mean colour and sharpness {off or 'none'} of {tell_count(judged, 'picture')} "
        f"{'is' if off <= 1 else 'are'} off: farther from what the base model draws of the same "
        "prompt than its own pictures lie apart from seed to seed. Of its own pictures 1 or 2 in "
        "100 would be, measured on picturebook."
    )
    if not off:
        return told
    if off > MOST_SHOWN:
        told += f" The {MOST_SHOWN} that are farthest off stand above."
    return (
        f"{told} A subject of strong colours moves them, too: see whether the background has them."
    )
