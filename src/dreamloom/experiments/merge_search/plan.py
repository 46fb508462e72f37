"""Successive halving of merge weights: the plan that spends a budget of pictures, and its run.

The plan is settled before the first picture is drawn: many candidates are drawn on few prompts with
few steps, the better half of them on more, and so on. Whatever is compared is drawn from the same
prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dreamloom.core.device import seed_for
from dreamloom.core.errors import ConfigError
from dreamloom.evaluation.compare import FEWEST_PAIRS
from dreamloom.experiments.merge_search.candidates import MergeWeights, propose_near
from dreamloom.experiments.merge_search.retention import correlate_ranks, rank_key
from dreamloom.models.base import Shot

ENDS = 3
"""Drawn beside the candidates in each round: by the base model, and by each adapter alone."""

RIVALS = 3
"""Drawn at the end beside the ends: the winner, the plain sum, and 0.8 and 1.0."""

_FEWEST_CANDIDATES = 4
_HELD_OUT_SHARE = 0.3
_FEW_STEPS_SHARE = 0.4
# One candidate in three of the second round is new: around the leaders of the first.
_FRESH_EVERY = 3


@dataclass(frozen=True)
class Round:
    """One round of a search.

    Args:
        candidates: How many are in it.
        fresh: How many of them were not in the round before.
        shots: How many of the search's shots each of them draws, the first ones.
        steps: Denoising steps.
    """

    candidates: int
    fresh: int
    shots: int
    steps: int


@dataclass(frozen=True)
class SearchPlan:
    """How a budget is spent.

    Args:
        rounds: Each with fewer candidates and more shots than the one before.
        shots: The search's prompts and seeds: first every prompt once, then with the next seed.
        held_out: Prompts and seeds that the search never sees.
        leaks: Prompts of the class alone, to see whether the subject leaks into it; held out too.
        pictures: The most that are drawn in all.
    """

    rounds: tuple[Round, ...]
    shots: tuple[Shot, ...]
    held_out: tuple[Shot, ...]
    leaks: tuple[Shot, ...]
    pictures: int


def split_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part prompts into those to search on and those that are held out, evenly through the list.

    Half is held out, and more of a short list: with fewer than eight prompts hardly anything can
    be told. A single prompt is on both sides, and then only its seeds are held out.

    Example:
        >>> split_prompts(["a", "b", "c", "d"])
        (['a', 'c'], ['b', 'd'])
    """
    count = len(prompts)
    if count == 1:
        return list(prompts), list(prompts)
    held = max(count // 2, min(FEWEST_PAIRS, count - 3))
    places = [(place + 1) * held // count > place * held // count for place in range(count)]
    kept = [text for text, is_held in zip(prompts, places, strict=True) if not is_held]
    return kept, [text for text, is_held in zip(prompts, places, strict=True) if is_held]


def plan_search(
    budget: int,
    prompts: tuple[Sequence[str], Sequence[str], Sequence[str]],
    steps: int,
    parameters: int,
    first_seed: int = 0,
) -> SearchPlan:
    """Plan a search that draws no more than so many pictures.

    About a third goes to the held-out comparison. Of the rest as many shots for each candidate are
    bought as leave six candidates for each weight that is searched for; or, where the budget is
    small, two shots, and as many candidates as there is room for.

    Args:
        budget: Pictures, in all.
        prompts: To search on, held out, and of the class alone.
        steps: Denoising steps of every round but the first.
        parameters: How many weights are searched for.
        first_seed: Of the search; held-out seeds follow.

    Raises:
        ConfigError: If the budget does not suffice for a search.
    """
    searched, held, leaking = prompts
    room = int(_HELD_OUT_SHARE * budget) // (ENDS + RIVALS)
    prompts_held = min(len(held), max(FEWEST_PAIRS, room))
    # Pictures of them that each side draws.
    shots_held = max(FEWEST_PAIRS, room - room % prompts_held)
    leaks = min(len(leaking), FEWEST_PAIRS // 2)
    left = budget - (ENDS + RIVALS) * shots_held - (1 + RIVALS) * leaks
    found = None
    for shots in range(max(2, len(searched)), 1, -1):
        count = 0
        while _cost(_plan_rounds(count + 1, shots, steps)) <= left:
            count += 1
        if count >= _FEWEST_CANDIDATES:
            found = shots, count
            if count >= 6 * parameters:
                break
    if found is None:
        fewest = budget - left + _cost(_plan_rounds(_FEWEST_CANDIDATES, 2, steps))
        raise ConfigError(
            f"A budget of {budget} pictures is too small: a search over these prompts draws "
            f"{fewest} at least.",
            f"Give --budget {fewest} or more; 200 is usual.",
        )
    rounds = _plan_rounds(found[1], found[0], steps)
    shots_listed = _list_shots(searched, rounds[-1].shots, first_seed)
    next_seed = max(shot.seed for shot in shots_listed) + 1
    return SearchPlan(
        rounds=rounds,
        shots=shots_listed,
        held_out=_list_shots(held[:prompts_held], shots_held, next_seed),
        leaks=_list_shots(leaking, leaks, next_seed),
        pictures=_cost(rounds) + budget - left,
    )


def _plan_rounds(candidates: int, shots: int, steps: int) -> tuple[Round, ...]:
    few = max(1, round(_FEW_STEPS_SHARE * steps))
    half, quarter = -(-candidates // 2), max(2, -(-candidates // 4))
    return (
        Round(candidates, candidates, shots, few),
        Round(half, half // _FRESH_EVERY, 2 * shots, steps),
        Round(quarter, 0, 4 * shots, steps),
    )


def _cost(rounds: Sequence[Round]) -> int:
    """Count what the rounds draw; a picture that an earlier round has drawn is not drawn again."""
    total, before = 0, None
    for one in rounds:
        again = before.shots if before is not None and before.steps == one.steps else 0
        total += (one.candidates - one.fresh + ENDS) * (one.shots - again) + one.fresh * one.shots
        before = one
    return total


def _list_shots(prompts: Sequence[str], count: int, first_seed: int) -> tuple[Shot, ...]:
    return tuple(
        Shot(prompts[place % len(prompts)], first_seed + place // len(prompts))
        for place in range(count)
    )


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
