"""What scores say in plain words, and no more than that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Outcome: TypeAlias = Literal[
    "better", "worse", "no difference detected", "too few images", "not measured"
]

FEWEST = 8
"""With fewer pictures than this an interval means little, so nothing is concluded."""

LABELS = {
    "identity": "Identity",
    "verified": "Verified",
    "rank_1": "Rank 1",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "dinov2": "DINOv2",
    "clip_t": "CLIP-T",
    "prompt_found": "Prompt found",
    "variety": "Variety",
    "diversity": "Diversity (LPIPS)",
    "copy": "Copy",
    "copy_sscd": "Copy (SSCD)",
    "leakage": "Leakage",
    "pres": "PRES",
    "drift": "Drift",
    "identity_retention": "Subject kept",
    "style_retention": "Style kept",
}
"""Names of scores as a reader meets them, in the order in which they are shown."""

_MEANINGS = {
    "identity": "how much the subject is the one in the photos",
    "verified": "how many pictures would pass for the subject",
    "rank_1": "in how many the subject is nearer than all of the base model’s persons",
    "clip_i": "how alike whole pictures and photos are",
    "dino": "how alike pictures and photos are in detail",
    "dinov2": "the same, by a later encoder",
    "clip_t": "how well pictures fit their prompts",
    "prompt_found": "for how many no other prompt of the set fits better",
    "variety": "how much pictures of one prompt differ; more is not always better",
    "diversity": "how much they differ to the eye; more is not always better",
    "copy": "how closely pictures repeat a photo; less is better",
    "copy_sscd": "the same, by an encoder that knows repainted and cut copies; less is better",
    "leakage": "how much the class without the subject looks like it; less is better",
    "pres": "the same, by DINO; less is better",
    "drift": "how far pictures beside the subject have moved; less is better",
    "identity_retention": "how much of the subject a merge has kept",
    "style_retention": "how much of the style a merge has kept",
}


@dataclass(frozen=True)
class Figure:
    """One score as it lies in a file; what is absent there is None here."""

    value: float | None = None
    n: int | None = None
    interval: tuple[float, float] | None = None
    floor: float | None = None
    ceiling: float | None = None
    lift: float | None = None
    """Share of the way from the floor (0) to the ceiling (1)."""
    lift_interval: tuple[float, float] | None = None
    key: str = ""
    note: str = ""

    @property
    def measured(self) -> bool:
        """Whether there is a value at all."""
        return self.value is not None


def read_figure(data: object) -> Figure:
    """Read a score from JSON; anything that is no score counts as not measured."""
    if isinstance(data, bool):
        return Figure()
    if isinstance(data, int | float):
        return Figure(value=_number(data))
    if not isinstance(data, Mapping):
        return Figure()
    count = _number(data.get("n"))
    return Figure(
        value=_number(data.get("value")),
        n=None if count is None else int(count),
        interval=_pair(data.get("interval")),
        floor=_number(data.get("floor")),
        ceiling=_number(data.get("ceiling")),
        lift=_number(data.get("lift")),
        lift_interval=_pair(data.get("lift_interval")),
        key=str(data.get("key") or ""),
        note=str(data.get("note") or ""),
    )


def _number(data: Any) -> float | None:
    """Read a finite number; a score's own value may be nested where a floor is a score itself."""
    if isinstance(data, Mapping):
        data = data.get("value")
    if isinstance(data, bool) or not isinstance(data, int | float):
        return None
    return float(data) if abs(data) < float("inf") else None


def _pair(data: Any) -> tuple[float, float] | None:
    if not isinstance(data, Sequence) or isinstance(data, str) or len(data) != 2:
        return None
    low, high = _number(data[0]), _number(data[1])
    return None if low is None or high is None else (low, high)


def label_of(name: str) -> str:
    """The name of a score as a reader meets it."""
    return LABELS.get(name, name.replace("_", " ").capitalize())


def meaning_of(name: str) -> str:
    """Say in a few words what a score looks at; empty for one that is not known here."""
    return _MEANINGS.get(name, "")


def is_few(figure: Figure) -> bool:
    """Say whether a score rests on too few pictures, or has no interval, to conclude from."""
    return figure.interval is None or figure.n is None or figure.n < FEWEST


def compare(first: Figure, second: Figure) -> Outcome:
    """Say what changed from the first score to the second; higher counts as better.

    Intervals that overlap tell nothing apart. Scores of different encoders are not compared.
    """
    if not first.measured or not second.measured or first.key != second.key:
        return "not measured"
    if is_few(first) or is_few(second) or first.interval is None or second.interval is None:
        return "too few images"
    if second.interval[0] > first.interval[1]:
        return "better"
    if second.interval[1] < first.interval[0]:
        return "worse"
    return "no difference detected"


