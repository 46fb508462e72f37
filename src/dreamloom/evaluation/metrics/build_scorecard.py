"""Filling in a scorecard: scores as a whole and by group, alarms, notes and findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dreamloom.core.manifests import PhotoSet
from dreamloom.evaluation.detectors.flagging import Flagging
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.copy_paste import find_copy_paste, score_copy_paste
from dreamloom.evaluation.metrics.evaluator import Evaluator
from dreamloom.evaluation.metrics.evidence import Evidence
from dreamloom.evaluation.metrics.measures import MEASURE
from dreamloom.evaluation.metrics.per_image import Array
from dreamloom.evaluation.metrics.scorecard import (
    Flags,
    Group,
    PictureScores,
    Score,
    Scorecard,
)


def build_scorecard(
    evaluator: Evaluator, photos: PhotoSet, scored: str, flaggings: Sequence[Flagging] = ()
) -> Scorecard:
    """Sum up an evaluation as a scorecard.

    Args:
        evaluator: Scores any part of what was seen.
        photos: The photos, by name.
        scored: What pictures of the subject are compared with where a prompt is said: the class
            noun stands for the subject.
        flaggings: What detectors of failures found.
    """
    evidence = evaluator.evidence
    scores = evaluator.scores(range(len(evidence.pictures)), whole=True)
    ceilings = evaluator.ceilings()
    listed = _list_pictures(evaluator, [photo.source for photo in photos.photos])
    alarms = find_alarms(evidence, scores, ceilings, listed)
    copy_paste = score_copy_paste(evidence, evaluator.resamples, evaluator.confidence)
    alarms += [text for text in [find_copy_paste(copy_paste)] if text]
    warning = _warning(evidence)
    if warning:
        scores = {name: _doubt(score) for name, score in scores.items()}
        copy_paste = _doubt(copy_paste)
    return Scorecard(
        warning=warning,
        alarms=(*alarms, *_breakdowns(evidence)),
        notes=tuple(_notes(evidence, scored)),
        findings=() if warning else tuple(_tell_findings(scores, scored)),
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
        encoders=evidence.encoders.kind,
        photos=len(photos.photos),
        confidence=evaluator.confidence,
        resamples=evaluator.resamples,
        pictures=listed,
        copy_paste=copy_paste,
    )


def _list_pictures(evaluator: Evaluator, sources: Sequence[str]) -> tuple[PictureScores, ...]:
    """List each picture's own values, where a score looked at it."""
    evidence = evaluator.evidence
    own: dict[str, Array] = {}
    below: dict[str, Array] = {}
    for measure in evidence.measures:
        values = evaluator.values[measure.name]
        if isinstance(values, str) or measure.kind == "variety":
            continue
        looked_at = np.array([role in measure.roles for role in evidence.roles])
        own[measure.name] = np.where(looked_at, _per_picture(values.own), np.nan)
        if values.below is not None:
            beneath = _per_picture(values.below)
            partners = [np.nan if at is None else beneath[at] for at in evidence.partners]
            below[measure.name] = np.where(looked_at, partners, np.nan)
    nearest = evidence.nearness.argmax(dim=1).tolist()
    return tuple(
        PictureScores(
            file=picture.file,
            prompt=picture.prompt or None,
            category=picture.category,
            role=evidence.roles[row],
            seed=picture.seed if picture.prompt else None,
            scheduler=picture.scheduler or None,
            steps=picture.steps or None,
            nearest_photo=sources[nearest[row]],
            copied=bool(evidence.copied[row]),
            values=_pick(own, row),
            floor=_pick(below, row),
        )
        for row, picture in enumerate(evidence.pictures)
    )


def _per_picture(values: Array) -> Array:
    """Average over photos, where there is a column for each."""
    averaged: Array = values.mean(axis=1) if values.ndim == 2 else values
    return averaged


def _pick(columns: Mapping[str, Array], row: int) -> dict[str, float]:
    return {name: float(of[row]) for name, of in columns.items() if not np.isnan(of[row])}


