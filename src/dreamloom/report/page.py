"""The page's blocks, each made from the story; the template only sets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from dreamloom.core.manifests import ImageSet
from dreamloom.evaluation.compare import FEWEST_PAIRS
from dreamloom.evaluation.metrics.measures import label_of
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.report.answers import list_verdicts, tell_headline
from dreamloom.report.class_change import find_class_change
from dreamloom.report.gallery import (
    BADGES,
    EmbeddedPicture,
    Gallery,
    build_gallery,
    embed,
    prompts_of,
    split_by_prompts,
)
from dreamloom.report.making import (
    command,
    curves,
    hash_facts,
    merge_facts,
    peak,
    record_rows,
    times,
    version_facts,
)
from dreamloom.report.off_pictures import find_off_pictures
from dreamloom.report.roles import TABLE, Place
from dreamloom.report.samples import find_failures, sample_galleries
from dreamloom.report.story import (
    Facts,
    Story,
    label_run,
    label_set,
    order_of,
    tell_count,
)
from dreamloom.report.tables import (
    fault_facts,
    heat_maps,
    key_facts,
    score_folds,
    score_table,
)

_PRIOR_PX = 128


@dataclass(frozen=True)
class Strip:
    """Photos or class images in a row, each with what is to be said of it."""

    title: str
    intro: str
    shots: list[tuple[EmbeddedPicture, tuple[str, ...]]]
    dense: bool = False


def lay_out(story: Story) -> SimpleNamespace:
    """Make everything that the template sets, in the order of the page."""
    off = find_off_pictures(story)
    values = {
        name: {picture.file: picture.values for picture in card.pictures}
        for name, card in story.cards.items()
    }
    galleries, merge_gallery, table_gallery = _galleries(story, values)
    places = {name: story.place(name) for name in {*story.cards, *story.sets}}
    alarms = _told(story, lambda card: card.alarms)
    maps = heat_maps(story.cards, places)
    merge = merge_facts(story)
    shown = {name for per_file in values.values() for own in per_file.values() for name in own}
    return SimpleNamespace(
        kind="report of a run"
        if story.is_single
        else f"{story.summary.get('kind', 'study')} report",
        title=story.subject,
        lede=_lede(story),
        headline=tell_headline(story),
        contents=_contents(bool(merge or merge_gallery), bool(maps or table_gallery)),
        verdicts=list_verdicts(story),
        alarms=alarms,
        warnings=_warnings(story, alarms),
        findings=_told(story, lambda card: card.findings),
        faults=fault_facts(story),
        all_quiet="No alarm and no warning was raised."
        if story.cards
        else "Nothing was scored here, so nothing could raise an alarm.",
        failures=find_failures(story, off),
        off_note=off.note if off else "",
        class_change=find_class_change(story),
        galleries=galleries,
        samples=sample_galleries(story),
        badges=" and ".join(label_of(name) for name in BADGES if name in shown),
        merge_gallery=merge_gallery,
        merge=merge,
        strips=_strips(story),
        maps=maps,
        table_gallery=table_gallery,
        scores=score_table(story.scores(), places),
        score_folds=score_folds(story),
        keys=key_facts(story),
        curves=curves(story),
        times=times(story),
        peak=peak(story),
        command=command(story),
        settings=[
            (label_run(name), run.settings_file.read_text(encoding="utf-8", errors="replace"))
            for name, run in story.runs.items()
            if run.settings_file.is_file()
        ],
        records=record_rows(story),
        hashes=hash_facts(story),
        versions=version_facts(story),
        limits=_limits(story),
        footer=_footer(story),
    )


def _contents(has_merge: bool, has_table: bool) -> Facts:
    parts = [("verdict", "In short"), ("pictures", "Side by side")]
    if has_merge:
        parts.append(("merge", "The merge"))
    parts.append(("photos", "Photos"))
    if has_table:
        parts.append(("table", "Scheduler and steps"))
    return [
        *parts,
        ("scores", "Scores"),
        ("training", "Training"),
        ("making", "How it was made"),
        ("limits", "Limits"),
    ]


def _lede(story: Story) -> str:
    photos = story.photos.get("") or next(iter(story.photos.values()), None)
    priors = story.priors.get("") or next(iter(story.priors.values()), None)
    parts = [f"A {story.class_noun}"]
    if photos:
        parts.append(f"taught from {tell_count(len(photos.photos), 'photo')}")
    if priors:
        parts.append(f"with {tell_count(len(priors.files), 'class image')} at hand")
    if story.base:
        parts.append(f"on the base model {story.base}")
    told = ", ".join([" ".join(parts[:2]), *parts[2:]])
    preset = story.summary.get("preset") or (story.config.preset if story.config else "")
    return f"{told}; preset {preset}." if preset else f"{told}."


# -- alarms ----------------------------------------------------------------------------------------


def _told(story: Story, read: Callable[[Scorecard], Sequence[str]]) -> list[str]:
    return [
        f"{label_set(name).capitalize()}: {text}"
        for name, card in sorted(story.cards.items(), key=lambda item: order_of(item[0]))
        for text in read(card)
    ]


def _warnings(story: Story, alarms: Sequence[str]) -> list[str]:
    warnings = _told(story, lambda card: (card.warning,) if card.warning else ())
    # The evaluation also logs what its scorecards say.
    known = [*alarms, *warnings]
    logged = [t for t in story.logged_warnings() if not any(k.endswith(t) for k in known)]
    return list(dict.fromkeys([*warnings, *logged, *story.damage]))


# -- pictures --------------------------------------------------------------------------------------


def _galleries(
    story: Story, values: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> tuple[list[Gallery], Gallery | None, Gallery | None]:
    sets = dict(
        sorted(story.sets.items(), key=lambda item: order_of(item[0].removeprefix(f"{TABLE}_")))
    )
    places = {name: story.place(name) for name in sets}
    table = {name: images for name, images in sets.items() if places[name].purpose == "table"}
    own = [name for name in sets if places[name].purpose == "merge"]
    if not any(places[name].role == "merged" for name in own):
        own = []
    main = {n: images for n, images in sets.items() if n not in table and n not in own}
    groups = split_by_prompts(main)
    galleries = [
        build_gallery(
            f"gallery{number}",
            group,
            values,
            title=", ".join(map(label_set, group)) if number else "All prompts",
        )
        for number, group in enumerate(groups)
    ]
    beside = _beside_merge(sets, own, places)
    return (
        galleries,
        build_gallery("gallery-merge", beside, values, title="Beside its parts", only=own)
        if own
        else None,
        build_gallery("gallery-table", table, values, title="All samplers") if table else None,
    )


def _beside_merge(
    sets: Mapping[str, ImageSet], own: Sequence[str], places: Mapping[str, Place]
) -> dict[str, ImageSet]:
    """Put base, parts and merge beside each other; the main base set stands in where it fits."""
    wanted = set().union(*(prompts_of(sets[name]) for name in own))
    names = list(own)
    if not any(places[name].role == "base" for name in own):
        main = [n for n in sets if places[n] == ("base", "main")]
        names += [name for name in main if prompts_of(sets[name]) & wanted][:1]
    order = ("base", "subject", "style", "merged")
    names.sort(key=lambda n: (order.index(places[n].role.split()[0]), order_of(n)))
    return {name: sets[name] for name in names}


def _strips(story: Story) -> list[Strip]:
    strips = []
    for name, photos in story.photos.items():
        shots = []
        for path, photo in zip(photos.paths(), photos.photos, strict=True):
            source, size = embed(path)
            height, width = photo.original_px
            alt = f"{photo.source}, {width} × {height}" if source else f"{photo.file} is missing"
            shots.append((EmbeddedPicture(source, alt, size), photo.issues))
        title = f"Training pictures: {label_run(name)}" if name else ""
        counted = tell_count(len(shots), "picture" if name else "photo")
        intro = f"{counted}, trained on at {photos.resolution_px} pixels."
        strips.append(Strip(title, " ".join([intro, *photos.notes]), shots))
    for name, priors in story.priors.items():
        shots = []
        for number, path in enumerate(priors.paths()):
            source, size = embed(path, _PRIOR_PX)
            alt = f"class image {number}" if source else f"{path.name} is missing"
            shots.append((EmbeddedPicture(source, alt, size), ()))
        title = f"Class images: {label_run(name)}" if name else "Class images"
        others = len(set(priors.prompts())) - 1
        more = f" and {tell_count(others, 'other prompt')} of the class" if others > 0 else ""
        told = (
            f"{tell_count(len(shots), 'picture')} of “{priors.prompt}”{more}, which keep the base "
        )
        strips.append(Strip(title, f"{told}model’s idea of the class.", shots, dense=True))
    return strips


# -- the end of the page ---------------------------------------------------------------------------


def _limits(story: Story) -> list[str]:
    limits = []
    if story.base == "picturebook":
        limits.append(
            "Picturebook is a small model of a drawn toy world, and its judges come from the same "
            "world. What holds here need not hold for SDXL and photographs."
        )
    counts = [f.n for scores in story.scores().values() for f in scores.values() if f.n is not None]
    if counts:
        spread = (
            f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        )
        limits.append(
            f"Each score rests on {spread} pictures of a few prompts. Its interval says how far "
            "other pictures like these could move it, not other subjects, photos of another day or "
            f"other kinds of prompts. With fewer than {FEWEST_PAIRS} pictures nothing is concluded."
        )
    limits += [
        "Each adapter was trained once, from one seed. A difference between two adapters may come "
        "from that seed; only several trainings of each kind can speak for a method.",
        "A likeness score also rewards copies of the photos: look at the pictures, and read it "
        "beside variety.",
        "Scores of different encoders have different scales. They are not to be compared with each "
        "other, nor with published figures.",
    ]
    return limits


def _footer(story: Story) -> str:
    finished = max((record.finished_at for _, record in story.records), default="")
    made = f" The last stage finished at {finished}." if finished else ""
    return f"Written by DreamLoom from the files of this folder alone.{made}"
