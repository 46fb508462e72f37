"""Filling in a scorecard: scores as a whole and by group, alarms, notes and findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamloom.core.manifests import PhotoSet
from dreamloom.evaluation.detectors.flagging import Flagging
from dreamloom.evaluation.encoders.base import Missing
from dreamloom.evaluation.metrics.evaluator import Bench
from dreamloom.evaluation.metrics.findings import tell_findings
from dreamloom.evaluation.metrics.scorecard import (
    Flags,
    Group,
    PictureScores,
    Score,
    Scorecard,
    find_alarms,
)


def fill_card(
    bench: Bench, photos: PhotoSet, scored: str, flaggings: Sequence[Flagging] = ()
) -> Scorecard:
    """Sum up a bench as a scorecard.

    Args:
        bench: Everything that was seen.
        photos: The photos, by name.
        scored: What pictures of the subject are compared with where a prompt is said: the class
            noun stands for the subject.
        flaggings: What detectors of failures found.
    """
    scores = bench.scores(range(len(bench.pictures)), whole=True)
    ceilings = bench.ceilings()
    listed = _list_pictures(bench, [photo.source for photo in photos.photos])
    alarms = find_alarms(
        scores=scores,
        ceilings=ceilings,
        pictures=listed,
        prints=bench.seen.prints,
        copied=bench.copied.tolist(),
        flat=bench.seen.flat,
        missed=_missed(bench),
        floor_prints=[
            None if place is None or bench.below is None else bench.below.prints[place]
            for place in bench.partners
        ],
    )
    warning = _warning(bench)
    if warning:
        scores = {name: _doubt(score) for name, score in scores.items()}
    return Scorecard(
        warning=warning,
        alarms=(*alarms, *_breakdowns(bench)),
        notes=tuple(_notes(bench, scored)),
        findings=() if warning else tuple(tell_findings(scores, scored)),
        scores=scores,
        flags={
            one.detector: Flags(
                label=one.label,
                n=one.n,
                judged=one.judged,
                abstained=dict(one.abstained),
                flagged=one.flagged,
                rate=one.rate,
                interval=one.interval,
                told=one.tell(),
            )
            for one in flaggings
        },
        floors=bench.floors(),
        ceilings=ceilings,
        by_category=_groups(bench, "category"),
        by_prompt=_groups(bench, "prompt", "category"),
        by_cell=_groups(bench, "scheduler", "steps"),
        encoders=bench.encoders.kind,
        photos=len(photos.photos),
        confidence=bench.confidence,
        resamples=bench.resamples,
        pictures=listed,
    )


def _list_pictures(bench: Bench, sources: Sequence[str]) -> tuple[PictureScores, ...]:
    """List each picture's own values, where a score looked at it."""
    own: dict[str, np.ndarray[Any, Any]] = {}
    for measure in bench.measures:
        values = bench.values[measure.name]
        if isinstance(values, str) or measure.kind == "variety":
            continue
        rows = values.own.mean(axis=1) if values.own.ndim == 2 else values.own
        looked_at = np.array([role in measure.roles for role in bench.roles])
        own[measure.name] = np.where(looked_at, rows, np.nan)
    nearest = bench.nearness.argmax(dim=1).tolist()
    return tuple(
        PictureScores(
            file=picture.file,
            prompt=picture.prompt or None,
            category=picture.category,
            role=bench.roles[row],
            seed=picture.seed if picture.prompt else None,
            scheduler=picture.scheduler or None,
            steps=picture.steps or None,
            nearest_photo=sources[nearest[row]],
            copied=bool(bench.copied[row]),
            values={
                name: float(values[row])
                for name, values in own.items()
                if not np.isnan(values[row])
            },
        )
        for row, picture in enumerate(bench.pictures)
    )


def _missed(bench: Bench) -> list[bool]:
    """Say of each picture that should show the subject whether nobody was found in it."""
    nobody = bench.seen.missed.get("identity")
    if nobody is None:
        return [False] * len(bench.pictures)
    return [
        bool(found) and role == "subject"
        for found, role in zip(nobody.tolist(), bench.roles, strict=True)
    ]


def _breakdowns(bench: Bench) -> list[str]:
    sets = (("pictures", bench.seen), ("photos", bench.photos), ("floor pictures", bench.below))
    return [
        f"{bench.encoders.keys()[name]} gave no usable numbers for {count} {what}, so nothing "
        f"that depends on it is measured."
        for what, seen in sets
        if seen
        for name, count in seen.broken.items()
    ]


def _groups(bench: Bench, *names: str) -> tuple[Group, ...]:
    """Score together what shares a value of each name; unknown values make no group."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row, picture in enumerate(bench.pictures):
        shared = tuple(getattr(picture, name) or None for name in names)
        if shared[0] is not None:
            found.setdefault(shared, []).append(row)
    return tuple(
        Group(
            **dict(zip(names, shared, strict=True)),
            scored=bench.prompts[rows[0]] if "prompt" in names else None,
            pictures=len(rows),
            scores=bench.scores(rows),
        )
        for shared, rows in found.items()
    )


def _doubt(score: Score) -> Score:
    text = "outside the world that this encoder knows"
    return score.model_copy(update={"note": f"{score.note}; {text}" if score.note else text})


def _warning(bench: Bench) -> str | None:
    """Say so if the encoders have never seen anything like these photos or pictures."""
    found = [
        f"These {what} are outside picturebook's world of drawings: its judges know only that, "
        f"so these scores mean nothing about real likeness."
        for what, seen in (("photographs", bench.photos), ("pictures", bench.seen))
        if 2 * seen.familiar.count(False) > len(seen.familiar)
    ]
    return found[0] if found else None


def _notes(bench: Bench, scored: str) -> list[str]:
    notes = []
    alone = bench.partners.count(None)
    if bench.below is not None and alone:
        notes.append(
            f"{alone} of {len(bench.partners)} pictures have no floor of the same prompt, seed, "
            f"scheduler and steps; floors and lifts are those of the others."
        )
    if not all(bench.prompts):
        notes.append(
            "The prompts are unknown, so all pictures count as one prompt's, also for variety."
        )
    elif not isinstance(bench.encoders.clip, Missing):
        notes += [
            f"This prompt is too long for the encoder and is scored by its beginning: {text}"
            for text in bench.encoders.clip.too_long(list(dict.fromkeys(bench.prompts)))
        ]
    apart = [role for role in bench.roles if role != "subject"]
    if apart:
        notes.append(
            f"{len(apart)} of {len(bench.roles)} pictures are not of the subject: "
            f"{apart.count('class')} of another {scored}, {apart.count('other')} of something "
            f"else. They count for leakage and drift alone."
        )
    faceless = bench.photos.missed.get("identity")
    if faceless is not None and faceless.any():
        notes.append(
            f"In {int(faceless.sum())} of {len(bench.photos.prints)} photos no face was found; "
            f"identity is measured against the others."
        )
    if len(bench.photos.prints) == 1:
        notes.append("There is one photo only: no ceiling, and no lift.")
    elif len(bench.photos.prints) == 2:
        notes.append("With two photos the ceiling has no interval, and no lift is given.")
    return notes
