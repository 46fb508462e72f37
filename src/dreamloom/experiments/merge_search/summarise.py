"""Summarise a weight search: rounds, front, and the winner compared on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dreamloom.core.errors import EvaluationError
from dreamloom.core.run_folder import library_versions
from dreamloom.evaluation.compare import FEWEST_PAIRS, LEVEL, Comparison, compare_cards, tell_basis
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.stats import intervals
from dreamloom.evaluation.stats.tests import correct_by_holm, sign_flip_p, smallest_p
from dreamloom.experiments.merge_search.candidates import MergeWeights
from dreamloom.experiments.merge_search.embeddings import MeasuredImage, mean_of
from dreamloom.experiments.merge_search.findings import (
    HeldOut,
    RoundFindings,
    SearchFindings,
    Tried,
    write_command,
)
from dreamloom.experiments.merge_search.job import Job
from dreamloom.experiments.merge_search.plan import Ranked, correlate_rounds
from dreamloom.experiments.merge_search.retention import (
    Ends,
    attribute_change,
    average,
    find_front,
    join_shares,
)

MEASURE = "kept together"
"""The harmonic mean of what is kept of each aim."""

WINNER = "the winner"
_SCORES = ("identity", "clip_t", "copy", "copy_sscd", "leakage")
"""What is summaries of held-out pictures beside the shares."""


@dataclass(frozen=True)
class Searched:
    """What a search has drawn and seen.

    Args:
        job: What was asked.
        ranked: The rounds.
        sides: The winner, and its rivals that are other weights, by name.
        ends: The ends on what was held out, on their own scale where they have one.
        measured_images: What was seen in each side's held-out pictures.
        cards: Their scorecards.
        pictures: How many were drawn in all.
        notes: What the user should know.
    """

    job: Job
    ranked: Sequence[Ranked]
    sides: Mapping[str, MergeWeights]
    ends: Ends
    measured_images: Mapping[str, Sequence[MeasuredImage]]
    cards: Mapping[str, Scorecard]
    pictures: int
    notes: tuple[str, ...]


def summarise_search(found: Searched) -> SearchFindings:
    """Sum up a search."""
    job, plan = found.job, found.job.plan
    winner = found.sides[WINNER]
    # How many of each round's candidates went on.
    following = [ranked.round for ranked in found.ranked[1:]]
    promoted = [*(after.candidates - after.fresh for after in following), 1]
    rounds = [_summarise_round(*pair) for pair in zip(found.ranked, promoted, strict=True)]
    on_same = found.ranked[1]
    kept = [on_same.kept[one] for one in on_same.candidates]
    aims = [aim for aim in kept[0] if all(aim in shares for shares in kept)]
    front = find_front([[shares[aim] for aim in aims] for shares in kept])
    rivals = [name for name in found.sides if name != WINNER]
    seen = found.measured_images
    # Both comparisons are corrected together.
    comparisons = decide_together(
        {
            name: compare_retention(found.ends, seen[name], seen[WINNER], len(rivals))
            for name in rivals
        }
    )
    tried, held_out = rounds[-1].candidates[0], _summarise_held_out(found)
    return SearchFindings(
        verdict=write_verdict(winner, comparisons, job.rivals),
        winner=tried,
        command=write_command(job.request.files, winner, job.request.out / "merged.safetensors"),
        front=tuple(on_same.candidates[place].name for place in front),
        compared_on=_summarise_round(on_same, 0),
        rounds=tuple(rounds),
        agreement=correlate_rounds(found.ranked[0], found.ranked[1]),
        held_out=held_out,
        comparisons=comparisons,
        changes=_compare_scores(found),
        budget=job.request.budget,
        pictures=found.pictures,
        prompts=tuple(dict.fromkeys(shot.prompt for shot in plan.shots)),
        held_out_prompts=tuple(dict.fromkeys(shot.prompt for shot in plan.held_out)),
        seeds=tuple(dict.fromkeys(shot.seed for shot in plan.shots)),
        held_out_seeds=tuple(dict.fromkeys(shot.seed for shot in plan.held_out)),
        style_reference=_name_style_reference(found),
        adapters={
            str(path): sha256
            for path, sha256 in zip(job.request.files, job.table.hashes, strict=True)
        },
        base=dict(job.base),
        keys=_name_keys(job),
        notes=(*found.notes, *_doubt(held_out[WINNER])),
        versions=library_versions(),
    )


def _summarise_round(ranked: Ranked, promoted: int) -> RoundFindings:
    return RoundFindings(
        shots=ranked.round.shots,
        steps=ranked.round.steps,
        candidates=tuple(
            Tried(
                name=one.name,
                subject=one.subject,
                style=one.style,
                kept=dict(ranked.kept[one]),
                together=join_retention(ranked.kept[one]),
                promoted=place < promoted,
            )
            for place, one in enumerate(ranked.candidates)
        ),
    )


def _compare_scores(found: Searched) -> dict[str, tuple[Comparison, ...]]:
    """Compare score by score; where nothing can be compared, nothing is said."""
    changes = {}
    for name in found.sides:
        if name == WINNER:
            continue
        cards = found.cards[name], found.cards[WINNER]
        measured = [
            one
            for one in _SCORES
            if any(one in card.scores and card.scores[one].value is not None for card in cards)
        ]
        try:
            changes[name] = compare_cards(*cards, measured) if measured else ()
        except EvaluationError:
            changes[name] = ()
    return changes


def _summarise_held_out(found: Searched) -> dict[str, HeldOut]:
    evaluate = found.job.config.evaluate
    summaries = {}
    for name, candidate in found.sides.items():
        measured_images, card = found.measured_images[name], found.cards[name]
        kept = found.ends.keep(measured_images)
        summaries[name] = HeldOut(
            name=candidate.name,
            subject=candidate.subject,
            style=candidate.style,
            kept=found.ends.score(
                measured_images, _name_keys(found.job), evaluate.resamples, evaluate.confidence
            ),
            together=join_retention(kept),
            copies=sum(one.copies_photo or one.copies_style for one in measured_images),
            nearest_copy=max(
                max(one.copy_photo, one.copy_style or -1.0) for one in measured_images
            ),
            content=mean_of([one.content_style for one in measured_images]),
            content_without=mean_of([one.content_style for one in found.ends.subject]),
            scores={one: card.scores[one] for one in _SCORES if one in card.scores},
            alarms=card.alarms,
            findings=tuple(text for text in card.findings if not text.startswith("Drift")),
        )
    return summaries


def _doubt(winner: HeldOut) -> list[str]:
    """Say which shares are guesses, because both ends of their scale may be the same."""
    return [
        f"On the held-out pictures it is not clear that {aim} can be kept or lost at all "
        f"({score.note.removeprefix('not measured: ')}), so what is kept together is a guess."
        for aim, score in winner.kept.items()
        if score.value is None and score.key
    ]


def _name_keys(job: Job) -> dict[str, str]:
    keys = job.encoders.keys()
    named = {"identity": "identity", "style": "style", "prompt": "clip"}
    return {aim: keys[encoder] for aim, encoder in named.items()}


def _name_style_reference(found: Searched) -> str:
    if found.job.table.has_style_photos:
        count = len(found.measured_images[WINNER][0].style or ())
        return f"{count} pictures in the style"
    return (
        f"{len(found.job.table.drawn)} pictures that the style's adapter drew, never with that of "
        f"the same prompt"
    )


def compare_retention(
    ends: Ends, first: Sequence[MeasuredImage], second: Sequence[MeasuredImage], tests: int = 1
) -> Comparison:
    """Say whether the second keeps more of all aims together than the first, prompt by prompt.

    The change of the harmonic mean is shared out over the pictures, exactly: each aim's values
    count by `attribute_change` over the way from nothing kept to everything. A prompt's mean is
    one number, and the signs of these numbers are tested; the ends are taken as they were found.

    Args:
        ends: Drawn from the same prompts and seeds.
        first: What was seen in one side's pictures, in the ends' order.
        second: In the other's.
        tests: How many comparisons are made together; `decide_together` then corrects them.

    Returns:
        A comparison whose outcome is yet to be decided where p is not None.
    """
    before, after = ends.keep(first), ends.keep(second)
    aims = [aim for aim in before if aim in after]
    if not aims:
        return Comparison(measure=MEASURE, outcome="not measured")
    counts = attribute_change([before[aim] for aim in aims], [after[aim] for aim in aims])
    old, new = ends.value(first), ends.value(second)
    changes = np.zeros(len(first))
    for aim, count in zip(aims, counts, strict=True):
        room = ends.room(aim)
        assert room is not None
        change = (new[aim] - old[aim]).reshape(len(first), -1).mean(axis=1)
        changes += count * change / room
    prompts = list(dict.fromkeys(ends.prompts))
    rows = changes
    if len(prompts) > 1:
        labels = np.array(ends.prompts)
        rows = np.array([changes[labels == prompt].mean() for prompt in prompts])
    draws = intervals.draw(range(len(rows)))
    undecided = Comparison(
        measure=MEASURE,
        outcome="too few images",
        difference=average(changes, ends.prompts),
        interval=intervals.interval(intervals.sample_mean(rows, draws), len(rows), 0.95),
        pairs=len(first),
        prompts=len(prompts),
        note="this speaks for one prompt only" if len(prompts) == 1 else "",
    )
    if len(first) < FEWEST_PAIRS or tests * smallest_p(len(rows)) > LEVEL:
        return undecided
    return undecided.model_copy(update={"p": sign_flip_p(rows)})


def decide_together(compared: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Decide comparisons that were made together, with p corrected by Holm."""
    tested = {name: one.p for name, one in compared.items() if one.p is not None}
    corrected = dict(zip(tested, correct_by_holm(list(tested.values())), strict=True))
    decided = dict(compared)
    for name, p in corrected.items():
        one = compared[name]
        assert one.difference is not None
        outcome = "no difference detected"
        if p <= LEVEL:
            outcome = "better" if one.difference > 0 else "worse"
        decided[name] = one.model_copy(update={"outcome": outcome, "p_corrected": p})
    return decided


def write_verdict(
    winner: MergeWeights, compared: Mapping[str, Comparison], rivals: Mapping[str, MergeWeights]
) -> str:
    """Say in a sentence or two whether searching has found anything.

    Args:
        winner: What the search chose.
        compared: The winner against each rival, by name; a rival that is the winner is absent.
        rivals: What it was compared with: the plain sum, and usual weights, by what they are called
            in a sentence.
    """
    clauses = []
    for name, rival in rivals.items():
        if rival == winner:
            clauses.append(f"no better than {name}: they are the same")
            continue
        one = compared[name]
        says = {
            "better": f"better than {name}",
            "worse": f"no better than {name}: worse, so take {name}",
            "too few images": f"too few held-out pictures to tell it from {name}",
            "not measured": f"not measured against {name}",
        }.get(one.outcome, f"no better than {name}: {one.outcome}")
        basis = tell_basis(one)
        clauses.append(f"{says} ({basis})" if basis else says)
    return f"{winner.spelled} on held-out prompts and seeds: {'; '.join(clauses)}."


def join_retention(shares: Mapping[str, float]) -> float | None:
    """What is kept of all aims together; None where none was measured."""
    return join_shares(list(shares.values())) if shares else None
