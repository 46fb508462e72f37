"""The class before and after: how far an adapter moved what it should have left alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dreamloom.evaluation.compare import FEWEST_PAIRS
from dreamloom.evaluation.metrics.appearance import AppearanceShift, measure_shift
from dreamloom.evaluation.stats.intervals import Interval
from dreamloom.report.gallery import Gallery, build_gallery
from dreamloom.report.pairs import (
    NO_BASE,
    SHARPER,
    WAYS,
    Pair,
    name_roles,
    pair_up,
    remember_appearances,
)
from dreamloom.report.story import Story, label_set, order_of, tell_count

_MOST_PROMPTS, _MOST_SEEDS, _SHOT_PX = 6, 2, 160
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
        name: images
        for name, images in sorted(story.sets.items(), key=lambda item: order_of(item[0]))
        if story.place(name).is_subject
        and story.place(name).purpose == "main"
        and any(roles[p.prompt, p.category] == "class" for p in images.pictures)
    }
    if not drawn:
        return None
    paired = {
        name: [
            pair
            for pair in pair_up(story, images, measure)
            if roles[pair.picture.prompt, pair.picture.category] == "class"
        ]
        for name, images in drawn.items()
    }
    rows = [_tell_change(story, name, pairs) for name, pairs in paired.items() if pairs]
    if not rows:
        return ClassChange([], f"What became of the class cannot be told: {NO_BASE}.")
    gallery, note = _show_class(story, {name: pairs for name, pairs in paired.items() if pairs})
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
    told = [
        (-abs(one.value), f"{way} by {abs(one.value):.1f}")
        for one, ways in zip(shift.axes, WAYS, strict=True)
        if abs(one.value) >= _JUST_SEEN and (way := _way(one.interval, ways))
    ]
    return ", ".join(text for _, text in sorted(told)) or "less than can be seen"


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
    shown = {
        name: images.model_copy(update={"pictures": kept})
        for name, images in sorted(story.sets.items(), key=lambda item: order_of(item[0]))
        if name in paired or story.place(name) == ("base", "main")
        if (kept := tuple(p for p in images.pictures if (p.prompt, p.seed, p.sampler) in wanted))
    }
    gallery = build_gallery("gallery-class", shown, {}, longest_px=_SHOT_PX)
    if len(prompts) <= _MOST_PROMPTS and len(seeds) <= _MOST_SEEDS:
        return gallery, ""
    few = f"{min(len(prompts), _MOST_PROMPTS)} of {tell_count(len(prompts), 'prompt')}"
    return gallery, (
        f"Shown are the first {few} and {min(len(seeds), _MOST_SEEDS)} of "
        f"{tell_count(len(seeds), 'seed')}; all stand further below."
    )
