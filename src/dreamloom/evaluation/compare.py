"""Comparisons: what changed from one evaluation to another, in a few fixed words.

Two pictures of the same prompt, seed, scheduler and steps make a pair. Pairs of one prompt
resemble each other, so the prompt is the unit: its mean difference is one number, and whether
these numbers could as well have the other sign is what is tested.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict

from dreamloom.core.errors import EvaluationError
from dreamloom.evaluation.encoders.catalogue import CLIP_VIT_B_32, DINO_VIT_S_16
from dreamloom.evaluation.metrics.measures import MEASURE, label_of
from dreamloom.evaluation.metrics.scorecard import PictureScores, Score, Scorecard
from dreamloom.evaluation.stats.intervals import Draws, Sampled, draw, interval, sample_mean
from dreamloom.evaluation.stats.tests import correct_by_holm, sign_flip_p, smallest_p, student_p

Outcome: TypeAlias = Literal[
    "better", "worse", "no difference detected", "too few images", "not measured"
]

Direction: TypeAlias = Outcome | Literal["higher", "lower"]
"""What a comparison may say; higher and lower where neither is better."""

LEVEL = 0.05
"""A change is told where p, corrected for the scores that were tested together, is at most this."""

FEWEST_PAIRS = 8
"""With fewer pictures than this nothing is concluded."""
FEWEST_TRAININGS = 3
"""With fewer trainings on each side a comparison speaks of their adapters, not of the method."""

_RESAMPLES = 2000

# The smallest differences that people cared about: Ruiz et al., DreamBooth (arXiv:2208.12242).
# They hold for these encoders; for others none is known.
_SMALLEST_OF_INTEREST = {
    "dino": (DINO_VIT_S_16.repository, 0.1),
    "clip_t": (CLIP_VIT_B_32.repository, 0.05),
}


class Comparison(BaseModel):
    """What one score's change from the first side to the second can be told to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str
    outcome: Direction
    difference: float | None = None
    """Second minus first: the mean over prompts."""
    interval: tuple[float, float] | None = None
    """Its 95 % interval, for this score alone."""
    p: float | None = None
    p_corrected: float | None = None
    """By Holm, for the scores that were tested together."""
    pairs: int = 0
    prompts: int = 0
    key: str | None = None
    """Encoder, revision and preprocessing of both sides."""
    below_practical_significance: bool = False
    """Whether a difference was found, and is smaller than people are known to care about."""
    note: str = ""


Pair: TypeAlias = tuple[Scorecard, Scorecard]
"""Two evaluations of one training each, or of trainings from the same seed."""

_Moment: TypeAlias = tuple[str, int]
"""A prompt and a seed: one noise, whatever sampler drew from it."""


@dataclass(frozen=True)
class _Differences:
    """One score's differences.

    Args:
        table: A row for each prompt, or for each seed where there is one prompt; a column for
            each training.
        pairs: How many pairs of pictures they come from.
        prompts: How many prompts.
    """

    table: Float[np.ndarray, "rows trainings"]
    pairs: int
    prompts: int

    @property
    def smallest_p(self) -> float:
        """The smallest p that they can reach; 1 where there are too few pairs to begin with."""
        return smallest_p(len(self.table)) if self.pairs >= FEWEST_PAIRS else 1.0

    @property
    def speaks_for_trainings(self) -> bool:
        """Whether there are enough trainings to allow for others."""
        return bool(self.table.shape[1] >= FEWEST_TRAININGS)

    def sample(self) -> Sampled:
        """Take the mean, with the doubt of other prompts, and of other trainings where it can."""
        rows, trainings = self.table.shape
        if self.speaks_for_trainings:
            return sample_mean(self.table, _draw(rows, trainings))
        return sample_mean(self.table.mean(axis=1), _draw(rows))

    def test(self) -> float:
        """Give the p-value of there being no difference."""
        p = sign_flip_p(self.table.mean(axis=1))
        if self.speaks_for_trainings:
            sampled = self.sample()
            assert sampled.error is not None
            p = max(p, student_p(sampled.value, sampled.error, sampled.freedom))
        return p


# Scores that are compared together have mostly the same prompts.
@lru_cache(maxsize=2)
def _draw(rows: int, trainings: int = 0) -> Draws:
    return draw(range(rows), trainings, resamples=_RESAMPLES)


