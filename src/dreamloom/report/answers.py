"""The page's questions, each answered from the set that it is about, beside that set's own base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dreamloom.core.errors import EvaluationError
from dreamloom.core.manifests import SetRole
from dreamloom.evaluation.compare import (
    Comparison,
    compare_cards,
    read_floor,
    tell_basis,
    tell_comparison,
    tell_outcome,
)
from dreamloom.evaluation.metrics.measures import label_of
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.report.story import Story, label_set, order_of
from dreamloom.report.verdicts import (
    Change,
    Named,
    Verdict,
    judge_change,
    judge_following,
    judge_likeness,
    refuse_verdict,
    tell,
)

ASKED_OF_CLASS_IMAGES = ("identity", "clip_t", "leakage")
"""What the question about class images asks: p is corrected for these, not for every score."""

_RANK = {"subject without class images": 0, "subject": 1, "subject with class images": 2}


@dataclass(frozen=True)
class Headline:
    """The main result of a folder, in one number."""

    name: str
    """The set that it is of."""
    score: Score
    prompts: int
    subject: str
    role: SetRole

    def tell_what(self) -> str:
        """Say what the number is of."""
        drawn = f"set “{label_set(self.name)}”"
        if self.role != "subject":
            drawn = f"drawn by the adapter taught {self.role.removeprefix('subject ')}"
        if not self.prompts:
            return f"identity, {drawn}"
        prompts = f"{self.prompts} prompt{'' if self.prompts == 1 else 's'}"
        return f"identity of {self.score.n} pictures of {prompts} of {self.subject}, {drawn}"


def find_headline(story: Story) -> Headline | None:
    """Find the main result: the identity of the set with most prompts of the subject."""
    name = pick_set(story, "identity")
    if name is None:
        return None
    score, card = story.scores()[name]["identity"], story.cards.get(name)
    # Of prompts that ask for other looks no likeness is told.
    own = {p.prompt for p in card.pictures if p.role == "subject" and p.prompt} if card else set()
    prompts = len(own)
    return Headline(name, score, prompts, story.subject, story.place(name).role)


def pick_set(story: Story, measure: str) -> str | None:
    """Pick the set that a question about the subject is about.

    It is the one with most prompts of the subject, among what the subject's adapters drew; of
    equals the one that was taught with class images, and then the last. Only where nothing else
    was scored, a set that was drawn beside a merge or for the table speaks.
    """
    scores = story.scores()
    measured = [
        name
        for name in scores
        if story.place(name).is_subject and scores[name].get(measure, Score()).measured
    ]

    def weigh(name: str) -> tuple[bool, int, int, tuple[int, str]]:
        place = story.place(name)
        prompts = len(_prompts_of_subject(story, name))
        return place.purpose == "main", prompts, _RANK.get(place.role, 1), order_of(name)

    return max(measured, key=weigh, default=None)


def _prompts_of_subject(story: Story, name: str) -> frozenset[str]:
    card = story.cards.get(name)
    if card is None:
        return frozenset()
    return frozenset(
        p.prompt for p in card.pictures if p.role in ("subject", "altered") and p.prompt
    )


def list_verdicts(story: Story) -> list[Verdict]:
    """Ask and answer the page's questions."""
    verdicts = [v for v in (_tell_study(story),) if v]
    if verdicts and not story.scores():
        return verdicts
    verdicts += [
        _judge_likeness(
            story, f"Is it the {story.class_noun}?", pick_set(story, "identity"), _drawn(story)
        ),
        _judge_following(story, pick_set(story, "clip_t")),
    ]
    if (prior := _judge_prior(story)) is not None:
        verdicts.append(prior)
    merged = [n for n in story.scores() if story.place(n).role == "merged"]
    if merged:
        named = max(merged, key=lambda n: (len(_prompts_of_subject(story, n)), order_of(n)))
        verdicts.append(
            _judge_likeness(
                story, f"Is the {story.class_noun} still there after the merge?", named, merged
            )
        )
    return verdicts


def _tell_study(story: Story) -> Verdict | None:
    """Repeat a study's question and its answer."""
    question, answer = story.study.get("question"), story.study.get("answer")
    if not answer:
        return None
    notes = story.study.get("notes")
    told = [f"{note}" for note in notes] if isinstance(notes, list) else []
    rows = story.study.get("comparisons")
    for row in rows if isinstance(rows, list) else []:
        try:
            found = [tell_comparison(Comparison.model_validate(one)) for one in row["measures"]]
            told.append(f"“{row['second']}” against “{row['first']}”: {' '.join(found)}")
        except (KeyError, TypeError, ValueError):
            continue
    asked = str(question or "What did the study find?")
    return Verdict(asked, str(answer), "same", sentences=tuple(told))


def _drawn(story: Story) -> list[str]:
    return [name for name in story.scores() if story.place(name).is_subject]


def _judge_likeness(
    story: Story, question: str, name: str | None, others: Sequence[str]
) -> Verdict:
    beside = _stand_beside(story, name, others, "identity")
    change, base = _compare_with_base(story, name, "identity")
    own = story.scores().get(base, {}).get("identity") if base else None
    return judge_likeness(
        question,
        _named(story, beside, "identity"),
        change,
        own,
        doubt=_doubt(story, name),
        call=_write_call(base, name, ["identity"]),
    )