def against_floor(figure: Figure) -> Outcome:
    """Say how a score stands to its floor: by the lift's own interval where there is one."""
    if not figure.measured or figure.floor is None:
        return "not measured"
    if is_few(figure) or figure.interval is None:
        return "too few images"
    low, high = figure.lift_interval or (
        figure.interval[0] - figure.floor,
        figure.interval[1] - figure.floor,
    )
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference detected"


def indistinct_from_best(figures: Sequence[Figure]) -> tuple[int | None, list[bool]]:
    """Find the highest score and mark the others whose intervals overlap the best one's.

    Returns:
        The best one's index, None if nothing was measured; and for each score whether it cannot
        be told apart from the best. The best itself is not marked.
    """
    known = [(figure.value, -i) for i, figure in enumerate(figures) if figure.value is not None]
    if not known:
        return None, [False] * len(figures)
    best = -max(known)[1]
    top = figures[best].interval
    marks = []
    for index, figure in enumerate(figures):
        if index == best or not figure.measured:
            marks.append(False)
        elif top is None or figure.interval is None:
            marks.append(True)
        else:
            marks.append(figure.interval[1] >= top[0])
    return best, marks


def tell(figure: Figure) -> str:
    """Write a score with what belongs to it: ``0.612 (0.580 to 0.645, n = 32)``."""
    if figure.value is None:
        return "not measured"
    details = []
    if figure.interval is not None:
        details.append(f"{figure.interval[0]:.3f} to {figure.interval[1]:.3f}")
    if figure.n is not None:
        details.append(f"n = {figure.n}")
    return f"{figure.value:.3f}" + (f" ({', '.join(details)})" if details else "")


@dataclass(frozen=True)
class Change:
    """One score on two sides of a change."""

    label: str
    outcome: str
    """As `comparisons.Comparison` has it."""
    first: Figure
    second: Figure
    evidence: str = ""
    """What the outcome rests on, in words."""


@dataclass(frozen=True)
class Verdict:
    """An answer at the top of the page."""

    question: str
    answer: str
    tone: Literal["good", "bad", "same", "unknown"]
    changes: tuple[Change, ...] = ()
    words: tuple[str, str] = ("", "")
    """How the two sides of the changes are called."""
    sentences: tuple[str, ...] = ()
    bars: tuple[tuple[str, str, Figure], ...] = ()
    """Label, kind and score of each bar."""


def _tone(outcome: Outcome) -> Literal["good", "bad", "same", "unknown"]:
    if outcome == "better":
        return "good"
    if outcome == "worse":
        return "bad"
    return "same" if outcome == "no difference detected" else "unknown"


Named: TypeAlias = tuple[str, str, Figure]
"""Label, kind and score of one contender."""


def judge_likeness(question: str, contenders: Sequence[Named]) -> Verdict:
    """Answer whether the pictures show the subject; the last contender gives the answer."""
    measured = [named for named in contenders if named[2].measured]
    if not measured:
        return _unmeasured(question, "identity", contenders)
    label, _, figure = measured[-1]
    outcome = against_floor(figure)
    answer = {
        "better": "Yes, more than the base model’s",
        "worse": "Less than the base model’s",
        "no difference detected": "No difference from the base model detected",
        "too few images": "Too few images to say",
        "not measured": "Measured, but without a floor to compare with",
    }[outcome]
    sentences = [f"{label[0].upper() + label[1:]}: {tell(figure)}."]
    if figure.floor is not None and figure.ceiling is not None:
        sentences.append(
            f"On this scale the base model without an adapter has {figure.floor:.3f} and the "
            f"photos among themselves {figure.ceiling:.3f}."
        )
    if outcome == "better" and figure.interval and figure.ceiling is not None:
        if figure.interval[1] >= figure.ceiling:
            answer = "Yes, as alike as the photos are to each other"
        elif figure.lift is not None:
            answer = f"{figure.lift:.0%} of the way from the base model to the photos"
    return Verdict(
        question, answer, _tone(outcome), sentences=tuple(sentences), bars=tuple(measured)
    )


