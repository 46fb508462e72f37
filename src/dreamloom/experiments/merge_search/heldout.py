"""Compare the found weights with the plain sum, paired, on held-out prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dreamloom.evaluation.compare import FEWEST_PAIRS, LEVEL, Comparison, tell_basis
from dreamloom.evaluation.stats import intervals as statistics
from dreamloom.evaluation.stats.tests import correct_by_holm, sign_flip_p, smallest_p
from dreamloom.experiments.merge_search.candidates import MergeWeights
from dreamloom.experiments.merge_search.embeddings import MeasuredImage
from dreamloom.experiments.merge_search.retention import (
    Ends,
    attribute_change,
    average,
    join_shares,
)

MEASURE = "kept together"
"""The harmonic mean of what is kept of each aim."""


def compare_kept(
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
        tests: How many comparisons are made together; `correct_together` then corrects them.

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
    draws = statistics.draw(range(len(rows)))
    told = Comparison(
        measure=MEASURE,
        outcome="too few images",
        difference=average(changes, ends.prompts),
        interval=statistics.interval(statistics.sample_mean(rows, draws), len(rows), 0.95),
        pairs=len(first),
        prompts=len(prompts),
        note="this speaks for one prompt only" if len(prompts) == 1 else "",
    )
    if len(first) < FEWEST_PAIRS or tests * smallest_p(len(rows)) > LEVEL:
        return told
    return told.model_copy(update={"p": sign_flip_p(rows)})


def correct_together(compared: Mapping[str, Comparison]) -> dict[str, Comparison]:
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


def tell_verdict(
    winner: MergeWeights, compared: Mapping[str, Comparison], rivals: Mapping[str, MergeWeights]
) -> str:
    """Say in a sentence or two whether searching has found anything.

    Args:
        winner: What the search chose.
        compared: The winner against each rival, by name; a rival that is the winner is absent.
        rivals: What it was compared with: the plain sum, and usual weights, by what they are called
            in a sentence.
    """
    told = []
    for name, rival in rivals.items():
        if rival == winner:
            told.append(f"no better than {name}: they are the same")
            continue
        one = compared[name]
        says = {
            "better": f"better than {name}",
            "worse": f"no better than {name}: worse, so take {name}",
            "too few images": f"too few held-out pictures to tell it from {name}",
            "not measured": f"not measured against {name}",
        }.get(one.outcome, f"no better than {name}: {one.outcome}")
        basis = tell_basis(one)
        told.append(f"{says} ({basis})" if basis else says)
    return f"{winner.spelled} on held-out prompts and seeds: {'; '.join(told)}."


def join_kept(shares: Mapping[str, float]) -> float | None:
    """What is kept of all aims together; None where none was measured."""
    return join_shares(list(shares.values())) if shares else None
