"""What scores say in plain words, and no more than that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from dreamloom.evaluation.compare import Comparison, tell_basis, tell_outcome
from dreamloom.evaluation.metrics.scorecard import Score

EQUIVALENCE_MARGIN = 0.1
"""How far below the photos' own likeness counts as alike: a share of the way from the floor."""


def indistinct_from_best(scores: Sequence[Score]) -> tuple[int | None, list[bool]]:
    """Find the highest score and mark the others whose intervals overlap the best one's.

    Returns:
        The best one's index, None if nothing was measured; and for each score whether it cannot
        be told apart from the best. The best itself is not marked.
    """
    known = [(score.value, -i) for i, score in enumerate(scores) if score.value is not None]
    if not known:
        return None, [False] * len(scores)
    best = -max(known)[1]
    top = scores[best].interval
    return best, [
        index != best
        and score.measured
        and (top is None or score.interval is None or score.interval[1] >= top[0])
        for index, score in enumerate(scores)
    ]


def tell(score: Score) -> str:
    """Write a score with what belongs to it: ``0.612 (0.580 to 0.645, n = 32)``."""
    if score.value is None:
        return "not measured"
    details = []
    if score.interval is not None:
        details.append(f"{score.interval[0]:.3f} to {score.interval[1]:.3f}")
    if score.n is not None:
        details.append(f"n = {score.n}")
    return f"{score.value:.3f}" + (f" ({', '.join(details)})" if details else "")


@dataclass(frozen=True)
class Change:
    """One score on two sides of a change."""

    label: str
    outcome: str
    """As `tell_outcome` says it."""
    first: Score
    second: Score
    evidence: str = ""
    """What the outcome rests on, in words."""
    measure: str = ""
    """The score's name in records."""


Tone: TypeAlias = Literal["good", "bad", "same", "unknown"]

Named: TypeAlias = tuple[str, str, Score]
"""Label, kind and score of one contender."""


@dataclass(frozen=True)
class Verdict:
    """An answer at the top of the page."""

    question: str
    answer: str
    tone: Tone = "unknown"
    changes: tuple[Change, ...] = ()
    words: tuple[str, str] = ("", "")
    """How the two sides of the changes are called."""
    sentences: tuple[str, ...] = ()
    bars: tuple[Named, ...] = ()
    """The scores that are drawn."""
    call: str = ""
    """The command that compares the same; empty where there is none."""


_TONES: dict[str, Tone] = {"better": "good", "worse": "bad", "no difference detected": "same"}


def judge_likeness(
    question: str,
    contenders: Sequence[Named],
    change: Comparison | None,
    base: Score | None = None,
    *,
    doubt: str = "",
    call: str = "",
) -> Verdict:
    """Answer whether the pictures show the subject; the last contender gives the answer.

    That pictures are as alike as the photos is an equivalence: the whole interval must lie above
    the photos' own likeness less a margin, so that fewer pictures make a weaker claim.

    Args:
        question: As the page asks it.
        contenders: Sets of pictures of the same prompts, with their likeness.
        change: From the base model's pictures of the same prompts and seeds to the last
            contender's; None where the two were not compared.
        base: The likeness of the base model's pictures of these prompts, to be told beside.
        doubt: Why the scores mean nothing; empty if they do mean something.
        call: The command that compares the same.
    """
    verdict = _judge_last(question, "identity", contenders, change, doubt, call)
    score = verdict.bars[-1][2] if verdict.bars else Score()
    sentences, answer, tone = list(verdict.sentences), verdict.answer, verdict.tone
    least = None
    if score.floor is not None and score.ceiling is not None:
        least = score.ceiling - EQUIVALENCE_MARGIN * (score.ceiling - score.floor)
        sentences.insert(1, _tell_scale(score, base, least))
    if tone == "good":
        answer = "Yes, more than the base model’s"
        # The floor may be strangers, who are nearer to the photos than the pictures' partners.
        if score.lift_interval is not None and score.lift_interval[0] <= 0:
            answer, tone = "No difference from the base model detected", "same"
        elif score.interval and least is not None and score.interval[0] > least:
            answer = "Yes, as alike as the photos are to each other"
        elif score.ceiling is not None and score.lift is not None:
            answer = f"{score.lift:.0%} of the way from the base model to the photos"
    elif tone == "bad":
        answer = "Less than the base model’s"
    return replace(verdict, answer=answer, tone=tone, sentences=tuple(sentences))


def _tell_scale(score: Score, base: Score | None, least: float) -> str:
    """Say what the ends of the scale are, and from where on two likenesses count as one."""
    assert score.floor is not None
    assert score.ceiling is not None
    strangers = is_from_strangers(score)
    who = "anybody whom the base model draws of the class" if strangers else "the base model"
    own = ""
    if strangers and base is not None and base.value is not None:
        own = f", its own pictures of these prompts {base.value:.3f}"
    return (
        f"On this scale {who} has {score.floor:.3f}{own} and the photos among themselves "
        f"{score.ceiling:.3f}. Pictures count as alike as the photos where the whole interval "
        f"lies above {least:.3f}, a tenth of the way below them.".replace("-", "−")
    )


