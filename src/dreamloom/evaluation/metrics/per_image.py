"""What each kind of score is for every single picture, before anything is averaged.

A picture that shows nobody, or that repeats a photo, earns what the base model's picture of its
prompt and seed earned: leaving it out would reward an adapter that makes faces disappear, and
counting it would reward one that copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dreamloom.evaluation.copy_detection import correlate_layouts
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.embed import Embeddings, measure_distances
from dreamloom.evaluation.metrics.evidence import Evidence
from dreamloom.evaluation.metrics.measures import Measure, MeasureKind
from dreamloom.evaluation.metrics.similarity import (
    FEWEST_IMPOSTORS,
    calibrate_threshold,
    cosines,
    differences,
    drift,
    is_nearest,
    is_own_prompt_best,
    prompt_fidelity,
)

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# The mean of fewer persons depends on who they happen to be.
_FEWEST_IMPOSTORS = 8


@dataclass(frozen=True)
class PerImageValues:
    """A score of single pictures, photos or pairs.

    Args:
        own: One row per picture; one column per photo, or per picture for variety.
        below: The same for the base model's pictures; None without any.
        among_photos: The photos' own: pairs, or one value for each; None where it means nothing.
        impostors: Places of those of the base model's pictures that are the floor instead of the
            partners; see `_find_impostors`.
        note: What has to be known about it.
    """

    own: Array
    below: Array | None = None
    among_photos: Array | None = None
    note: str = ""
    impostors: tuple[int, ...] = ()


class NotMeasured(ValueError):
    """Why a score cannot be measured, as a clause to stand behind "not measured:"."""


def value_pictures(evidence: Evidence) -> dict[str, PerImageValues | str]:
    """Compute each score for every picture, or say why it cannot be measured."""
    sets = [one for one in (evidence.embeddings, evidence.photos, evidence.below) if one]
    found: dict[str, PerImageValues | str] = {}
    for measure in evidence.measures:
        name, encoder = evidence.encoder_name(measure), evidence.encoder_of(measure)
        if isinstance(encoder, Missing):
            found[measure.name] = encoder.reason
        elif encoder and any(name in embeddings.broken for embeddings in sets):
            found[measure.name] = f"{encoder.key} gave no usable numbers for some pictures"
        else:
            try:
                found[measure.name] = _KINDS[measure.kind](measure, name, evidence)
            except NotMeasured as reason:
                found[measure.name] = str(reason)
    return found


def _value_subject(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    photos = _photos(encoder, evidence)
    below = None
    if evidence.below is not None:
        below = _fill(_cosines(evidence.below.features[encoder], photos).numpy())
    own = _cosines(evidence.embeddings.features[encoder], photos).numpy()
    if measure.needs_credit:
        own[evidence.copied] = np.nan
    impostors = _find_impostors(measure, below, evidence)
    return PerImageValues(
        _give_no_credit(own, below, evidence, impostors),
        below,
        _pairs(photos),
        f"floor: {len(impostors)} pictures of anybody of the class, which are nearer to the photos "
        "than the base model's pictures of these prompts"
        if impostors
        else "",
        impostors,
    )


def _find_impostors(measure: Measure, below: Array | None, evidence: Evidence) -> tuple[int, ...]:
    """Find the base model's pictures of anybody, where they are nearer to the photos.

    To the base model an identifier is a word like any other, and often means one peculiar person to
    it. A floor of that person alone lies as low as the person happens to be unlike the subject, and
    any stranger would then seem to have come some way from it.
    """
    if below is None or measure.encoder != "identity" or measure.roles != ("subject",):
        return ()
    impostors = [place for place, role in enumerate(evidence.below_roles) if role == "class"]
    partners = [
        place
        for place, role in zip(evidence.partners, evidence.roles, strict=True)
        if place is not None and role == "subject"
    ]
    units = [evidence.below_units[place] for place in impostors]
    if len(set(units)) < _FEWEST_IMPOSTORS or not partners:
        return ()
    nearer = _mean_of_units(below[impostors], units).mean() > below[partners].mean()
    return tuple(impostors) if nearer else ()


def _mean_of_units(values: Array, units: Sequence[str]) -> Array:
    """Take the mean of each unit's rows, and then of the units."""
    rows = [
        [row for row, name in enumerate(units) if name == unit] for unit in dict.fromkeys(units)
    ]
    mean: Array = np.stack([values[own].mean(axis=0) for own in rows]).mean(axis=0)
    return mean