def compare_cards(
    first: Scorecard, second: Scorecard, measures: Sequence[str] | None = None
) -> tuple[Comparison, ...]:
    """Say of each score what changed from one evaluation to another.

    Args:
        first: The evaluation before the change.
        second: The one after it.
        measures: The scores to compare; None compares all. Every score that is tested makes it
            harder for the others to be told from chance, so fewer say more.

    Returns:
        One comparison for each score that either side has measured, in the first side's order.

    Raises:
        EvaluationError: If there is nothing that could be compared: no pictures of the same
            prompt, seed and sampler, no such score, other encoders on each side, or scores that
            mean nothing.
    """
    for side, card in (("first", first), ("second", second)):
        if card.warning:
            raise EvaluationError(
                f"Nothing can be compared. The scores of the {side} side mean nothing: "
                f"{card.warning}",
                "Score both with encoders that know such pictures.",
            )
    return _compare([(first, second)], measures)


def read_floor(card: Scorecard) -> Scorecard | None:
    """Take out of a scorecard what it keeps of the base model's pictures of the same cells.

    Returns:
        A scorecard to compare with, of per-picture scores alone; None where none were kept.
    """
    kept = [picture for picture in card.pictures if picture.floor]
    names = {name for picture in kept for name in picture.floor}
    if not names:
        return None
    return Scorecard(
        warning=card.warning,
        scores={
            name: Score(
                value=fmean(p.floor[name] for p in kept if name in p.floor),
                n=sum(name in p.floor for p in kept),
                key=card.scores[name].key,
            )
            for name in card.scores
            if name in names
        },
        encoders=card.encoders,
        photos=card.photos,
        confidence=card.confidence,
        resamples=card.resamples,
        pictures=tuple(p.model_copy(update={"values": p.floor, "floor": {}}) for p in kept),
    )