def _breakdowns(evidence: Evidence) -> list[str]:
    sets = (
        ("pictures", evidence.embeddings),
        ("photos", evidence.photos),
        ("floor pictures", evidence.below),
    )
    return [
        f"{evidence.encoders.keys()[name]} gave no usable numbers for {count} {what}, so nothing "
        f"that depends on it is measured."
        for what, embeddings in sets
        if embeddings
        for name, count in embeddings.broken.items()
    ]


def _groups(evaluator: Evaluator, *names: str) -> tuple[Group, ...]:
    """Score together what shares a value of each name; unknown values make no group."""
    evidence, found = evaluator.evidence, dict[tuple[Any, ...], list[int]]()
    for row, picture in enumerate(evidence.pictures):
        shared = tuple(getattr(picture, name) or None for name in names)
        if shared[0] is not None:
            found.setdefault(shared, []).append(row)
    return tuple(
        Group(
            **dict(zip(names, shared, strict=True)),
            scored=evidence.prompts[rows[0]] if "prompt" in names else None,
            pictures=len(rows),
            scores=evaluator.scores(rows),
        )
        for shared, rows in found.items()
    )


def _doubt(score: Score) -> Score:
    text = "outside the world that this encoder knows"
    return score.model_copy(update={"note": f"{score.note}; {text}" if score.note else text})


def _warning(evidence: Evidence) -> str | None:
    """Say so if the encoders have never seen anything like these photos or pictures."""
    found = [
        f"These {what} are outside picturebook's world of drawings: its judges know only that, "
        f"so these scores mean nothing about real likeness."
        for what, embeddings in (
            ("photographs", evidence.photos),
            ("pictures", evidence.embeddings),
        )
        if 2 * embeddings.familiar.count(False) > len(embeddings.familiar)
    ]
    return found[0] if found else None


def _notes(evidence: Evidence, scored: str) -> list[str]:
    notes = []
    alone = evidence.partners.count(None)
    if evidence.below is not None and alone:
        notes.append(
            f"{alone} of {len(evidence.partners)} pictures have no floor of the same prompt, "
            "seed, scheduler and steps; floors and lifts are those of the others."
        )
    if not all(evidence.prompts):
        notes.append(
            "The prompts are unknown, so all pictures count as one prompt's, also for variety."
        )
    elif not isinstance(evidence.encoders.clip, Missing):
        notes += [
            f"This prompt is too long for the encoder and is scored by its beginning: {text}"
            for text in evidence.encoders.clip.too_long(list(dict.fromkeys(evidence.prompts)))
        ]
    altered = evidence.roles.count("altered")
    if altered:
        notes.append(
            f"{altered} of {len(evidence.roles)} pictures are asked for looks that are not the "
            "subject's own, such as another colour of hair. They count for obedience, and not for "
            "likeness."
        )
    apart = [role for role in evidence.roles if role not in ("subject", "altered")]
    if apart:
        notes.append(
            f"{len(apart)} of {len(evidence.roles)} pictures are not of the subject: "
            f"{apart.count('class')} of another {scored}, {apart.count('other')} of something "
            f"else. They count for leakage and drift alone."
        )
    faceless = evidence.photos.missed.get("identity")
    if faceless is not None and faceless.any():
        notes.append(
            f"In {int(faceless.sum())} of {len(evidence.photos.prints)} photos no face was found; "
            f"identity is measured against the others."
        )
    if len(evidence.photos.prints) == 1:
        notes.append("There is one photo only: no ceiling, and no lift.")
    elif len(evidence.photos.prints) == 2:
        notes.append("With two photos the ceiling has no interval, and no lift is given.")
    return notes


def _tell_findings(scores: Mapping[str, Score], class_noun: str) -> list[str]:
    """Say what the scores show of leakage and of drift.

    Args:
        scores: By name.
        class_noun: What other members of the class are called.
    """
    told = [
        _tell_leakage(scores[name], class_noun, words)
        for name, words in (("leakage", ""), ("pres", ", by DINO"))
        if name in scores
    ]
    told.append(_tell_drift(scores["drift"]) if "drift" in scores else "")
    return [text for text in told if text]


