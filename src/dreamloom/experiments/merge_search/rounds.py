"""Successive halving of merge weights: the same pictures for all, the better half goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dreamloom.core.device import seed_for
from dreamloom.experiments.merge_search.candidates import MergeWeights, propose_near
from dreamloom.experiments.merge_search.plan import Round
from dreamloom.experiments.merge_search.retention import correlate_ranks, rank_key

MeasureWeights = Callable[
    [Sequence[MergeWeights], Round], Mapping[MergeWeights, Mapping[str, float]]
]
"""Says what each candidate of a round keeps of each aim."""


@dataclass(frozen=True)
class Ranked:
    """A round's candidates, the best first, with what each keeps of each aim."""

    round: Round
    candidates: tuple[MergeWeights, ...]
    kept: Mapping[MergeWeights, Mapping[str, float]]


def halve(
    design: Sequence[MergeWeights],
    rounds: Sequence[Round],
    measure: MeasureWeights,
    between: tuple[float, float],
    seed: int,
) -> list[Ranked]:
    """Measure candidates round by round; the best of each go on, joined by some near them.

    Args:
        design: The first round's candidates.
        rounds: The plan.
        measure: Draws and looks.
        between: The least and the greatest weight, for those near the best.
        seed: Of their dice.

    Returns:
        The rounds; the winner is the first candidate of the last one.

    Source:
        Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter
        Optimization (arXiv:1502.07943), Algorithm 1. Candidates that join later are ours.
    """
    current, known = list(design), list(design)
    found: list[Ranked] = []
    for number, one in enumerate(rounds):
        if found:
            best = found[-1].candidates
            stay = list(best[: one.candidates - one.fresh])
            fresh = propose_near(
                best[: max(1, len(stay) // 2)],
                one.fresh,
                known,
                between,
                seed_for(seed, "search near the leaders", number),
            )
            current, known = stay + fresh, known + fresh
        kept = measure(current, one)
        order = sorted(current, key=lambda candidate: rank_key(kept[candidate]), reverse=True)
        found.append(Ranked(one, tuple(order), dict(kept)))
    return found


def correlate_rounds(first: Ranked, second: Ranked) -> float | None:
    """Say how alike two rounds order the candidates that were in both; see `correlate_ranks`."""
    both = [candidate for candidate in second.candidates if candidate in first.kept]
    return correlate_ranks(
        *([rank_key(one.kept[candidate])[0] for candidate in both] for one in (first, second))
    )