def compare_settings(
    first: Sequence[Scorecard],
    second: Sequence[Scorecard],
    measures: Sequence[str] | None = None,
) -> tuple[Comparison, ...]:
    """Say the same of two settings that were trained several times, from several seeds.

    Differences of a prompt are averaged over trainings. From `FEWEST_TRAININGS` on, the interval
    allows for other trainings as well as for other prompts, and p is the larger of two: that of
    the prompts' signs, and that of Student's t with both kinds of doubt. With fewer, both speak of
    these adapters only, and the note says so.

    Args:
        first: Evaluations before the change, one for each training.
        second: Those after it; trainings from one seed stand at the same place.
        measures: The scores to compare; None compares all.

    Returns:
        One comparison for each score that either side has measured.

    Raises:
        EvaluationError: If there is nothing that could be compared.
        ValueError: If a side has no training, or the other has not as many.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"both sides need the same number of trainings, 1 or more; "
            f"got {len(first)} and {len(second)}"
        )
    compared = _compare(list(zip(first, second, strict=True)), measures)
    if len(first) >= FEWEST_TRAININGS:
        return compared
    told = "this speaks of these adapters, not of the method"
    return tuple(
        one.model_copy(update={"note": _join(one.note, told)}) if one.pairs else one
        for one in compared
    )


def _compare(pairs: Sequence[Pair], measures: Sequence[str] | None) -> tuple[Comparison, ...]:
    names = _list_names(pairs, measures)
    refused = {name: reason for name in names if (reason := _refuse(name, pairs))}
    _require(names, refused, pairs)
    found = {
        name: differences
        for name in names
        if name not in refused and (differences := _subtract(name, pairs)) is not None
    }
    family = _choose_family({name: one.smallest_p for name, one in found.items()})
    p_values = {name: found[name].test() for name in family}
    corrected = dict(zip(family, correct_by_holm(list(p_values.values())), strict=True))
    compared = []
    for name in names:
        key = None if name in refused else pairs[0][0].scores[name].key
        if name not in found:
            note = refused.get(name, "no two pictures of the same prompt, seed and sampler have it")
            compared.append(Comparison(measure=name, outcome="not measured", key=key, note=note))
        elif name in family:
            told = _describe(name, found[name], key)
            compared.append(_decide(told, p_values[name], corrected[name]))
        else:
            told = _describe(name, found[name], key)
            note = _join(_tell_few(found[name], len(found)), told.note)
            compared.append(told.model_copy(update={"note": note}))
    return tuple(compared)


def _list_names(pairs: Sequence[Pair], measures: Sequence[str] | None) -> list[str]:
    """List the scores that any side has measured, as far as they are asked for."""
    known = dict.fromkeys(
        name
        for pair in pairs
        for card in pair
        for name, score in card.scores.items()
        if score.value is not None
    )
    for name in measures or ():
        if name not in known:
            raise EvaluationError(
                f"Neither side has measured {name}.",
                f"Measured are {', '.join(known)}." if known else "",
            )
    return [name for name in known if measures is None or name in measures]


def _refuse(name: str, pairs: Sequence[Pair]) -> str:
    """Say why a score of both sides must not be compared; empty if it may be."""
    for place, side in enumerate(("first", "second")):
        for pair in pairs:
            score = pair[place].scores.get(name)
            if score is None or score.value is None:
                reason = score.reason if score else ""
                return f"not measured on the {side} side" + (f": {reason}" if reason else "")
    keys = list(dict.fromkeys(card.scores[name].key for pair in pairs for card in pair))
    if len(keys) > 1:
        return f"not compared: measured with {keys[0]} here and with {keys[1]} there"
    return ""


def _require(names: Sequence[str], refused: Mapping[str, str], pairs: Sequence[Pair]) -> None:
    """Refuse evaluations that have nothing in common.

    Raises:
        EvaluationError: If no score may be compared, or no pictures make a pair.
    """
    if not names:
        raise EvaluationError("Neither side has a score.", "Evaluate the pictures first.")
    if len(refused) == len(names):
        # Two encoders are the likelier mistake, so they are told before what is missing.
        name, reason = min(refused.items(), key=lambda item: not item[1].startswith("not compared"))
        raise EvaluationError(
            f"Nothing can be compared. {name} is {reason}.",
            "Score both with the same encoders.",
        )
    if any(not _pair_up(*pair) for pair in pairs):
        unknown = any(
            picture.seed is None for pair in pairs for c in pair for picture in c.pictures
        )
        raise EvaluationError(
            "The two sides share no picture of the same prompt, seed, scheduler and steps.",
            "A folder without a manifest tells no prompts and seeds: let DreamLoom draw both."
            if unknown
            else "Draw both with the same prompts, seeds, schedulers and steps.",
        )


def _pair_up(first: Scorecard, second: Scorecard) -> list[tuple[PictureScores, PictureScores]]:
    """Find the pictures of both sides that were drawn alike."""

    def list_cells(card: Scorecard) -> dict[tuple[Any, ...], PictureScores]:
        return {
            (picture.prompt, picture.seed, picture.scheduler, picture.steps): picture
            for picture in card.pictures
            if picture.prompt is not None and picture.seed is not None
        }

    cells, others = list_cells(first), list_cells(second)
    return [(picture, others[cell]) for cell, picture in cells.items() if cell in others]


def _subtract(name: str, pairs: Sequence[Pair]) -> _Differences | None:
    """Subtract one score picture by picture, or prompt by prompt; None where nothing pairs."""
    trainings = [_subtract_pictures(name, pair) or _subtract_prompts(name, pair) for pair in pairs]
    shared = [m for m in trainings[0] if all(m in training for training in trainings)]
    if not shared:
        return None
    prompts = list(dict.fromkeys(prompt for prompt, _ in shared))
    counted = sum(len(training[moment]) for training in trainings for moment in shared)
    by_moment = {m: [fmean(training[m]) for training in trainings] for m in shared}
    if len(prompts) == 1:
        return _Differences(np.array(list(by_moment.values())), counted, 1)
    table = [
        np.mean([by_moment[moment] for moment in shared if moment[0] == prompt], axis=0)
        for prompt in prompts
    ]
    return _Differences(np.stack(table), counted, len(prompts))


def _subtract_pictures(name: str, pair: Pair) -> dict[_Moment, list[float]]:
    """Subtract one score of each picture, whatever samplers drew from the same noise."""
    found: dict[_Moment, list[float]] = {}
    for one, other in _pair_up(*pair):
        own, changed = one.values.get(name), other.values.get(name)
        if own is not None and changed is not None:
            assert one.prompt is not None
            assert one.seed is not None
            found.setdefault((one.prompt, one.seed), []).append(changed - own)
    return found


def _subtract_prompts(name: str, pair: Pair) -> dict[_Moment, list[float]]:
    """Subtract one score of each prompt, where pictures have none of their own, as variety.

    Only prompts of which both sides have the very same pictures count. The difference stands once
    for each of these, under the seed 0: prompts have none.
    """
    by_prompt: tuple[dict[str, float], ...] = tuple(
        {
            group.prompt: value
            for group in card.by_prompt
            if group.prompt is not None
            and name in group.scores
            and (value := group.scores[name].value) is not None
        }
        for card in pair
    )
    drawn = [Counter(picture.prompt for picture in card.pictures) for card in pair]
    paired = Counter(one.prompt for one, _ in _pair_up(*pair))
    return {
        (prompt, 0): [by_prompt[1][prompt] - value] * paired[prompt]
        for prompt, value in by_prompt[0].items()
        if prompt in by_prompt[1] and paired[prompt] == drawn[0][prompt] == drawn[1][prompt] > 0
    }


def _choose_family(smallest: Mapping[str, float]) -> list[str]:
    """Choose the scores to test together: those that could pass Holm's correction at all.

    A score with too few prompts to be told from chance would only make it harder for the others.
    What is chosen depends on the number of prompts and never on the differences, so that the
    correction holds.

    Args:
        smallest: The smallest p that each score can reach.

    Source:
        Tarone, A Modified Bonferroni Method for Discrete Data (1990).
    """
    family = list(smallest)
    while family and max(smallest[name] for name in family) * len(family) > LEVEL:
        worst = max(smallest[name] for name in family)
        family = [name for name in family if smallest[name] < worst]
    return family


def _describe(name: str, differences: _Differences, key: str | None) -> Comparison:
    sampled = differences.sample()
    single = differences.prompts == 1
    return Comparison(
        measure=name,
        outcome="too few images",
        difference=sampled.value,
        interval=interval(sampled, len(differences.table), 0.95),
        pairs=differences.pairs,
        prompts=differences.prompts,
        key=key,
        note="this speaks for one prompt only" if single else "",
    )


def _decide(told: Comparison, p: float, corrected: float) -> Comparison:
    """Put a test's result in words."""
    assert told.difference is not None
    outcome: Direction = "no difference detected"
    if corrected <= LEVEL:
        measure = MEASURE.get(told.measure)
        better = measure.better if measure else "neither"
        if better == "neither":
            outcome = "higher" if told.difference > 0 else "lower"
        else:
            outcome = "better" if (told.difference > 0) == (better == "higher") else "worse"
    repository, least = _SMALLEST_OF_INTEREST.get(told.measure, ("", 0.0))
    small = bool(repository) and (told.key or "").startswith(f"{repository}@")
    return told.model_copy(
        update={
            "outcome": outcome,
            "p": p,
            "p_corrected": corrected,
            "below_practical_significance": outcome != "no difference detected"
            and small
            and abs(told.difference) < least,
        }
    )