def _value_nearest(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    photos = _photos(encoder, evidence)
    below = evidence.below
    return PerImageValues(
        _cosines(evidence.embeddings.features[encoder], photos).numpy().max(axis=1),
        None if below is None else _cosines(below.features[encoder], photos).numpy().max(axis=1),
    )


def _value_verified(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    found = _value_subject(measure, encoder, evidence)
    if found.below is None:
        raise NotMeasured("it needs the base model's pictures: --floor")
    impostors = _impostors(evidence)
    if len(impostors) < FEWEST_IMPOSTORS:
        raise NotMeasured(
            f"its threshold needs {FEWEST_IMPOSTORS} pictures of the base model's persons; "
            f"there are {len(impostors)}"
        )
    threshold = calibrate_threshold(found.below[impostors].mean(axis=1))
    apart = None
    if found.among_photos is not None:
        n = len(found.among_photos)
        others = (found.among_photos.sum(axis=1) - found.among_photos.diagonal()) / (n - 1)
        apart = (others >= threshold).astype(float)
    own = (found.own.mean(axis=1) >= threshold).astype(float)
    return PerImageValues(
        _never(own, encoder, evidence),
        (found.below.mean(axis=1) >= threshold).astype(float),
        apart,
        note=f"threshold {threshold:.3f}, from {len(impostors)} pictures of others",
    )


def _value_rank_1(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    if evidence.below is None:
        raise NotMeasured("it needs the base model's pictures: --floor")
    photos = _photos(encoder, evidence)
    gallery = [
        place for place in _impostors(evidence) if not _missed(encoder, evidence.below)[place]
    ]
    others = evidence.below.features[encoder][gallery]
    if len(others) < 2:
        raise NotMeasured("it needs two pictures or more of the base model's persons")

    def nearest(features: Tensor, similar: Tensor, to_others: Tensor) -> Array:
        shown = ~features.isnan().all(dim=1)
        found = torch.zeros(len(features), dtype=torch.bool)
        found[shown] = is_nearest(similar[shown], to_others[shown])
        return found.numpy().astype(float)

    own, beneath = evidence.embeddings.features[encoder], evidence.below.features[encoder]
    to_others = _cosines(beneath, others)
    to_others[gallery, torch.arange(len(gallery))] = -torch.inf  # a picture is not its own rival
    apart = None
    if len(photos) > 1:
        similar = cosines(photos, photos).fill_diagonal_(-torch.inf)
        apart = is_nearest(similar, cosines(photos, others)).numpy().astype(float)
    return PerImageValues(
        _never(nearest(own, _cosines(own, photos), _cosines(own, others)), encoder, evidence),
        nearest(beneath, _cosines(beneath, photos), to_others),
        apart,
        f"against {len(others)} pictures of others",
    )


def _value_prompt(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    texts = _texts(evidence)

    def fits(embeddings: Embeddings, own: Sequence[int]) -> Array:
        rows = texts[list(own)]
        return prompt_fidelity(generated=embeddings.features[encoder], prompts=rows).numpy()

    below = evidence.below
    return PerImageValues(
        fits(evidence.embeddings, evidence.own_text),
        None if below is None else fits(below, evidence.own_text_below),
    )


def _value_retrieval(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    texts = _texts(evidence)
    asked = sorted(
        {
            text
            for text, role in zip(evidence.own_text, evidence.roles, strict=True)
            if role in measure.roles
        }
    )
    if len(asked) < 2:
        raise NotMeasured("it needs two different prompts or more to choose from")
    columns = {text: column for column, text in enumerate(asked)}

    def found(embeddings: Embeddings, own: Sequence[int]) -> Array:
        fits = cosines(embeddings.features[encoder], texts[asked])
        # What is no picture of the subject has no column; it is never read.
        places = torch.tensor([columns.get(text, 0) for text in own])
        return is_own_prompt_best(fits, places).numpy().astype(float)

    below = evidence.below
    return PerImageValues(
        found(evidence.embeddings, evidence.own_text),
        None if below is None else found(below, evidence.own_text_below),
        note=f"among {len(asked)} prompts",
    )


def _value_variety(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    def apart(embeddings: Embeddings, groups: Sequence[int]) -> Array:
        if encoder in embeddings.features:
            return differences(embeddings.features[encoder]).numpy()
        perceptual = evidence.encoders.perceptual
        assert not isinstance(perceptual, Missing)
        return measure_distances(perceptual, embeddings.paths, groups)

    below = evidence.below
    return PerImageValues(
        apart(evidence.embeddings, evidence.cells),
        None if below is None else apart(below, evidence.cells_below),
    )


def _value_copy(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    def nearest(nearness: Tensor) -> Array:
        return nearness.amax(dim=1).numpy().astype(float)

    below = evidence.below
    return PerImageValues(
        nearest(evidence.nearness),
        None if below is None else nearest(correlate_layouts(below.layouts, evidence.photos.views)),
    )


def _value_drift(measure: Measure, encoder: str, evidence: Evidence) -> PerImageValues:
    if evidence.below is None:
        raise NotMeasured("it needs the base model's pictures: --floor")
    own, beneath = evidence.embeddings.features[encoder], evidence.below.features[encoder]
    paired = [row for row, place in enumerate(evidence.partners) if place is not None]
    places = [place for place in evidence.partners if place is not None]
    moved = np.full(len(own), np.nan)
    if paired:
        moved[paired] = drift(before=beneath[places], after=own[paired]).numpy()
    return PerImageValues(moved)


_KINDS: Mapping[MeasureKind, Callable[[Measure, str, Evidence], PerImageValues]] = {
    "subject": _value_subject,
    "nearest": _value_nearest,
    "verified": _value_verified,
    "rank_1": _value_rank_1,
    "prompt": _value_prompt,
    "retrieval": _value_retrieval,
    "variety": _value_variety,
    "copy": _value_copy,
    "drift": _value_drift,
}


def _photos(encoder: str, evidence: Evidence) -> Tensor:
    """The features of the photos that show somebody."""
    features = evidence.photos.features[encoder]
    shown = features[~_missed(encoder, evidence.photos)]
    if len(shown) == 0:
        raise NotMeasured("no photo shows a face")
    return shown


def _missed(encoder: str, embeddings: Embeddings) -> Tensor:
    nobody = torch.zeros(len(embeddings.prints), dtype=torch.bool)
    return embeddings.missed.get(encoder, nobody)


def _texts(evidence: Evidence) -> Tensor:
    if evidence.texts is None:
        raise NotMeasured("the prompts are unknown: the folder has no manifest")
    return evidence.texts


def _impostors(evidence: Evidence) -> list[int]:
    """The base model's pictures that show a member of the class."""
    return [place for place, role in enumerate(evidence.below_roles) if role != "other"]


def _cosines(features: Tensor, others: Tensor) -> Tensor:
    """Compare rows with rows; rows without anybody stay nan."""
    found = torch.full((len(features), len(others)), torch.nan, dtype=torch.float64)
    shown = ~features.isnan().all(dim=1)
    if shown.any():
        found[shown] = cosines(features[shown], others)
    return found


def _pairs(photos: Tensor) -> Array | None:
    return cosines(photos, photos).numpy() if len(photos) > 1 else None


def _fill(values: Array) -> Array:
    """Give rows of nan the mean of the others; zeros where there are no others."""
    absent = np.isnan(values).any(axis=1)
    filled = values.copy()
    filled[absent] = values[~absent].mean(axis=0) if not absent.all() else 0.0
    return filled


def _give_no_credit(
    own: Array, below: Array | None, evidence: Evidence, impostors: Sequence[int] = ()
) -> Array:
    """Give rows of nan what their floor has, or the mean floor, or 0 where there is none."""
    given = own.copy()
    for row in np.flatnonzero(np.isnan(own).any(axis=1)).tolist():
        place = evidence.partners[row]
        if below is None:
            given[row] = 0.0
        elif impostors:
            units = [evidence.below_units[impostor] for impostor in impostors]
            given[row] = _mean_of_units(below[list(impostors)], units)
        else:
            given[row] = below.mean(axis=0) if place is None else below[place]
    return given


def _never(values: Array, encoder: str, evidence: Evidence) -> Array:
    """Count pictures that show nobody, or repeat a photo, as failures."""
    failed = evidence.copied | _missed(encoder, evidence.embeddings).numpy()
    return np.where(failed, 0.0, values)
