"""The class before and after: how far an adapter moved what it should have left alone."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from dreamloom.core.manifests import ImageSet
from dreamloom.evaluation.compare import FEWEST_PAIRS
from dreamloom.evaluation.metrics.appearance import AppearanceShift, measure_shift
from dreamloom.evaluation.stats.intervals import Interval
from dreamloom.report.gallery import Gallery, build_gallery
from dreamloom.report.pairs import (
    NO_BASE,
    SHARPER,
    WAYS,
    Pair,
    base_of,
    name_roles,
    pair_up,
    remember_appearances,
    select_role,
)
from dreamloom.report.story import Story, label_set, order_of, tell_count

_MOST_PROMPTS, _MOST_SEEDS, _MOST_ADAPTERS, _SHOT_PX = 6, 2, 4, 160
# Of CIELAB units, side by side; whereto a shift goes that nobody sees would only confuse.
_JUST_SEEN = 2.0


@dataclass(frozen=True)
class ChangeRow:
    """How one adapter's pictures of the class differ from the base model's, in words."""

    label: str
    kind: str
    colour: tuple[str, str]
    """How far the mean colour moved; its interval, and whereto, as far as that can be told."""
    sharpness: tuple[str, str]
    """How many times as sharp; its interval, and what that means."""
    pairs: str


@dataclass(frozen=True)
class ClassChange:
    """The class before and after."""

    rows: list[ChangeRow]
    note: str
    """What cannot be told, or which pictures are shown."""
    gallery: Gallery | None = None


def find_class_change(story: Story) -> ClassChange | None:
    """Compare what each adapter of the subject draws of its class with the base model's pictures.

    Returns:
        None where no adapter drew the class.
    """
    roles, measure = name_roles(story), remember_appearances()
    drawn = {
        name: select_role(images, roles, "class")
        for name, images in sorted(story.sets.items(), key=lambda item: order_of(item[0]))
        if story.place(name).is_subject and story.place(name).purpose == "main"
    }
    if not any(images.pictures for images in drawn.values()):
        return None
    paired = {
        name: pairs for name, images in drawn.items() if (pairs := pair_up(story, images, measure))
    }
    if not paired:
        return ClassChange([], f"What became of the class cannot be told: {NO_BASE}.")
    rows = [_tell_change(story, name, pairs) for name, pairs in paired.items()]
    gallery, note = _show_class(story, paired)
    return ClassChange(rows, note, gallery)


def _tell_change(story: Story, name: str, pairs: list[Pair]) -> ChangeRow:
    prompts = [pair.picture.prompt for pair in pairs]
    before, after = (np.stack([getattr(pair, side) for pair in pairs]) for side in ("base", "own"))
    shift = measure_shift(before, after, prompts)
    few = "too few pictures to tell" if shift.n < FEWEST_PAIRS else ""
    sharper = shift.sharpness.interval
    times = (2 ** sharper[0], 2 ** sharper[1]) if sharper else None
    return ChangeRow(
        label=label_set(name),
        kind=story.place(name).kind,
        colour=(
            f"{shift.difference:.1f}",
            f"{_between(shift.difference_interval, '{:.1f}')}: {few or _tell_way(shift)}",
        ),
        sharpness=(
            f"× {2**shift.sharpness.value:.2f}",
            f"{_between(times, '{:.2f}')}: {few or _way(sharper, SHARPER) or 'no change detected'}",
        ),
        pairs=f"{shift.n} of {tell_count(len(set(prompts)), 'prompt')}",
    )


def _tell_way(shift: AppearanceShift) -> str:
    """Say whereto the mean colour moved, the farthest first."""
    if not shift.has_moved:
        return "no shift detected"
    if shift.difference < _JUST_SEEN:
        return "less than can be seen"
    told = sorted(
        (-abs(one.value), f"{way} by {abs(one.value):.1f}")
        for one, ways in zip(shift.axes, WAYS, strict=True)
        if (way := _way(one.interval, ways))
    )
    seen = [text for by, text in told if by <= -_JUST_SEEN]
    return ", ".join(seen) or told[0][1]


def _way(interval: Interval | None, ways: tuple[str, str]) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return ""
    return ways[bool(interval[0] > 0)]


def _between(interval: Interval | None, form: str) -> str:
    return f"({' to '.join(map(form.format, interval))})" if interval else "(no interval)"


def _show_class(story: Story, paired: dict[str, list[Pair]]) -> tuple[Gallery, str]:
    """Lay some of the pairs side by side: the first prompts and seeds, none chosen."""
    prompts = list(dict.fromkeys(p.picture.prompt for own in paired.values() for p in own))
    seeds = sorted({pair.picture.seed for own in paired.values() for pair in own})
    wanted = {
        (pair.picture.prompt, pair.picture.seed, pair.picture.sampler)
        for own in paired.values()
        for pair in own
        if pair.picture.prompt in prompts[:_MOST_PROMPTS]
        and pair.picture.seed in seeds[:_MOST_SEEDS]
    }
    columns = list(paired)[:_MOST_ADAPTERS]
    shown = _pick_pictures(story, [*_list_base_sets(story, columns), *columns], wanted)
    gallery = build_gallery("gallery-class", shown, {}, longest_px=_SHOT_PX)
    parts = (
        (len(prompts), _MOST_PROMPTS, "prompt"),
        (len(seeds), _MOST_SEEDS, "seed"),
        (len(paired), _MOST_ADAPTERS, "adapter"),
    )
    told = [f"{most} of {tell_count(n, what)}" for n, most, what in parts if n > most]
    if not told:
        return gallery, ""
    return gallery, f"Shown are the first {', '.join(told)}; all stand further below."


def _list_base_sets(story: Story, drawn: Sequence[str]) -> list[str]:
    """List the sets of the base model below these adapters, the main ones first."""
    bases = {base_of(story.sets[name]) for name in drawn}
    found = [
        name
        for name, images in story.sets.items()
        if story.place(name).role == "base" and base_of(images) in bases
    ]
    return sorted(found, key=lambda name: (story.place(name).purpose != "main", order_of(name)))


def _pick_pictures(
    story: Story, names: Sequence[str], wanted: Container[tuple[str, int, str]]
) -> dict[str, ImageSet]:
    """Pick the wanted pictures of some sets; what the base model drew twice is shown once."""
    shown, seen = dict[str, ImageSet](), set[tuple[str, int, str]]()
    for name in names:
        own = {(p.prompt, p.seed, p.sampler): p for p in story.sets[name].pictures}
        known = seen if story.place(name).role == "base" else ()
        kept = {cell: p for cell, p in own.items() if cell in wanted and cell not in known}
        seen.update(kept)
        if kept:
            images = story.sets[name]
            shown[name] = images.model_copy(update={"pictures": tuple(kept.values())})
    return shown
