"""Findings of a weight search: as JSON, as a page of Markdown, and as a merge command."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dreamloom.evaluation.compare import Comparison, tell_comparison
from dreamloom.evaluation.metrics.measures import label_of
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.experiments.merge_search.candidates import MergeWeights


class _Listed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tried(_Listed):
    """One candidate of a round, and what it has kept."""

    name: str
    subject: tuple[float, ...]
    """Weight of the subject's adapter: one, or one for each group of blocks."""
    style: tuple[float, ...]
    kept: dict[str, float]
    """Share of each aim: 0 for nothing, 1 for what the part alone does."""
    together: float | None
    """Their harmonic mean, each cut to between 0 and 1."""
    promoted: bool = False
    """Whether it went on to the next round; in the last one, whether it won."""


class RoundFindings(_Listed):
    """One round: the best candidate first."""

    shots: int
    """Pictures of each candidate."""
    steps: int
    candidates: tuple[Tried, ...]


class HeldOut(_Listed):
    """What one set of weights keeps on prompts and seeds that the search never saw."""

    name: str
    subject: tuple[float, ...]
    style: tuple[float, ...]
    kept: dict[str, Score]
    together: float | None
    copies: int
    """Pictures that repeat a photo, or a picture in the style; they earn no credit."""
    nearest_copy: float
    """The highest correlation of a picture's layout with a photo or a picture in the style."""
    content: float | None
    """Mean likeness to the pictures in the style by DINO: what they show, come along with how."""
    content_without: float | None
    """The same of the subject's adapter alone."""
    scores: dict[str, Score]
    """As `dreamloom evaluate` gives them: identity, CLIP-T, copies, leakage."""
    alarms: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


class SearchFindings(_Listed):
    """Everything that a search found."""

    kind: Literal["search"] = "search"
    verdict: str
    """Whether searching has found anything, in a sentence."""
    winner: Tried
    command: str
    """Merges with the winner's weights."""
    front: tuple[str, ...]
    """Candidates that no other one beats in every aim, among those drawn with all steps."""
    compared_on: RoundFindings
    """Those candidates, all on the same pictures."""
    rounds: tuple[RoundFindings, ...]
    agreement: float | None
    """Spearman's correlation of the first round's order with the second's."""
    held_out: dict[str, HeldOut]
    """The winner and its rivals, by what they are called."""
    comparisons: dict[str, Comparison]
    """The winner against each rival: all aims together."""
    changes: dict[str, tuple[Comparison, ...]]
    """The same, score by score."""
    budget: int
    pictures: int
    """Drawn in all, by this call and by those that were stopped."""
    prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    held_out_seeds: tuple[int, ...]
    style_reference: str
    adapters: dict[str, str]
    """SHA-256 of each file."""
    base: dict[str, str]
    keys: dict[str, str]
    """The encoders, by aim."""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}


def write_command(files: tuple[Path, Path], winner: MergeWeights, out: Path) -> str:
    """Give the command line that merges with the winner's weights."""
    subject, style = winner.sides
    named = [("subject", files[0], subject), ("style", files[1], style)]
    parts = [f"{path}:{side.weight:g}" for _, path, side in named]
    blocks = [f"--blocks={name}:{side.blocks}" for name, _, side in named if side.blocks]
    if blocks:
        parts = [f"{name}={part}" for (name, _, _), part in zip(named, parts, strict=True)]
    return shlex.join(["dreamloom", "merge", *parts, *blocks, "-o", str(out)])


def write_page(found: SearchFindings) -> str:
    """Write the findings as a page of Markdown."""
    lines = ["# Merge weights", "", f"**{found.verdict}**", ""]
    lines += ["```sh", found.command, "```", "", *(f"- {note}" for note in found.notes)]
    lines += ["", "## On held-out prompts and seeds", "", *_page_held_out(found), ""]
    lines += [
        "Each interval is that of its comparison alone; each p allows for those made with it.",
        "",
    ]
    for name, one in found.comparisons.items():
        lines.append(f"- The winner against {name}: {tell_comparison(one)}")
        lines += [f"    - {tell_comparison(change)}" for change in found.changes.get(name, ())]
    for name, held in found.held_out.items():
        if held.content is not None and held.content_without is not None:
            lines.append(
                f"- With {name}: likeness to what the pictures in the style show, by DINO, is "
                f"{_number(held.content)}; {_number(held.content_without)} without the style."
            )
        lines += [f"- With {name}: {text}" for text in (*held.alarms, *held.findings)]
    lines += ["", "## What was tried", "", "![The front](search.svg)", ""]
    lines.append(
        f"All on the same {found.compared_on.shots} pictures; on the front is what no other one "
        f"beats in every aim."
    )
    lines += ["", *_page_round(found.compared_on, found.front), ""]
    for number, tried in enumerate(found.rounds, 1):
        lines += [f"### Round {number}: {tried.shots} pictures of {tried.steps} steps each", ""]
        lines += [*_page_round(tried, ()), ""]
    if found.agreement is not None:
        lines.append(
            f"The orders of rounds 1 and 2 agree by {found.agreement:.2f} (Spearman; 1 is the same "
            f"order, 0 chance)."
        )
    lines += [
        "",
        f"{found.pictures} pictures of {found.budget} were drawn. Style is compared with "
        f"{found.style_reference}.",
        "",
    ]
    lines += [f"- {name}: {key}" for name, key in found.keys.items()]
    return "\n".join(lines) + "\n"


def _page_held_out(found: SearchFindings) -> list[str]:
    aims = list(next(iter(found.held_out.values())).kept)
    beside = [
        name
        for name in ("clip_t", "copy", "copy_sscd", "leakage")
        if any(
            held.scores.get(name) and held.scores[name].value is not None
            for held in found.held_out.values()
        )
    ]
    head = ["", "subject", "style", *(f"{aim} kept" for aim in aims), "together", "copies"]
    rows = [
        [
            name,
            _weights(held.subject),
            _weights(held.style),
            *(format_score(held.kept[aim]) for aim in aims),
            _number(held.together),
            str(held.copies),
            *(format_score(held.scores[name]) if name in held.scores else "–" for name in beside),
        ]
        for name, held in found.held_out.items()
    ]
    return table([*head, *(label_of(name) for name in beside)], rows)


def _page_round(one: RoundFindings, front: Sequence[str]) -> list[str]:
    aims = list(dict.fromkeys(aim for tried in one.candidates for aim in tried.kept))
    head = ["subject", "style", *(f"{aim} kept" for aim in aims), "together", ""]
    rows = [
        [
            _weights(tried.subject),
            _weights(tried.style),
            *(_number(tried.kept.get(aim)) for aim in aims),
            _number(tried.together),
            "front" if tried.name in front else "goes on" if tried.promoted and not front else "",
        ]
        for tried in one.candidates
    ]
    return table(head, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lay out a table of Markdown, line by line."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def format_score(score: Score) -> str:
    """A score with its interval, in a cell."""
    if score.value is None:
        return "not measured"
    between = "" if score.interval is None else " ({:.2f} to {:.2f})".format(*score.interval)
    return f"{score.value:.2f}{between}".replace("-", "−")


def _weights(weights: Sequence[float]) -> str:
    return " / ".join(f"{weight:.2f}" for weight in weights)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")
