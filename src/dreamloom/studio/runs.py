"""Runs as pages need them: found below the root, read anew at each request, never remembered."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamloom.core.config.loading import load_run_settings
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import DreamLoomError
from dreamloom.core.manifests import MANIFEST, ImageSet, read_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.evaluation.looks import Look, read_looks

_DEEPEST = 3
_MOST_POINTS = 1500
_OF_STUDY = re.compile(r".+/(class-images|pictures|runs)/[0-9a-f]{16}")
"""What a study makes on its way; see `dreamloom.experiments.study.work`."""


@dataclass(frozen=True)
class Answer:
    """What a study has answered.

    Args:
        question: What was asked.
        sentence: Its answer.
    """

    question: str
    sentence: str


@dataclass(frozen=True)
class Run:
    """A run below the root.

    Args:
        root: Where all runs lie.
        folder: Its folder.
    """

    root: Path
    folder: Path

    @property
    def name(self) -> str:
        """Its folder, as seen from the root."""
        return self.folder.relative_to(self.root).as_posix()

    @property
    def id(self) -> str:
        """What addresses call it: no path stands in one."""
        return hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]

    @property
    def files(self) -> RunFolder:
        """Where everything of it lies."""
        return RunFolder(self.folder)

    @property
    def changed_at(self) -> float:
        """When something last happened in it."""
        for file in (self.files.events_file, self.files.settings_file, self.folder):
            with suppress(OSError):
                return file.stat().st_mtime
        return 0.0

    @property
    def config(self) -> LoomConfig | None:
        """Its settings; None where it has none that can be read."""
        try:
            return load_run_settings(self.files.settings_file)
        except DreamLoomError:
            return None

    @property
    def is_of_study(self) -> bool:
        """Whether a study made it on its way, whose own folder stands for all of them."""
        study = self.folder.parents[1]
        return _OF_STUDY.fullmatch(self.name) is not None and RunFolder(study).is_run()

    @property
    def answer(self) -> Answer | None:
        """What it has answered; None where it is no study, or one that is not done."""
        try:
            found = json.loads((self.folder / "study.json").read_text(encoding="utf-8"))
            return Answer(str(found["question"]), str(found["answer"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @property
    def is_trained(self) -> bool:
        """Whether there is an adapter."""
        return self.files.adapter.is_file()

    def sets(self) -> dict[str, Path]:
        """The folders of its image sets, by name."""
        return {file.parent.name: file.parent for file in sorted(self._manifests())}

    def _manifests(self) -> Iterator[Path]:
        yield from self.files.images.glob(f"*/{MANIFEST}")

    def read_set(self, name: str) -> ImageSet | None:
        """Read an image set by its name; None where there is none that can be read."""
        folder = self.sets().get(name)
        return read_set(folder) if folder else None

    def looks(self) -> list[Look]:
        """List the validation samples whose pictures can be read, in the order of updates."""
        return [look for look in read_looks(self.files.validation_samples) if look.images]


def list_runs(root: Path, of_studies: bool = False) -> list[Run]:
    """Find all runs below a root, the one that changed last first; runs inside runs, too.

    Args:
        root: Where to look.
        of_studies: Whether to list what studies have made on their way as well.
    """
    found = [Run(root, folder) for folder in _walk(root, _DEEPEST)]
    shown = [run for run in found if of_studies or not run.is_of_study]
    return sorted(shown, key=lambda run: run.changed_at, reverse=True)


def find_run(root: Path, run_id: str) -> Run | None:
    """Find a run by what addresses call it."""
    return next((run for run in list_runs(root) if run.id == run_id), None)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        below = sorted(entry.name for entry in os.scandir(folder) if _is_own_folder(entry))
    except OSError:
        return
    for name in below:
        path = folder / name
        if RunFolder(path).is_run():
            yield path
        if depth > 1 and name not in {"images", "photos", "priors", "looks", "checkpoints"}:
            yield from _walk(path, depth - 1)


def _is_own_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def read_set(folder: Path) -> ImageSet | None:
    """Read a folder of drawn pictures; None where it cannot be, or names files elsewhere."""
    try:
        images = read_image_set(folder)
    except DreamLoomError:
        return None
    inside = all(picture.file == Path(picture.file).name for picture in images.pictures)
    return images if inside else None


@dataclass(frozen=True)
class Happened:
    """What the end of a run's events says."""

    stage: str = ""
    task: str = ""
    done: int = 0
    total: int = 0
    values: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_events(file: Path, start: int = 0, most_bytes: int | None = None) -> tuple[list[Any], int]:
    """Read whole lines of an events file from a byte on.

    Args:
        file: ``events.jsonl``; it may be missing.
        start: The byte to begin at: 0, or what an earlier call gave.
        most_bytes: Where not to read on; a line that is cut there waits for the next call.

    Returns:
        The events, and the byte after the last whole line.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read() if most_bytes is None else stream.read(most_bytes)
    except OSError:
        return [], start
    whole = data[: data.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        with suppress(ValueError):
            events.append(json.loads(line))
    return events, start + len(whole)


def tell_last(events: Sequence[Any]) -> Happened:
    """Say what goes on, by the last events."""
    happened = Happened()
    warnings: list[str] = []
    for event in events:
        kind = event.get("event")
        if kind in {"StageStarted", "StageSkipped", "StageDone"}:
            happened = Happened(stage=str(event.get("stage", "")))
        elif kind == "Progress":
            happened = Happened(
                stage=str(event["stage"]),
                task=str(event["task"]),
                done=int(event["done"]),
                total=int(event["total"]),
                values=dict(event.get("values") or {}),
            )
        elif kind == "Note" and event.get("warning"):
            warnings.append(str(event.get("text", "")))
    return Happened(**{**vars(happened), "warnings": tuple(dict.fromkeys(warnings))})


def list_losses(events: Sequence[Any]) -> dict[str, list[Any]]:
    """List the losses of a training for a plot: at most 1500 points, each the mean of its span."""
    rows = [event for event in events if event.get("event") == "LossLogged"]
    # A training that went on from a checkpoint logged some updates twice: the last counts.
    last = {int(row["update"]): row for row in rows}
    updates = sorted(last)
    span = -(-len(updates) // _MOST_POINTS) or 1
    table: dict[str, list[Any]] = {"update": [], "subject": [], "prior": [], "rate": []}
    for start in range(0, len(updates), span):
        group = [last[update] for update in updates[start : start + span]]
        table["update"].append(int(group[-1]["update"]))
        table["rate"].append(group[-1]["learning_rate"])
        for name in ("subject", "prior"):
            values = [row[name] for row in group if row.get(name) is not None]
            table[name].append(sum(values) / len(values) if values else None)
    return table
