"""What a study found: every arm's measures, every comparison, and the answer, as file and page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreamloom.evaluation.compare import Comparison, compare_settings, tell_comparison
from dreamloom.evaluation.metrics.measures import MEASURE, label_of
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.evaluation.stats.intervals import mean_over_runs
from dreamloom.experiments.study.answers import (
    UNMEASURED,
    Contrast,
    answer_choose,
    answer_compare,
    answer_plateau,
    answer_weak_spots,
    choose_arm,
    compare_likeness,
    correct_together,
    mean_part,
)
from dreamloom.experiments.study.question import Study

BASE_MODEL = "base model"


@dataclass(frozen=True)
class ArmFindings:
    """What was measured of one arm.

    Args:
        name: The arm.
        cards: Its scorecards on the seeds that are reported, one for each training seed.
        runs: Folders of its trainings, within the study's.
        pictures: Folders of its reported pictures, within the study's.
        seconds_per_picture: How long drawing one took, on average.
        choosing: Its scorecards on the seeds that are set apart for choosing.
    """

    name: str
    cards: tuple[Scorecard, ...]
    runs: tuple[str, ...]
    pictures: tuple[str, ...]
    seconds_per_picture: float
    choosing: tuple[Scorecard, ...] = ()

    def measures(self) -> dict[str, Score]:
        """Each measure over all training seeds."""
        names = dict.fromkeys(name for card in self.cards for name in card.scores)
        return {
            name: join_scores(
                [card.scores[name] for card in self.cards if name in card.scores],
                is_share=name in MEASURE and MEASURE[name].is_share,
            )
            for name in names
        }


@dataclass(frozen=True)
class StudyFindings:
    """Everything that a study found.

    Args:
        study: What was asked.
        arms: What was measured of each arm.
        contrasts: What was compared.
        answer: One sentence with its evidence.
        chosen: The arm that was chosen, where the question was which.
        categories: For weak spots, what was compared within each category of prompts.
        notes: What a reader must know to believe no more than was shown.
    """

    study: Study
    arms: tuple[ArmFindings, ...]
    contrasts: tuple[Contrast, ...]
    answer: str
    chosen: str | None = None
    categories: Mapping[str, Contrast] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_answer(
    study: Study,
    arms: tuple[ArmFindings, ...],
    below: tuple[Scorecard, ...],
    exposures: Mapping[str, int],
) -> StudyFindings:
    """Compare the arms as the study asks, and answer its question.

    Args:
        study: What was asked.
        arms: What was measured of each arm.
        below: For weak spots, the base model's own scorecards.
        exposures: How many photos each arm sees in one training.
    """
    names, seeds = study.decide_by, len(study.train_seeds)
    chosen, categories = None, {}
    contrasts: list[Contrast] = []
    unmeasured = _explain_unmeasured(arms, names)
    if unmeasured:
        answer = unmeasured
    elif study.answer == "compare":
        contrasts = contrast_arms([(arms[0], arm) for arm in arms[1:]], names)
        answer = answer_compare(contrasts, seeds, names)
    elif study.answer == "plateau":
        contrasts = contrast_arms([(arms[-1], arm) for arm in arms[:-1]], names)
        answer = answer_plateau(contrasts, seeds, names)
    elif study.answer == "choose":
        best = arms[choose_arm([arm.choosing for arm in arms], names)]
        contrasts = contrast_arms([(arm, best) for arm in arms if arm is not best], names)
        split = len(_list_seeds(best.choosing)), len(_list_seeds(best.cards))
        chosen, answer = best.name, answer_choose(best.name, contrasts, seeds, names, split)
    else:
        categories = contrast_categories(arms[0], below, names)
        likeness = compare_likeness([_read_identity(card) for card in arms[0].cards])
        answer = answer_weak_spots(categories, likeness, seeds, names)
    return StudyFindings(
        study,
        arms,
        tuple(contrasts),
        answer,
        chosen,
        categories,
        tuple(_list_notes(study, arms, exposures)),
    )


def contrast_arms(
    pairs: Sequence[tuple[ArmFindings, ArmFindings]], measures: Sequence[str]
) -> list[Contrast]:
    """Compare pairs of arms on what both drew, and correct for all of them together."""
    return correct_together(
        [
            Contrast(first.name, second.name, compare(first.cards, second.cards, measures))
            for first, second in pairs
        ]
    )


def contrast_categories(
    arm: ArmFindings, below: Sequence[Scorecard], measures: Sequence[str]
) -> dict[str, Contrast]:
    """Compare an arm with the base model within each category of prompts.

    Args:
        arm: The arm.
        below: The base model's scorecards of the same prompts and seeds.
        measures: What is compared.
    """
    pictures = [one for card in arm.cards for one in card.pictures]
    measured = {one.category for one in pictures if one.values.keys() & set(measures)}
    named = dict.fromkeys(one.category for one in pictures)
    kinds = [kind for kind in named if kind and kind in measured]
    contrasts = []
    for kind in kinds:
        own, base = _select_category(arm.cards, kind), _select_category(below, kind)
        contrasts.append(Contrast(BASE_MODEL, arm.name, compare(base, own, measures)))
    return dict(zip(kinds, correct_together(contrasts), strict=True))


def _select_category(cards: Sequence[Scorecard], category: str) -> list[Scorecard]:
    return [
        card.model_copy(
            update={"pictures": tuple(one for one in card.pictures if one.category == category)}
        )
        for card in cards
    ]


def compare(
    first: Sequence[Scorecard], second: Sequence[Scorecard], measures: Sequence[str]
) -> tuple[Comparison, ...]:
    """Compare two arms, each with one scorecard for each training seed.

    Args:
        first: Those of the arm that is compared with.
        second: Those of the other arm, in the same order of seeds.
        measures: What is compared.

    Returns:
        One comparison for each measure, in order; also for those that nobody could measure.
    """
    cards = [*first, *second]
    known = [name for name in measures if any(_is_measured(card, name) for card in cards)]
    found = {name: Comparison(measure=name, outcome=UNMEASURED) for name in measures}
    if known:
        compared = compare_settings(_drop_samplers(first), _drop_samplers(second), known)
        found |= {one.measure: one for one in compared}
    return tuple(found[name] for name in measures)


def _is_measured(card: Scorecard, name: str) -> bool:
    return name in card.scores and card.scores[name].value is not None


def _drop_samplers(cards: Sequence[Scorecard]) -> list[Scorecard]:
    """Let pictures make pairs by prompt and seed alone: an arm has one sampler, which may be it."""
    return [
        card.model_copy(
            update={
                "pictures": tuple(
                    picture.model_copy(update={"scheduler": None, "steps": None})
                    for picture in card.pictures
                )
            }
        )
        for card in cards
    ]


def _read_identity(card: Scorecard) -> dict[str, Score]:
    return {
        group.category: group.scores["identity"]
        for group in card.by_category
        if group.category and "identity" in group.scores
    }


def _list_seeds(cards: Sequence[Scorecard]) -> list[int | None]:
    return list(dict.fromkeys(picture.seed for card in cards for picture in card.pictures))


def _explain_unmeasured(arms: Sequence[ArmFindings], names: Sequence[str]) -> str:
    """Say why none of the measures that decide was measured; empty if one was."""
    cards = [card for arm in arms for card in arm.cards]
    if any(_is_measured(card, name) for card in cards for name in names):
        return ""
    reasons = [card.scores[name].note for card in cards for name in names if name in card.scores]
    why = next((reason.removeprefix("not measured: ") for reason in reasons if reason), "")
    return f"Not measured{f': {why}' if why else ''}."


def _list_notes(
    study: Study, arms: Sequence[ArmFindings], exposures: Mapping[str, int]
) -> Iterable[str]:
    if study.preset == "quick":
        yield "The quick preset teaches and draws little: the standard one may answer otherwise."
    if len(set(exposures.values())) > 1:
        counts = ", ".join(f"{count} by “{name}”" for name, count in exposures.items())
        yield f"The arms saw photos unequally often, which may be the difference: {counts}."
    if not study.references:
        yield (
            "Pictures are scored against the photos that were taught, so a copy of one scores "
            "high; name photos of other moments under references to know better."
        )
    for warning in dict.fromkeys(card.warning for arm in arms for card in arm.cards):
        if warning:
            yield warning
    alarms = [arm.name for arm in arms if any(card.alarms for card in arm.cards)]
    if alarms:
        yield f"Alarms were raised for {', '.join(alarms)}; they stand in study.json."


def join_scores(scores: Sequence[Score], is_share: bool = False) -> Score:
    """Take one measure over several training seeds.

    The interval is then that of the mean over trainings: it says how another training would come
    out, which the pictures of one cannot tell. Two trainings or more are needed for it.

    Args:
        scores: One for each training seed, of one key.
        is_share: Whether it is a share of the pictures, of which the interval cannot leave 0 to 1.
    """
    if len(scores) == 1:
        return scores[0]
    values = [score.value for score in scores if score.value is not None]
    if not values or len(values) < len(scores):
        return Score(note=next((score.note for score in scores if score.note), "not measured"))
    over = mean_over_runs(values)
    ends = over.interval
    if ends is not None and is_share:
        ends = max(0.0, ends[0]), min(1.0, ends[1])
    return Score(
        value=over.value,
        n=sum(score.n for score in scores if score.n is not None),
        interval=ends,
        floor=mean_part(scores, "floor"),
        ceiling=mean_part(scores, "ceiling"),
        lift=mean_part(scores, "lift"),
        key=scores[0].key,
        note=f"{len(scores)} trainings: {', '.join(f'{value:.3f}' for value in values)}",
    )


def list_findings(found: StudyFindings, versions: Mapping[str, str]) -> dict[str, Any]:
    """Lay everything out for programs."""
    return {
        "kind": "study",
        "question": found.study.question,
        "answer": found.answer,
        "chosen": found.chosen,
        "notes": list(found.notes),
        "study": found.study.model_dump(mode="json", exclude={"photos", "references"}),
        "arms": [
            {
                "name": arm.name,
                "runs": list(arm.runs),
                "pictures": list(arm.pictures),
                "seconds_per_picture": arm.seconds_per_picture,
                "measures": {n: s.model_dump(mode="json") for n, s in arm.measures().items()},
                "choosing": [
                    {n: s.model_dump(mode="json") for n, s in card.scores.items()}
                    for card in arm.choosing
                ],
                "alarms": [alarm for card in arm.cards for alarm in card.alarms],
            }
            for arm in found.arms
        ],
        "comparisons": [_list_contrast(contrast) for contrast in found.contrasts],
        "categories": {name: _list_contrast(one) for name, one in found.categories.items()},
        "versions": dict(versions),
    }


def _list_contrast(contrast: Contrast) -> dict[str, Any]:
    return {
        "first": contrast.first,
        "second": contrast.second,
        "measures": [one.model_dump(mode="json") for one in contrast.measures],
    }


def write_page(found: StudyFindings) -> str:
    """Write the findings as a page of Markdown."""
    lines = [f"# {found.study.question}", "", f"**{found.answer}**", ""]
    lines += [f"- {note}" for note in found.notes]
    lines += ["", "## Arms", ""]
    head = ("arm", "measure", "value", "n", "interval", "floor", "ceiling", "lift", "s a picture")
    table: list[Sequence[str]] = [head, ["---"] * len(head)]
    table += [
        (arm.name, label_of(name), *score.cells("–"), f"{arm.seconds_per_picture:.2f}")
        for arm in found.arms
        for name, score in arm.measures().items()
    ]
    lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in table]
    lines += ["", "## Comparisons", ""]
    rows = [("", contrast) for contrast in found.contrasts]
    rows += list(found.categories.items())
    for category, contrast in rows:
        where = f" in “{category}”" if category else ""
        lines.append(f"- “{contrast.second}” against “{contrast.first}”{where}:")
        lines += [f"    - {tell_comparison(one)}" for one in contrast.measures]
    return "\n".join(lines) + "\n"
