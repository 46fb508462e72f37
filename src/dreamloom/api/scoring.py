"""Scoring: how like the subject pictures are, what changed between two sets, what a merge keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

from dreamloom.api.drawing import Pictures
from dreamloom.api.options import Options, PathLike, load_settings, show_progress
from dreamloom.api.results import Result
from dreamloom.core.errors import ConfigError
from dreamloom.core.run_folder import write_json
from dreamloom.core.toml_files import offer
from dreamloom.display.tables import (
    render_audit,
    render_comparisons,
    render_groups,
    render_retention,
    render_scorecard,
)
from dreamloom.evaluation.compare import Comparison, compare_cards
from dreamloom.evaluation.metrics.scorecard import Group, Score, Scorecard
from dreamloom.evaluation.retention import Retention
from dreamloom.evaluation.scorecard_files import find_scorecard
from dreamloom.experiments.seed_audit import Audit
from dreamloom.experiments.seed_audit_files import score_as_seed
from dreamloom.pipeline.score import score
from dreamloom.pipeline.score_merge import score_merge

if TYPE_CHECKING:
    from rich.console import RenderableType

_GROUPS = {"category": "by_category", "prompt": "by_prompt", "sampler": "by_cell"}


@dataclass(frozen=True, repr=False)
class Scores(Result, Mapping[str, Score]):
    """Scores by name (identity, clip_i, clip_t, dino …), each with n, interval, floor and ceiling.

    ``scores["identity"].lift`` is a number from the base model's (0) to the photos' own (1);
    what could not be measured has the value None, and its ``note`` says why.

    Attributes:
        card: All of it: alarms, findings, scores by prompt, by category and of each picture.
    """

    card: Scorecard

    def __getitem__(self, name: str) -> Score:
        return self.card.all_scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.card.all_scores)

    def __len__(self) -> int:
        return len(self.card.all_scores)

    def by(self, what: Literal["prompt", "category", "sampler"], *measures: str) -> ScoreTable:
        """Give scores of parts of the pictures, a row each.

        Args:
            what: ``prompt``, ``category``, or ``sampler``: scheduler and steps.
            *measures: Their names; by default identity and clip_t.

        Raises:
            ConfigError: If there is no such part or score.
        """
        if what not in _GROUPS:
            raise ConfigError(f"Scores are not kept by {what!r}.", offer(what, _GROUPS))
        for name in measures:
            if name not in self.card.scores:
                raise ConfigError(f"There is no score {name!r}.", offer(name, self.card.scores))
        found: tuple[Group, ...] = getattr(self.card, _GROUPS[what])
        return ScoreTable(found, measures or ("identity", "clip_t"))

    def save(self, file: PathLike) -> Path:
        """Write them as ``evaluate --json FILE`` does, for `compare`."""
        write_json(Path(file), self.card)
        return Path(file)

    def _render(self) -> Iterator[RenderableType]:
        return render_scorecard(self.card)


@dataclass(frozen=True, repr=False)
class ScoreTable(Result):
    """Scores of parts of a set.

    Attributes:
        groups: The parts, each with its scores.
        measures: The scores that are shown.
    """

    groups: tuple[Group, ...]
    measures: tuple[str, ...]

    def _render(self) -> Iterator[RenderableType]:
        return render_groups(self.groups, self.measures)


@dataclass(frozen=True, repr=False)
class Comparisons(Result, Sequence[Comparison]):
    """What changed in each score, pair by pair, and whether chance alone might do that."""

    compared: tuple[Comparison, ...]

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Comparison]: ...
    def __getitem__(self, index: int | slice) -> Comparison | Sequence[Comparison]:
        return self.compared[index]

    def __len__(self) -> int:
        return len(self.compared)

    def _render(self) -> Iterator[RenderableType]:
        return render_comparisons(self.compared)


@dataclass(frozen=True, repr=False)
class Retained(Result):
    """What a merge has kept of its parts.

    Attributes:
        found: The scores of subject and style, and both together.
    """

    found: Retention

    def _render(self) -> Iterator[RenderableType]:
        return render_retention(self.found)


@dataclass(frozen=True, repr=False)
class AuditedScores(Result):
    """What a faulty script would have said of pictures, and what each of its faults adds."""

    audit: Audit

    def _render(self) -> Iterator[RenderableType]:
        return render_audit(self.audit)


def evaluate(
    pictures: Pictures | PathLike,
    photos: PathLike,
    *,
    floor: Pictures | PathLike | None = None,
    strangers: PathLike | None = None,
    subject: str | None = None,
    class_noun: str | None = None,
    **options: Unpack[Options],
) -> Scores:
    """Score pictures against the subject's photos.

    Args:
        pictures: From `generate`, or a folder.
        photos: The subject's photos.
        floor: The base model's pictures of the same prompts and seeds; by default those that came
            with the pictures. Without them there is no lift.
        strangers: A folder of others of the class; by default the run's class images.
        subject: The subject's phrase in prompts; by default as the pictures' manifest says.
        class_noun: What stands for it when prompts are scored.
        **options: See `Options`.

    Raises:
        EvaluationError: If a folder holds no picture, or the photos are drawn pictures.
        PhotoError: If a photo cannot be read or there is none.
        ConfigError: If strangers are photos of the subject.
    """
    config = load_settings(options, {"subject.phrase": subject, "subject.class_noun": class_noun})
    others = None if strangers is None else Path(strangers)
    with show_progress(options) as observe:
        card = score(
            _find_folder(pictures),
            Path(photos),
            config,
            _find_floor(pictures, floor),
            others,
            observe,
        )
    return Scores(card)


def compare(first: Scores | PathLike, second: Scores | PathLike, *measures: str) -> Comparisons:
    """Say what changed from one evaluation to another, pair by pair of prompts and seeds.

    Args:
        first: Scores, a file of them, or ``RUN:SET``.
        second: The ones after the change.
        *measures: The scores to compare; all by default. Fewer say more: every test makes the
            others harder to tell from chance.

    Raises:
        EvaluationError: If there are no such scores, or nothing to pair.
    """
    cards = [
        one.card if isinstance(one, Scores) else find_scorecard(os.fspath(one))
        for one in (first, second)
    ]
    return Comparisons(compare_cards(cards[0], cards[1], measures or None))


def retention(
    merged: Pictures | PathLike,
    *,
    base: Pictures | PathLike,
    subject: Pictures | PathLike,
    style: Pictures | PathLike,
    photos: PathLike,
    style_photos: PathLike | None = None,
    **options: Unpack[Options],
) -> Retained:
    """Say what a merge's pictures have kept of subject and style.

    Args:
        merged: By the merge.
        base: Without adapters, of the same prompts and seeds, as the next two.
        subject: By the subject's adapter alone.
        style: By the style's adapter alone.
        photos: The subject's photos.
        style_photos: Pictures in the style, to compare with.
        **options: See `Options`.

    Raises:
        EvaluationError: If the sets do not belong together.
        PhotoError: If a photo cannot be read or there is none.
    """
    sets = {"base": base, "subject": subject, "style": style, "merged": merged}
    folders = {name: _find_folder(one) for name, one in sets.items()}
    config = load_settings(options, {})
    like = None if style_photos is None else Path(style_photos)
    with show_progress(options) as observe:
        return Retained(score_merge(folders, Path(photos), like, config, observe))


def audit(
    pictures: Pictures | PathLike,
    photos: PathLike,
    *,
    target_text: str | None = None,
    floor: Pictures | PathLike | None = None,
    subject: str | None = None,
    class_noun: str | None = None,
    **options: Unpack[Options],
) -> AuditedScores:
    """Say what a published but faulty script makes of pictures, fault by fault; see docs/audit.md.

    Args:
        pictures: From `generate`, or a folder.
        photos: The subject's photos.
        target_text: The text that the script was given.
        floor: As for `evaluate`.
        subject: As for `evaluate`.
        class_noun: As for `evaluate`.
        **options: See `Options`.

    Raises:
        EvaluationError: If a folder holds no picture, or CLIP is not on this machine.
        PhotoError: If a photo cannot be read or there is none.
    """
    config = load_settings(options, {"subject.phrase": subject, "subject.class_noun": class_noun})
    below = _find_floor(pictures, floor)
    with show_progress(options) as observe:
        found = score_as_seed(
            _find_folder(pictures), Path(photos), config, target_text, below, observe
        )
    return AuditedScores(found)


def _find_folder(given: Pictures | PathLike) -> Path:
    return given.folder if isinstance(given, Pictures) else Path(given)


def _find_floor(pictures: Pictures | PathLike, floor: Pictures | PathLike | None) -> Path | None:
    if floor is None and isinstance(pictures, Pictures):
        floor = pictures.floor
    return None if floor is None else _find_folder(floor)