def is_from_strangers(score: Score) -> bool:
    """Say whether the floor of a likeness is anybody of the class, not the pictures' partners."""
    return "anybody of the class" in score.note


def judge_following(
    question: str,
    contenders: Sequence[Named],
    change: Comparison | None,
    base: Score | None = None,
    *,
    doubt: str = "",
    call: str = "",
) -> Verdict:
    """Answer whether pictures fit their prompts, against the base model's own pictures.

    Args:
        question: As the page asks it.
        contenders: Sets of pictures of the same prompts; the last one gives the answer.
        change: As for `judge_likeness`.
        base: The base model's own score for these prompts, to be shown beside them.
        doubt: As for `judge_likeness`.
        call: Likewise.
    """
    verdict = _judge_last(question, "prompt following", contenders, change, doubt, call)
    if not verdict.bars or base is None or not base.measured:
        return verdict
    first, *others = verdict.sentences
    told = f"The base model with the same prompts and seeds: {tell(base)}."
    return replace(
        verdict,
        sentences=(first, told, *others),
        bars=(("base model", "base", base), *verdict.bars),
    )


def _judge_last(
    question: str,
    what: str,
    contenders: Sequence[Named],
    change: Comparison | None,
    doubt: str,
    call: str,
) -> Verdict:
    """Say of the last contender that was measured how it stands to the base model."""
    measured = [named for named in contenders if named[2].measured]
    if not measured:
        notes = [score.reason for _, _, score in contenders if score.reason]
        reason = notes[0] if notes else f"There is no score for {what} in this folder."
        return Verdict(question, "Not measured", sentences=(say_reason(reason),))
    if doubt:
        return refuse_verdict(question)
    label, _, score = measured[-1]
    outcome = tell_outcome(change) if change else "not measured"
    answer = {
        "better": "Better than the base model",
        "worse": "Worse than the base model",
        "no difference detected": "No difference from the base model detected",
        "too few images": "Too few images to say",
        "too few prompts": "Cannot be told from so few prompts",
        "too few seeds": "Cannot be told from so few seeds",
    }.get(outcome, "Measured; whether it differs from the base model cannot be told")
    sentences = [f"{label[0].upper() + label[1:]}: {tell(score)}."]
    if change is None:
        sentences.append(
            "To compare it with the base model takes scores of both, of pictures of the same "
            "prompts and seeds."
        )
    elif basis := tell_basis(change):
        sentences.append(f"Compared with the base model picture by picture: {basis}.")
    tone = _TONES.get(outcome, "unknown")
    return Verdict(
        question, answer, tone, sentences=tuple(sentences), bars=tuple(measured), call=call
    )


def refuse_verdict(question: str) -> Verdict:
    """Answer nothing where the scores mean nothing; a warning says why."""
    told = "The warning below says why; no figure of these pictures answers this."
    return Verdict(question, "Cannot be told: the scores mean nothing", sentences=(told,))


def say_reason(reason: str) -> str:
    """Make a sentence of why a score was not measured."""
    return f"{reason[:1].upper()}{reason[1:]}" + ("" if reason.endswith((".", "!", "?")) else ".")


def judge_change(
    question: str,
    changes: Sequence[Change],
    *,
    words: tuple[str, str],
    caution: str,
    call: str = "",
) -> Verdict:
    """Answer what a change of settings did to each score that both sides have.

    Args:
        question: As the page asks it.
        changes: What became of each score; "higher" and "lower" are neither good nor bad.
        words: How the two sides are called in a sentence.
        caution: What the comparison does not show.
        call: The command that compares the same.
    """
    by_outcome: dict[str, list[str]] = {}
    for change in changes:
        if change.outcome != "not measured":
            by_outcome.setdefault(change.outcome, []).append(change.label)
    if not by_outcome:
        return Verdict(
            question, "Not measured", sentences=("No score of both sides could be compared.",)
        )
    parts = []
    for outcome in ("better", "worse", "higher", "lower"):
        if labels := by_outcome.get(outcome):
            listed = [", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels
            parts.append(f"{outcome} in {' and '.join(listed)}")
    tone: Tone = "same"
    if ("better" in by_outcome) != ("worse" in by_outcome):
        tone = "good" if "better" in by_outcome else "bad"
    if not parts and "no difference detected" in by_outcome:
        parts = ["no difference detected"]
    elif not parts:
        few = next((o for o in by_outcome if o in {"too few prompts", "too few seeds"}), "")
        told = few.replace("too few", "cannot be told from so few") or "too few images to say"
        tone, parts = "unknown", [told]
    answer = "; ".join(parts)
    return Verdict(
        question,
        answer[0].upper() + answer[1:],
        tone,
        changes=tuple(changes),
        words=words,
        sentences=(caution,),
        call=call,
    )
