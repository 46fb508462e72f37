"""Scores as tables: heat maps of schedulers and steps, and every score with what belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamloom.evaluation.metrics.measures import LABELS, MEANINGS, label_of
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.report.roles import TABLE, Place, place_of
from dreamloom.report.story import (
    Facts,
    Story,
    label_set,
    order_of,
)
from dreamloom.report.verdicts import indistinct_from_best

_HEAT = ("identity", "clip_i", "clip_t")


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map."""

    score: Score
    shade: float
    """0 to 1: how dark."""
    mark: str
    """best, like-best, or nothing."""
    told: str


@dataclass(frozen=True)
class HeatMap:
    """One score over schedulers and steps (rows) and adapters (columns)."""

    label: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    told: str


@dataclass(frozen=True)
class Block:
    """One score's part of a table."""

    label: str
    meaning: str
    columns: list[str]
    rows: list[Any]


def heat_maps(
    cards: Mapping[str, Scorecard], places: Mapping[str, Place] | None = None
) -> list[HeatMap]:
    """Make the tables of schedulers and steps, one for each score.

    Sets that were drawn for it are taken, or else every set that was drawn with more than one
    sampler. The base model's own table is left out: it is the others' floor.

    Args:
        cards: Scorecards by image set.
        places: Who drew each set and what for; None tells it by the names.
    """
    places = places or {name: place_of(name) for name in cards}
    table = {name: card for name, card in cards.items() if places[name].purpose == "table"}
    adapted = {name: card for name, card in table.items() if places[name].role != "base"}
    chosen = adapted or {n: c for n, c in cards.items() if len(c.by_cell) > 1}
    cells = {
        name: {(group.scheduler or "", group.steps or 0): group.scores for group in card.by_cell}
        for name, card in sorted(
            chosen.items(), key=lambda item: order_of(item[0].removeprefix(f"{TABLE}_"))
        )
    }
    samplers = sorted({sampler for found in cells.values() for sampler in found})
    measured = [
        name
        for name in _HEAT
        if any(scores.get(name) for found in cells.values() for scores in found.values())
    ]
    return [_heat_map(name, cells, samplers) for name in measured]


def _heat_map(
    name: str,
    cells: Mapping[str, Mapping[tuple[str, int], Mapping[str, Score]]],
    samplers: Sequence[tuple[str, int]],
) -> HeatMap:
    scored = [
        found.get(sampler, {}).get(name, Score())
        for sampler in samplers
        for found in cells.values()
    ]
    best, alike = indistinct_from_best(scored)
    shades = _shades(scored)
    laid = []
    for index, score in enumerate(scored):
        mark = "best" if index == best else "like-best" if alike[index] else ""
        told = {"best": "best", "like-best": "≈ best"}.get(mark, "")
        laid.append(Cell(score, shades[index], mark, told))
    width = len(cells)
    measured = sum(score.measured for score in scored)
    told = ""
    if best is not None and measured > 1:
        others = sum(alike)
        told = f"{others} of {measured - 1} other cells cannot be told apart from the best."
        if others == measured - 1:
            told = "No cell can be told apart from the best: the table chooses none."
    return HeatMap(
        label=label_of(name),
        columns=[label_set(found.removeprefix(f"{TABLE}_")) for found in cells],
        rows=[
            (f"{scheduler.upper()} {steps}", laid[row * width : (row + 1) * width])
            for row, (scheduler, steps) in enumerate(samplers)
        ],
        told=told,
    )


def _shades(scored: Sequence[Score]) -> list[float]:
    """Shade by value; differences smaller than the intervals look small, as they are."""
    values = [score.value for score in scored if score.value is not None]
    if not values:
        return [0.0] * len(scored)
    widths = [score.interval[1] - score.interval[0] for score in scored if score.interval]
    span = max([max(values) - min(values), *widths]) or 1.0
    middle = (max(values) + min(values)) / 2
    return [0.0 if score.value is None else 0.5 + (score.value - middle) / span for score in scored]