def judge_following(
    question: str, contenders: Sequence[Named], base: Figure | None = None
) -> Verdict:
    """Answer whether pictures fit their prompts, against the base model's own pictures."""
    measured = [named for named in contenders if named[2].measured]
    if not measured:
        return _unmeasured(question, "prompt following", contenders)
    label, _, figure = measured[-1]
    outcome: Outcome = (
        compare(base, figure) if base is not None and base.measured else against_floor(figure)
    )
    answer = {
        "better": "Better than the base model",
        "worse": "Worse than the base model",
        "no difference detected": "No difference from the base model detected",
        "too few images": "Too few images to say",
        "not measured": "Measured, but not against the base model",
    }[outcome]
    sentences = [f"{label[0].upper() + label[1:]}: {tell(figure)}."]
    if base is not None and base.measured:
        sentences.append(f"The base model with the same prompts and seeds: {tell(base)}.")
    bars = [("base model", "base", base)] if base is not None and base.measured else []
    return Verdict(
        question, answer, _tone(outcome), sentences=tuple(sentences), bars=(*bars, *measured)
    )


def judge_change(
    question: str,
    changes: Sequence[Change],
    *,
    words: tuple[str, str],
    caution: str,
) -> Verdict:
    """Answer what a change of settings did to each score that both sides have.

    Args:
        question: As the page asks it.
        changes: What became of each score; "higher" and "lower" are neither good nor bad.
        words: How the two sides are called in a sentence.
        caution: What the comparison does not show.
    """
    measured = [change for change in changes if change.outcome != "not measured"]
    if not measured:
        told = "No score of both sides could be compared."
        return Verdict(question, "Not measured", "unknown", sentences=(told,))
    by_outcome: dict[str, list[str]] = {}
    for change in measured:
        by_outcome.setdefault(change.outcome, []).append(change.label)
    parts = [
        f"{outcome} in {_listed(by_outcome[outcome])}"
        for outcome in ("better", "worse", "higher", "lower")
        if outcome in by_outcome
    ]
    tone: Outcome = "no difference detected"
    if ("better" in by_outcome) != ("worse" in by_outcome):
        tone = "better" if "better" in by_outcome else "worse"
    if not parts:
        few = "no difference detected" not in by_outcome
        tone = "too few images" if few else tone
        parts.append("too few images to say" if few else "no difference detected")
    answer = "; ".join(parts)
    return Verdict(
        question,
        answer[0].upper() + answer[1:],
        _tone(tone),
        changes=tuple(changes),
        words=words,
        sentences=(caution,),
    )


def _unmeasured(question: str, what: str, contenders: Sequence[Named]) -> Verdict:
    notes = [figure.note for _, _, figure in contenders if figure.note]
    reason = notes[0] if notes else f"There is no score for {what} in this folder."
    return Verdict(question, "Not measured", "unknown", sentences=(reason,))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass(frozen=True)
class CheckpointCandidate:
    """An adapter from within a training, and what was measured of it."""

    update: int
    identity_lift: float | None
    clip_t: float | None
    clip_t_floor: float | None
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """Which adapter to take, and why."""

    update: int
    why: str


_CLOSE = 0.02
"""Merits that differ by less are taken for equal: a look has few pictures."""


def recommend_checkpoint(candidates: Sequence[CheckpointCandidate]) -> Recommendation | None:
    """Choose the adapter that is most like the subject and still follows its prompts.

    Merit is the harmonic mean of the identity's lift and of the share of the untaught model's
    CLIP-T that is left, both between 0 and 1, so that neither can make up for the loss of the
    other. Of nearly equal ones the earliest is taken: it has forgotten least. One with an alarm
    is taken only if every one has some.

    Returns:
        None if nothing was measured that could tell them apart.
    """
    measured = [(candidate, _merit(candidate)) for candidate in candidates]
    known = [(candidate, merit) for candidate, merit in measured if merit is not None]
    quiet = [(candidate, merit) for candidate, merit in known if not candidate.alarms]
    if not known:
        return None
    best = max(merit for _, merit in quiet or known)
    chosen, merit = next((c, m) for c, m in quiet or known if m >= best - _CLOSE)
    told = [f"identity lift {chosen.identity_lift:.2f}"]
    if chosen.clip_t is not None and chosen.clip_t_floor is not None:
        told.append(f"CLIP-T {chosen.clip_t:.3f} (untaught {chosen.clip_t_floor:.3f})")
    why = f"{', '.join(told)}; merit {merit:.2f}, the best is {best:.2f}"
    if not quiet:
        why += "; every look raised an alarm"
    return Recommendation(chosen.update, why)


def _merit(candidate: CheckpointCandidate) -> float | None:
    if candidate.identity_lift is None:
        return None
    likeness = min(1.0, max(0.0, candidate.identity_lift))
    if candidate.clip_t is None or not candidate.clip_t_floor or candidate.clip_t_floor <= 0:
        return likeness
    obedience = min(1.0, max(0.0, candidate.clip_t / candidate.clip_t_floor))
    return 2 * likeness * obedience / (likeness + obedience) if likeness + obedience else 0.0
