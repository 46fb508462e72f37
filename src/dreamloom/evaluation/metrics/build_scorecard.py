"""Filling in a scorecard: scores as a whole and by group, alarms, notes and findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamloom.core.manifests import PhotoSet
from dreamloom.evaluation.detectors.flagging import Flagging
from dreamloom.evaluation.encoders.base import Missing
from dreamloom.evaluation.metrics.evaluator import Evaluator
from dreamloom.evaluation.metrics.findings import tell_findings
from dreamloom.evaluation.metrics.scorecard import (
    Flags,
    Group,
    PictureScores,
    Score,
    Scorecard,
    find_alarms,
)


def build_scorecard(
    evaluator: Evaluator, photos: PhotoSet, scored: str, flaggings: Sequence[Flagging] = ()
) -> Scorecard:
    """Sum up a bench as a scorecard.

    Args:
        evaluator: Everything that was seen.
        photos: The photos, by name.
        scored: What pictures of the subject are compared with where a prompt is said: the class
            noun stands for the subject.
        flaggings: What detectors of failures found.
    """
    scores = evaluator.scores(range(len(evaluator.pictures)), whole=True)
    ceilings = evaluator.ceilings()
    listed = _list_pictures(evaluator, [photo.source for photo in photos.photos])
    alarms = find_alarms(
        scores=scores,
        ceilings=ceilings,
        pictures=listed,
        prints=evaluator.embeddings.prints,
        copied=evaluator.copied.tolist(),
        flat=evaluator.embeddings.flat,
        missed=_missed(evaluator),
        floor_prints=[
            None if place is None or evaluator.below is None else evaluator.below.prints[place]
            for place in evaluator.partners
        ],
    )
    warning = _warning(evaluator)
    if warning:
        scores = {name: _doubt(score) for name, score in scores.items()}
    return Scorecard(
        warning=warning,
        alarms=(*alarms, *_breakdowns(evaluator)),
        notes=tuple(_notes(evaluator, scored)),
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
        floors=evaluator.floors(),
        ceilings=ceilings,
        by_category=_groups(evaluator, "category"),
        by_prompt=_groups(evaluator, "prompt", "category"),
        by_cell=_groups(evaluator, "scheduler", "steps"),
        encoders=evaluator.encoders.kind,
        photos=len(photos.photos),
        confidence=evaluator.confidence,
        resamples=evaluator.resamples,
        pictures=listed,
    )


def _list_pictures(evaluator: Evaluator, sources: Sequence[str]) -> tuple[PictureScores, ...]:
    """List each picture's own values, where a score looked at it."""
    own: dict[str, np.ndarray[Any, Any]] = {}
    for measure in evaluator.measures:
        values = evaluator.values[measure.name]
        if isinstance(values, str) or measure.kind == "variety":
            continue
        rows = values.own.mean(axis=1) if values.own.ndim == 2 else values.own
        looked_at = np.array([role in measure.roles for role in evaluator.roles])
        own[measure.name] = np.where(looked_at, rows, np.nan)
    nearest = evaluator.nearness.argmax(dim=1).tolist()
    return tuple(
        PictureScores(
            file=picture.file,
            prompt=picture.prompt or None,
            category=picture.category,
            role=evaluator.roles[row],
            seed=picture.seed if picture.prompt else None,
            scheduler=picture.scheduler or None,
            steps=picture.steps or None,
            nearest_photo=sources[nearest[row]],
            copied=bool(evaluator.copied[row]),
            values={
                name: float(values[row])
                for name, values in own.items()
                if not np.isnan(values[row])
            },
        )
        for row, picture in enumerate(evaluator.pictures)
    )


def _missed(evaluator: Evaluator) -> list[bool]:
    """Say of each picture that should show the subject whether nobody was found in it."""
    nobody = evaluator.embeddings.missed.get("identity")
    if nobody is None:
        return [False] * len(evaluator.pictures)
    return [
        bool(found) and role == "subject"
        for found, role in zip(nobody.tolist(), evaluator.roles, strict=True)
    ]


def _breakdowns(evaluator: Evaluator) -> list[str]:
    sets = (
        ("pictures", evaluator.embeddings),
        ("photos", evaluator.photos),
        ("floor pictures", evaluator.below),
    )
    return [
        f"{evaluator.encoders.keys()[name]} gave no usable numbers for {count} {what}, so nothing "
        f"that depends on it is measured."
        for what, embeddings in sets
        if embeddings
        for name, count in embeddings.broken.items()
    ]


def _groups(evaluator: Evaluator, *names: str) -> tuple[Group, ...]:
    """Score together what shares a value of each name; unknown values make no group."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row, picture in enumerate(evaluator.pictures):
        shared = tuple(getattr(picture, name) or None for name in names)
        if shared[0] is not None:
            found.setdefault(shared, []).append(row)
    return tuple(
        Group(
            **dict(zip(names, shared, strict=True)),
            scored=evaluator.prompts[rows[0]] if "prompt" in names else None,
            pictures=len(rows),
            scores=evaluator.scores(rows),
        )
        for shared, rows in found.items()
    )


def _doubt(score: Score) -> Score:
    text = "outside the world that this encoder knows"
    return score.model_copy(update={"note": f"{score.note}; {text}" if score.note else text})


def _warning(evaluator: Evaluator) -> str | None:
    """Say so if the encoders have never seen anything like these photos or pictures."""
    found = [
        f"These {what} are outside picturebook's world of drawings: its judges know only that, "
        f"so these scores mean nothing about real likeness."
        for what, embeddings in (
            ("photographs", evaluator.photos),
            ("pictures", evaluator.embeddings),
        )
        if 2 * embeddings.familiar.count(False) > len(embeddings.familiar)
    ]
    return found[0] if found else None


def _notes(evaluator: Evaluator, scored: str) -> list[str]:
    notes = []
    alone = evaluator.partners.count(None)
    if evaluator.below is not None and alone:
        notes.append(
            f"{alone} of {len(evaluator.partners)} pictures have no floor of the same prompt, "
            "seed, scheduler and steps; floors and lifts are those of the others."
        )
    if not all(evaluator.prompts):
        notes.append(
            "The prompts are unknown, so all pictures count as one prompt's, also for variety."
        )
    elif not isinstance(evaluator.encoders.clip, Missing):
        notes += [
            f"This prompt is too long for the encoder and is scored by its beginning: {text}"
            for text in evaluator.encoders.clip.too_long(list(dict.fromkeys(evaluator.prompts)))
        ]
    apart = [role for role in evaluator.roles if role != "subject"]
    if apart:
        notes.append(
            f"{len(apart)} of {len(evaluator.roles)} pictures are not of the subject: "
            f"{apart.count('class')} of another {scored}, {apart.count('other')} of something "
            f"else. They count for leakage and drift alone."
        )
    faceless = evaluator.photos.missed.get("identity")
    if faceless is not None and faceless.any():
        notes.append(
            f"In {int(faceless.sum())} of {len(evaluator.photos.prints)} photos no face was found; "
            f"identity is measured against the others."
        )
    if len(evaluator.photos.prints) == 1:
        notes.append("There is one photo only: no ceiling, and no lift.")
    elif len(evaluator.photos.prints) == 2:
        notes.append("With two photos the ceiling has no interval, and no lift is given.")
    return notes