def score_table(
    scores: Mapping[str, Mapping[str, Score]], places: Mapping[str, Place]
) -> list[Block]:
    """Make a block for each score: label, kind and score of every set that has it."""
    blocks = []
    for name in _score_names(scores.values()):
        rows = [
            (label_set(set_name), (places.get(set_name) or place_of(set_name)).kind, own[name])
            for set_name, own in scores.items()
            if name in own
        ]
        reasons = {score.note for _, _, score in rows}
        if len(reasons) == 1 and not any(score.measured for _, _, score in rows):
            rows = [("all pictures", "other", rows[0][2])]
        blocks.append(Block(label_of(name), MEANINGS.get(name, ""), [], rows))
    return blocks


def _score_names(scored: Iterable[Mapping[str, Score]]) -> list[str]:
    found = {name for scores in scored for name in scores}
    return [*(n for n in LABELS if n in found), *sorted(n for n in found if n not in LABELS)]


def score_folds(story: Story) -> list[tuple[str, list[Block]]]:
    """Make the tables that lie folded: by category, by prompt, and the summary's own scores."""
    folds = []
    cards = {
        name: card
        for name, card in sorted(story.cards.items(), key=lambda item: order_of(item[0]))
        if story.place(name).purpose != "table"
    }
    for field in ("category", "prompt"):
        grouped = {
            name: {getattr(group, field) or "–": group.scores for group in groups}
            for name, card in cards.items()
            if (groups := getattr(card, f"by_{field}"))
        }
        if any(len(groups) > 1 for groups in grouped.values()):
            folds.append((f"By {field}", _grouped_blocks(grouped)))
    # Newer summaries repeat the scorecards; older ones tell of one prompt alone.
    summary = {
        name: own
        for name, own in story.summary_scores().items()
        if name not in cards or any(cards[name].scores.get(n, one) != one for n, one in own.items())
    }
    if story.cards and summary:
        blocks = _grouped_blocks({label: {"as told": own} for label, own in summary.items()})
        on = story.summary.get("scores_on")
        told = "; ".join(f"{k}: {v}" for k, v in on.items()) if isinstance(on, dict) else on or ""
        folds.append((f"As in summary.json{f' ({told})' if told else ''}", blocks))
    return folds


def _grouped_blocks(grouped: Mapping[str, Mapping[str, Mapping[str, Score]]]) -> list[Block]:
    names = _score_names(scores for groups in grouped.values() for scores in groups.values())
    rows = list(dict.fromkeys(row for groups in grouped.values() for row in groups))
    return [
        Block(
            label_of(name),
            "",
            [label_set(column) for column in grouped],
            [
                (row, [groups.get(row, {}).get(name, Score()) for groups in grouped.values()])
                for row in rows
            ],
        )
        for name in names
        if any(
            scores[name].measured
            for groups in grouped.values()
            for scores in groups.values()
            if name in scores
        )
    ]


def key_facts(story: Story) -> Facts:
    """Say which encoder gave each score, and how the intervals were made."""
    scored = [*story.scores().values(), *(card.scores for card in story.cards.values())]
    facts = []
    for name in _score_names(scored):
        keys = {key for scores in scored if name in scores and (key := scores[name].key)}
        notes = {
            f"not measured: {scores[name].reason}"
            if not scores[name].measured
            else scores[name].note
            for scores in scored
            if name in scores and scores[name].note
        }
        named = "; ".join(sorted(keys)) or "; ".join(sorted(notes)) or "its encoder is not named"
        facts.append((label_of(name), named))
    for card in list(story.cards.values())[:1]:
        covers = f"{card.confidence:.0%}, from {card.resamples} bootstrap resamples"
        facts.append(("Intervals", f"{covers} of prompts, pictures and photos"))
    told = list(dict.fromkeys(note for card in story.cards.values() for note in card.notes))
    return [*facts, *((("Notes", " ".join(told)),) if told else ())]


def fault_facts(story: Story) -> Facts:
    """Say what the detectors of failures found in each set, and how often they are wrong."""
    return [
        (f"{label_set(name).capitalize()}: {flags.label}", flags.told)
        for name, card in sorted(story.cards.items(), key=lambda item: order_of(item[0]))
        if story.place(name).purpose != "table"
        for flags in card.flags.values()
        if flags.told
    ]