def _judge_following(story: Story, name: str | None) -> Verdict:
    beside = _stand_beside(story, name, _drawn(story), "clip_t")
    change, base = _compare_with_base(story, name, "clip_t")
    own = story.scores().get(base, {}).get("clip_t") if base else None
    if own is None and name in story.cards:
        own = story.cards[name].floors.get("clip_t")
    return judge_following(
        "Does it follow the prompts?",
        _named(story, beside, "clip_t"),
        change,
        own,
        doubt=_doubt(story, name),
        call=_write_call(base, name, ["clip_t"]),
    )


def _judge_prior(story: Story) -> Verdict | None:
    """Compare the adapters that were taught without and with class images, if there are both."""
    question = "What did prior preservation change?"
    sides = [_pick_role(story, f"subject {how} class images") for how in ("without", "with")]
    first, second = sides
    if first is None or second is None:
        if story.is_single or story.study:
            return None
        needed = "That needs scores of one adapter taught without and one with class images."
        return Verdict(question, "Not measured", sentences=(needed,))
    if _doubt(story, first) or _doubt(story, second):
        return refuse_verdict(question)
    changes = list_changes(story, first, second, ASKED_OF_CLASS_IMAGES)
    return judge_change(
        question,
        changes,
        words=("without", "with"),
        caution="Each was trained once: this compares these two adapters, not the method.",
        call=_write_call(first, second, [change.measure for change in changes]),
    )


def _pick_role(story: Story, role: str) -> str | None:
    found = [n for n in story.scores() if story.place(n) == (role, "main")]
    return max(found, key=lambda n: len(_prompts_of_subject(story, n)), default=None)


def _stand_beside(story: Story, name: str | None, others: Sequence[str], measure: str) -> list[str]:
    """List the sets that may share an axis with one: those of the very same prompts, it last."""
    if name is None:
        return [*others]
    scores, own = story.scores(), _prompts_of_subject(story, name)
    beside = [
        other
        for other in others
        if other != name
        and _prompts_of_subject(story, other) == own
        and scores[other].get(measure, Score()).measured
        and not _doubt(story, other)
    ]
    return [*beside, name]


def _named(story: Story, sets: Sequence[str], measure: str) -> list[Named]:
    scores: Mapping[str, Mapping[str, Score]] = story.scores()
    return [(label_set(s), story.place(s).kind, scores[s].get(measure, Score())) for s in sets]


def _doubt(story: Story, name: str | None) -> str:
    """Say why a set's scores mean nothing; empty if they do."""
    card = story.cards.get(name) if name else None
    return (card.warning or "") if card else ""


def _compare_with_base(
    story: Story, name: str | None, measure: str
) -> tuple[Comparison | None, str]:
    """Compare a set with the base model's pictures of the same prompts and seeds.

    These are a scored set of their own, or else what the set's scorecard keeps of its floor.

    Returns:
        What was compared of the most pictures, None where nothing could be; and the base model's
        set, empty where the floor spoke.
    """
    card = story.cards.get(name) if name else None
    if card is None:
        return None, ""
    bases: dict[str, Scorecard | None] = {
        other: base
        for other, base in story.cards.items()
        if story.place(other).role == "base" and story.place(other).purpose != "table"
    }
    found: list[tuple[Comparison, str]] = []
    for other, base in {**bases, "": read_floor(card)}.items():
        if base is not None:
            try:
                found += [(one, other) for one in compare_cards(base, card, [measure])]
            except EvaluationError:
                continue  # of other prompts, or by other encoders
    return max(found, key=lambda one: (one[0].pairs, one[1] != ""), default=(None, ""))


def _write_call(first: str, second: str | None, measures: Sequence[str]) -> str:
    """Write the command that compares the same; empty where a side is no set of its own."""
    if not first or not second or not measures:
        return ""
    sides = [
        f"RUN:{n}" if "/" not in n else "RUN/{}:{}".format(*n.split("/", 1))
        for n in (first, second)
    ]
    return " ".join(["dreamloom compare", *sides, *(f"--score {name}" for name in measures)])


def list_changes(story: Story, first: str, second: str, asked: Sequence[str] = ()) -> list[Change]:
    """Compare two sets picture by picture, as far as both have a scorecard.

    Args:
        story: The folder, read.
        first: The set before the change.
        second: The one after it.
        asked: The scores that the question is about; nothing asks about all.
    """
    before, after = (story.cards.get(name) for name in (first, second))
    if before is None or after is None:
        return []
    measured = [n for n in asked if all(c.scores.get(n, Score()).measured for c in (before, after))]
    if asked and not measured:
        return []
    try:
        compared = compare_cards(before, after, measured or None)
    except EvaluationError:
        return []
    return [
        Change(
            label_of(one.measure),
            tell_outcome(one),
            before.scores[one.measure],
            after.scores[one.measure],
            evidence=tell_basis(one),
            measure=one.measure,
        )
        for one in compared
        if one.measure in before.scores.keys() & after.scores.keys()
    ]


def tell_headline(story: Story) -> str:
    """Say the main result with what it is of; empty where it was not measured or means nothing."""
    found = find_headline(story)
    if found is None or _doubt(story, found.name):
        return ""
    return f"{tell(found.score)}: {found.tell_what()}"
