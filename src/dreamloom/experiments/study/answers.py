"""Answers: one sentence each, from comparisons, in four words and no others.

The words are better, worse, no difference detected, and too few images; what could not be
compared at all is not measured. Nothing here measures: every function takes outcomes and says what
follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dreamloom.evaluation.compare import FEWEST_PAIRS, LEVEL, Comparison, Outcome
from dreamloom.evaluation.metrics.measures import MEASURE, label_of
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.evaluation.recommend import CheckpointCandidate, recommend_checkpoint
from dreamloom.evaluation.stats.tests import correct_by_holm, smallest_p

BETTER: Outcome = "better"
WORSE: Outcome = "worse"
SAME: Outcome = "no difference detected"
FEW: Outcome = "too few images"
UNMEASURED: Outcome = "not measured"


@dataclass(frozen=True)
class Contrast:
    """Two arms, compared on the same prompts and seeds.

    Args:
        first: The arm that is compared with.
        second: The arm that is better, worse, or neither.
        measures: One comparison for each measure that both have.
    """

    first: str
    second: str
    measures: tuple[Comparison, ...]

    def decide(self, decide_by: Sequence[str]) -> Decision:
        """Put the measures that decide together."""
        return decide({one.measure: one.outcome for one in self.measures}, decide_by)

    def describe(self, names: Sequence[str]) -> str:
        """Say the named measures' outcomes with their evidence, those of one outcome together.

        A measure of which neither more nor less is better stands beside them without a word.
        """
        found = [one for name in names for one in self.measures if one.measure == name]
        said = []
        for outcome in (BETTER, WORSE, SAME, FEW, UNMEASURED):
            evidence = [format_evidence(one) for one in found if one.outcome == outcome]
            said += [f"{outcome} in {_list(evidence)}"] if evidence else []
        neutral = [format_evidence(one) for one in found if one.outcome in ("higher", "lower")]
        said += [f"beside {_list(neutral)}"] if neutral else []
        return ", ".join(said)


def correct_together(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Correct all comparisons of a study for being made together.

    A study of many arms makes many comparisons, of which some would come out by chance. What was
    told of two arms alone may therefore become no difference detected, or, where there are too few
    prompts for so many comparisons, too few images; never the other way.

    Args:
        contrasts: All that are shown together, each of them corrected for itself alone.

    Source:
        Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    tested = [one.p for contrast in contrasts for one in contrast.measures if one.p is not None]
    corrected = iter(correct_by_holm(tested))

    def correct(one: Comparison) -> Comparison:
        if one.p is None:
            return one
        p, outcome = next(corrected), one.outcome
        if p > LEVEL:
            units = one.prompts if one.prompts > 1 else one.pairs
            outcome = FEW if smallest_p(units) * len(tested) > LEVEL else SAME
        return one.model_copy(update={"p_corrected": p, "outcome": outcome})

    return [
        replace(contrast, measures=tuple(map(correct, contrast.measures))) for contrast in contrasts
    ]


@dataclass(frozen=True)
class Decision:
    """What several measures say together.

    Args:
        better: Measures in which the second arm is better.
        worse: Measures in which it is worse.
        few: Whether no measure had enough images to say anything.
    """

    better: tuple[str, ...] = ()
    worse: tuple[str, ...] = ()
    few: bool = False


def decide(outcomes: Mapping[str, str], decide_by: Sequence[str]) -> Decision:
    """Put the outcomes of some measures together; a measure without one says nothing.

    Example:
        >>> decide({"identity": "better", "clip_t": "no difference detected"}, ["identity"])
        Decision(better=('identity',), worse=(), few=False)
    """
    known = {name: outcomes[name] for name in decide_by if name in outcomes}
    return Decision(
        better=tuple(name for name, outcome in known.items() if outcome == BETTER),
        worse=tuple(name for name, outcome in known.items() if outcome == WORSE),
        few=not any(outcome in (BETTER, WORSE, SAME) for outcome in known.values()),
    )


def find_plateau(decisions: Sequence[Decision]) -> int | None:
    """Find from where on nothing is gained up to the end.

    Args:
        decisions: For each arm but the last, in order, how it stands to the last.

    Returns:
        The first arm from which on none is worse than the last in any measure; None where even
        the last but one is worse, or where too few images leave that open.

    Example:
        >>> worse, same = Decision(worse=("identity",)), Decision()
        >>> find_plateau([worse, worse, same, same])
        2
        >>> find_plateau([worse, same, worse]) is None
        True
    """
    start = len(decisions)
    while start and not decisions[start - 1].worse and not decisions[start - 1].few:
        start -= 1
    return start if start < len(decisions) else None


def choose_arm(cards: Sequence[Sequence[Scorecard]], decide_by: Sequence[str]) -> int:
    """Choose an arm by its scores on the seeds that are set apart for choosing.

    With likeness and prompt following to decide by, merit is what `recommend_checkpoint`
    takes it for, so that neither can make up for the loss of the other, and of nearly equal arms
    the first is taken. With any other measures, the first of them alone chooses.

    Args:
        cards: Each arm's scorecards, one for each training seed.
        decide_by: Names of measures.

    Returns:
        The arm's number; the first where nothing was measured.
    """
    if set(decide_by) != {"identity", "clip_t"}:
        sign = -1 if MEASURE[decide_by[0]].better == "lower" else 1
        values = [mean_part([card.scores.get(decide_by[0]) for card in arm]) for arm in cards]
        known = [(sign * value, -place) for place, value in enumerate(values) if value is not None]
        return -max(known)[1] if known else 0
    candidates = []
    for place, arm in enumerate(cards):
        clip_t = [card.scores.get("clip_t") for card in arm]
        candidates.append(
            CheckpointCandidate(
                update=place,
                identity_lift=mean_part([card.scores.get("identity") for card in arm], "lift"),
                clip_t=mean_part(clip_t),
                clip_t_floor=mean_part(clip_t, "floor"),
                alarms=tuple(alarm for card in arm for alarm in card.alarms),
            )
        )
    recommended = recommend_checkpoint(candidates)
    return recommended.update if recommended else 0


def mean_part(scores: Sequence[object], part: str = "value") -> float | None:
    """Take the mean of one part of some scores; None unless each of them has it."""
    values = [getattr(score, part, None) for score in scores]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def format_evidence(one: Comparison) -> str:
    """Name a measure with what was found: ``Identity (+0.120, 0.050 to 0.190)``."""
    if one.difference is None:
        return label_of(one.measure)
    evidence = f"{one.difference:+.3f}"
    if one.interval is not None:
        evidence += ", {:+.3f} to {:+.3f}".format(*one.interval)
    return f"{label_of(one.measure)} ({evidence.replace('-', '−')})"


def answer_compare(contrasts: Sequence[Contrast], seeds: int, decide_by: Sequence[str]) -> str:
    """Say how each arm stands to the first."""
    said = [
        f"{_quote(one.second)} against {_quote(one.first)}: {one.describe(decide_by)}"
        for one in contrasts
    ]
    return f"{'; '.join(said)}; {_basis(seeds)}."


def answer_plateau(contrasts: Sequence[Contrast], seeds: int, decide_by: Sequence[str]) -> str:
    """Say from which arm on nothing is gained.

    Args:
        contrasts: How each arm but the last stands to the last, in order.
        seeds: How many training seeds there were.
        decide_by: Measures that decide.
    """
    decisions = [contrast.decide(decide_by) for contrast in contrasts]
    last = _quote(contrasts[-1].first)
    start = find_plateau(decisions)
    if all(decision.few for decision in decisions):
        return f"{FEW[0].upper()}{FEW[1:]} to tell any of them from {last}; {_basis(seeds)}."
    if start is None:
        nearest = contrasts[-1]
        if decisions[-1].few:
            said = f"{FEW} to tell {_quote(nearest.second)} from {last}"
        else:
            name = _quote(nearest.second)
            said = f"{name} against {last}: {nearest.describe(decide_by)}"
        return f"No plateau found: {said}; {_basis(seeds)}."
    first = contrasts[start]
    if any(decision.better for decision in decisions[start:]):
        said = f"From {_quote(first.second)} on none is worse than {last}"
    else:
        said = f"From {_quote(first.second)} on, {SAME} to {last}"
    said += f" ({first.describe(decide_by)})"
    if start:
        before = contrasts[start - 1]
        said += f"; {_quote(before.second)} against {last}: {before.describe(decide_by)}"
    return f"{said}; {_basis(seeds)}."


def answer_choose(
    chosen: str,
    contrasts: Sequence[Contrast],
    seeds: int,
    decide_by: Sequence[str],
    split: tuple[int, int],
) -> str:
    """Say what was chosen, and how it stands to every other arm on seeds that had no say in it.

    Args:
        chosen: The arm that was chosen.
        contrasts: The chosen arm against each of the others, which is the first.
        seeds: How many training seeds there were.
        decide_by: Measures that decide.
        split: How many seeds of each prompt chose, and how many are reported on.
    """
    groups: dict[str, list[str]] = {BETTER: [], WORSE: [], SAME: [], FEW: []}
    mixed = []
    for contrast in contrasts:
        found, name = contrast.decide(decide_by), _quote(contrast.first)
        if found.better and found.worse:
            ups, downs = (_list([label_of(n) for n in ns]) for ns in (found.better, found.worse))
            mixed.append(f"better in {ups} and worse in {downs} than {name}")
        else:
            word = BETTER if found.better else WORSE if found.worse else FEW if found.few else SAME
            groups[word].append(name)
    phrases: dict[str, str] = {
        BETTER: "better than",
        WORSE: "worse than",
        SAME: f"{SAME} to",
        FEW: f"{FEW} to tell from",
    }
    said = [f"{phrases[word]} {_list(names)}" for word, names in groups.items() if names]
    return (
        f"{_quote(chosen)}, chosen on {_count(split[0], 'seed')} of each prompt, on "
        f"{_count(split[1], 'other')}: {'; '.join([*said, *mixed])}; {_basis(seeds)}."
    )


class Likeness(NamedTuple):
    """How like the subject pictures of one category are, beside the category where most so."""

    category: str
    value: float
    """Its identity."""
    outcome: str
    """How it stands to the other category."""


def compare_likeness(groups: Sequence[Mapping[str, Score]]) -> tuple[str, tuple[Likeness, ...]]:
    """Compare the identity of each category with that of the highest.

    Different prompts make no pairs, so intervals must lie apart; over several training seeds they
    must do so in each. The highest is the highest by chance too, so that a category that is near
    it is not told from it.

    Args:
        groups: For each training seed, identity by category.

    Returns:
        The category with the highest identity, and all others in order; an empty name and none
        where fewer than two have one.
    """
    shared = [name for name in groups[0] if all(one[name].measured for one in groups)]
    means = {name: mean_part([one[name] for one in groups]) or 0.0 for name in shared}
    if len(means) < 2:
        return "", ()
    top = max(means, key=lambda name: means[name])
    found = []
    for name, value in means.items():
        outcomes = {_tell_apart(one[top], one[name]) for one in groups}
        word = FEW if FEW in outcomes else WORSE if outcomes == {WORSE} else SAME
        found.append(Likeness(name, value, word))
    return top, tuple(one for one in found if one.category != top)


def _tell_apart(high: Score, low: Score) -> Outcome:
    """Say whether a score of other prompts is the lower one, as far as intervals can tell."""
    few = any(score.n is None or score.n < FEWEST_PAIRS for score in (high, low))
    if few or high.interval is None or low.interval is None:
        return FEW
    return WORSE if low.interval[1] < high.interval[0] else SAME


def answer_weak_spots(
    contrasts: Mapping[str, Contrast],
    likeness: tuple[str, Sequence[Likeness]],
    seeds: int,
    decide_by: Sequence[str],
) -> str:
    """Say in which categories of prompts the adapter does badly.

    Args:
        contrasts: The adapter's pictures against the base model's, by category.
        likeness: From `compare_likeness`.
        seeds: How many training seeds there were.
        decide_by: Measures that decide, against the base model.
    """
    decisions = {name: contrast.decide(decide_by) for name, contrast in contrasts.items()}
    said = [
        f"in {_quote(name)} against the base model: {contrasts[name].describe(found.worse)}"
        for name, found in decisions.items()
        if found.worse
    ]
    few = [_quote(name) for name, found in decisions.items() if found.few]
    rest = [_quote(name) for name, found in decisions.items() if not found.worse and not found.few]
    if rest:
        measures = _list([label_of(name) for name in decide_by], "or")
        said.append(f"in {_list(rest)} not found worse than the base model in {measures}")
    if few:
        said.append(f"{FEW} in {_list(few)} to tell from the base model")
    top, others = likeness
    for word, phrase in ((WORSE, "worse than"), (SAME, f"{SAME} to"), (FEW, f"{FEW} to tell from")):
        names = [f"{_quote(o.category)} ({o.value:.3f})" for o in others if o.outcome == word]
        if names:
            said.append(f"in Identity {phrase} {_quote(top)}: {_list(names)}")
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}; {_basis(seeds)}."


def _basis(seeds: int) -> str:
    """Say what an answer may be taken for."""
    if seeds == 1:
        return "one training seed, so this is about these adapters and not about the settings"
    if seeds == 2:
        return "two training seeds, which is fewer than the three that settings need"
    return f"{seeds} training seeds"


def _quote(name: str) -> str:
    return f"“{name}”"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _list(names: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