def _tell_few(differences: _Differences, scores: int) -> str:
    if differences.pairs < FEWEST_PAIRS:
        return f"{_count(differences.pairs, 'pair')}, and at least {FEWEST_PAIRS} are needed"
    needed = 1 + math.ceil(math.log2(scores / LEVEL))
    what = "seed" if differences.prompts == 1 else "prompt"
    drawn = _count(len(differences.table), what)
    return f"{drawn} cannot tell {_count(scores, 'score')} from chance; {needed} could"


def tell_comparison(one: Comparison) -> str:
    """Say in one sentence what a comparison found: its words, and what they rest on."""
    told = tell_outcome(one), tell_basis(one)
    return f"{label_of(one.measure)}: {'; '.join(filter(None, told))}."


def tell_outcome(one: Comparison) -> str:
    """Say an outcome in the words that readers meet.

    Where there are images enough, and no result could have passed for lack of prompts, more images
    of the same prompts would not help: the note says how many prompts would.
    """
    if one.outcome != "too few images" or one.pairs < FEWEST_PAIRS:
        return one.outcome
    return f"too few {'prompts' if one.prompts > 1 else 'seeds'}"


def tell_basis(one: Comparison) -> str:
    """Say what an outcome rests on: the difference, its p, how many pairs, and what to mind."""
    parts = []
    if one.difference is not None:
        told = f"{one.difference:+.3f}"
        if one.interval is not None:
            told += " ({:+.3f} to {:+.3f})".format(*one.interval)
        parts.append(told.replace("-", "−"))
    if one.p_corrected is not None:
        parts.append("p " + ("< 0.001" if one.p_corrected < 0.001 else f"= {one.p_corrected:.3f}"))
    if one.pairs:
        parts.append(f"{_count(one.pairs, 'pair')} of {_count(one.prompts, 'prompt')}")
    if one.below_practical_significance:
        parts.append("below practical significance")
    return _join(", ".join(parts), one.note)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _join(*notes: str) -> str:
    return "; ".join(filter(None, notes))
