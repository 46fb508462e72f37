"""Scores as tables: heat maps of schedulers and steps, and every score with what belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamloom.evaluation.verdicts import LABELS, Figure, indistinct_from_best, label_of, meaning_of
from dreamloom.report.gallery import kind_of
from dreamloom.report.story import (
    TABLE,
    Facts,
    Story,
    label_set,
    order_of,
    read_groups,
    read_scores,
    texts_of,
)

_HEAT = ("identity", "clip_i", "clip_t")


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map."""

    figure: Figure
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


def heat_maps(cards: Mapping[str, Mapping[str, Any]]) -> list[HeatMap]:
    """Make the tables of schedulers and steps, one for each score.

    Sets whose names begin with ``table`` are taken, or else every set that was drawn with more
    than one sampler. The base model's own table is left out: it is the others' floor.
    """
    table = {name: card for name, card in cards.items() if name.startswith(TABLE)}
    adapted = {name: card for name, card in table.items() if kind_of(name) != "base"}
    chosen = adapted or {n: c for n, c in cards.items() if len(read_groups(c, "by_cell")) > 1}
    cells = {name: _cells(chosen[name]) for name in sorted(chosen, key=_table_order)}
    samplers = sorted({sampler for found in cells.values() for sampler in found})
    measured = [
        name
        for name in _HEAT
        if any(scores.get(name) for found in cells.values() for scores in found.values())
    ]
    return [_heat_map(name, cells, samplers) for name in measured]


def _table_order(name: str) -> tuple[int, str]:
    return order_of(name.removeprefix(f"{TABLE}_"))


def _cells(card: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Figure]]:
    return {
        (str(group.get("scheduler") or ""), int(group.get("steps") or 0)): read_scores(group)
        for group in read_groups(card, "by_cell")
    }


def _heat_map(
    name: str,
    cells: Mapping[str, Mapping[tuple[str, int], Mapping[str, Figure]]],
    samplers: Sequence[tuple[str, int]],
) -> HeatMap:
    figures = [
        found.get(sampler, {}).get(name, Figure())
        for sampler in samplers
        for found in cells.values()
    ]
    best, alike = indistinct_from_best(figures)
    shades = _shades(figures)
    laid = []
    for index, figure in enumerate(figures):
        mark = "best" if index == best else "like-best" if alike[index] else ""
        told = {"best": "best", "like-best": "≈ best"}.get(mark, "")
        laid.append(Cell(figure, shades[index], mark, told))
    width = len(cells)
    measured = sum(figure.measured for figure in figures)
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


def _shades(figures: Sequence[Figure]) -> list[float]:
    """Shade by value; differences smaller than the intervals look small, as they are."""
    values = [figure.value for figure in figures if figure.value is not None]
    if not values:
        return [0.0] * len(figures)
    widths = [figure.interval[1] - figure.interval[0] for figure in figures if figure.interval]
    span = max([max(values) - min(values), *widths]) or 1.0
    middle = (max(values) + min(values)) / 2
    return [
        0.0 if figure.value is None else 0.5 + (figure.value - middle) / span for figure in figures
    ]


def score_table(scores: Mapping[str, Mapping[str, Figure]]) -> list[Block]:
    """Make a block for each score: label, kind and figure of every set that has it."""
    blocks = []
    for name in _score_names(scores.values()):
        rows = [
            (label_set(set_name), kind_of(set_name), own[name])
            for set_name, own in scores.items()
            if name in own
        ]
        reasons = {figure.note for _, _, figure in rows}
        if len(reasons) == 1 and not any(figure.measured for _, _, figure in rows):
            rows = [("all pictures", "other", rows[0][2])]
        blocks.append(Block(label_of(name), meaning_of(name), [], rows))
    return blocks


def _score_names(scored: Iterable[Mapping[str, Figure]]) -> list[str]:
    found = {name for scores in scored for name in scores}
    return [*(n for n in LABELS if n in found), *sorted(n for n in found if n not in LABELS)]


def score_folds(story: Story) -> list[tuple[str, list[Block]]]:
    """Make the tables that lie folded: by category, by prompt, and the summary's own scores."""
    folds = []
    cards = {
        name: card
        for name, card in sorted(story.cards.items(), key=lambda item: order_of(item[0]))
        if not name.startswith(TABLE)
    }
    for kind, field in (("by_category", "category"), ("by_prompt", "prompt")):
        grouped = {
            name: {str(g.get(field) or "–"): read_scores(g) for g in read_groups(card, kind)}
            for name, card in cards.items()
        }
        grouped = {name: groups for name, groups in grouped.items() if groups}
        if any(len(groups) > 1 for groups in grouped.values()):
            folds.append((f"By {field}", _grouped_blocks(grouped)))
    summary = story.summary_scores()
    if story.cards and summary:
        blocks = _grouped_blocks({label: {"": own} for label, own in summary.items()})
        on = story.summary.get("scores_on")
        told = "; ".join(f"{k}: {v}" for k, v in on.items()) if isinstance(on, dict) else on or ""
        folds.append((f"As in summary.json{f' ({told})' if told else ''}", blocks))
    return folds


def _grouped_blocks(grouped: Mapping[str, Mapping[str, Mapping[str, Figure]]]) -> list[Block]:
    names = _score_names(scores for groups in grouped.values() for scores in groups.values())
    rows = list(dict.fromkeys(row for groups in grouped.values() for row in groups))
    return [
        Block(
            label_of(name),
            "",
            [label_set(column) for column in grouped],
            [
                (row, [groups.get(row, {}).get(name, Figure()) for groups in grouped.values()])
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
    scored = [*story.scores().values(), *map(read_scores, story.cards.values())]
    facts = []
    for name in _score_names(scored):
        keys = {scores[name].key for scores in scored if name in scores and scores[name].key}
        notes = {scores[name].note for scores in scored if name in scores and scores[name].note}
        named = "; ".join(sorted(keys)) or "; ".join(sorted(notes)) or "its encoder is not named"
        facts.append((label_of(name), named))
    for card in story.cards.values():
        if "confidence" in card and "resamples" in card:
            covers = f"{card['confidence']:.0%}, from {card['resamples']} bootstrap resamples"
            facts.append(("Intervals", f"{covers} of prompts, pictures and photos"))
            break
    told = list(dict.fromkeys(t for card in story.cards.values() for t in texts_of(card, "notes")))
    return [*facts, *((("Notes", " ".join(told)),) if told else ())]


def fault_facts(story: Story) -> Facts:
    """Say what the detectors of failures found in each set, and how often they are wrong."""
    return [
        (f"{label_set(name).capitalize()}: {flags.get('label')}", str(flags.get("told")))
        for name, card in sorted(story.cards.items(), key=lambda item: order_of(item[0]))
        if not name.startswith(TABLE) and isinstance(card.get("flags"), dict)
        for flags in card["flags"].values()
        if isinstance(flags, dict) and flags.get("told")
    ]