def _tell_leakage(score: Score, class_noun: str, words: str) -> str:
    """Compare the class with what the base model draws for it, on the way to the subject."""
    if score.value is None or score.floor is None:
        return ""
    embeddings = (
        f"pictures of another {class_noun} have a likeness of {score.value:.3f} to the subject, "
        f"the base model's {score.floor:.3f} (n = {score.n}{words})."
    )
    if score.lift_interval is None:
        return f"Leakage cannot be judged: {embeddings}"
    low, high = score.lift_interval
    if low > 0:
        share = f"{score.lift:.0%} of the way to the photos" if score.lift is not None else ""
        return f"Leakage found: {embeddings[:-1]}: {share}."
    if high < 0:
        return f"No leakage: the class has moved away from the subject; {embeddings}"
    return f"No leakage detected: {embeddings}"


def _tell_drift(score: Score) -> str:
    if score.value is None:
        return ""
    between = f" ({score.interval[0]:.3f} to {score.interval[1]:.3f})" if score.interval else ""
    return (
        f"Drift: beside the subject, pictures have moved by {score.value:.3f}{between} on a scale "
        f"from 0, nothing changed, to 1 (n = {score.n})."
    )


def find_alarms(
    evidence: Evidence,
    scores: Mapping[str, Score],
    ceilings: Mapping[str, Score],
    pictures: Sequence[PictureScores],
) -> list[str]:
    """Look for signs that a mistake was measured instead of the pictures.

    Args:
        evidence: What was seen.
        scores: The overall scores by name.
        ceilings: The photos' own scores by name, with their intervals.
        pictures: Every picture's own values.

    Returns:
        One sentence per sign.
    """
    seen, below = evidence.embeddings, evidence.below
    nobody = seen.missed.get("identity")
    first: dict[str, str] = {}
    signs: dict[str, list[str]] = {}
    for row, picture in enumerate(pictures):
        shown, place = seen.prints[row], evidence.partners[row]
        for text, is_wrong in (
            (
                "{count} pictures repeat photos of the subject, first {first}: they prove "
                "nothing, and count as what the base model drew.",
                picture.copied,
            ),
            (
                "{count} pictures are one plain colour, first {first}: a failed drawing or a "
                "safety filter; they are scored like the others.",
                seen.flat[row],
            ),
            (
                "{count} pictures show no face, first {first}; they count as what the base "
                "model drew.",
                nobody is not None and bool(nobody[row]) and picture.role == "subject",
            ),
            (
                "{count} pictures are copies of others, first {first}: the seed had no effect.",
                first.setdefault(shown, picture.file) != picture.file,
            ),
            (
                "{count} pictures are the base model's own, first {first}: the adapter had no "
                "effect.",
                place is not None and below is not None and below.prints[place] == shown,
            ),
        ):
            signs.setdefault(text, []).extend([picture.file] * is_wrong)
    found = [
        text.format(count=len(files), first=files[0]) for text, files in signs.items() if files
    ]
    for name, score in scores.items():
        # That every picture passes, or none, is a result.
        if name in MEASURE and MEASURE[name].is_share:
            continue
        values = [picture.values.get(name) for picture in pictures]
        embeddings = {round(value, 6) for value in values if value is not None}
        if (
            len(embeddings) == 1
            and len([v for v in values if v is not None]) > 2
            and len(first) > 1
        ):
            found.append(
                f"{name} is {embeddings.pop():.6f} for every picture: it does not depend on them."
            )
        top = ceilings.get(name)
        if score.value is None or top is None or top.value is None:
            continue
        end = top.interval[1] if top.interval else top.value
        if score.value > end:
            found.append(
                f"{name} is {score.value:.3f}, above the ceiling of {end:.3f} that the photos "
                f"reach among themselves: copies of photos, or a mistake."
            )
    return found
