"""Everything that the page tells, read from the folder as it lies there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import ValidationError

from dreamloom.core.config.loading import load_run_settings
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import DreamLoomError, RunFolderError
from dreamloom.core.manifests import (
    MANIFEST,
    ClassImageSet,
    ImageSet,
    PhotoSet,
    read_class_image_set,
    read_image_set,
    read_photo_set,
)
from dreamloom.core.run_folder import Record, RunFolder
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.report.roles import Place, place_of

_NAMES = {
    "base": "base model",
    "without_prior": "without prior",
    "with_prior": "with prior",
    "base_merged": "base model, merge prompt",
    "with_prior_alone": "subject alone",
    "style": "style alone",
    "merged": "merge",
}
"""The demo's names, in the order of its story."""

Facts: TypeAlias = list[tuple[str, str]]
"""Names, and what they are in words."""

T = TypeVar("T")


def label_set(name: str) -> str:
    """The name of an image set or a run as a reader meets it."""
    return _NAMES.get(name) or name.replace("_", " ")


def label_run(name: str) -> str:
    """The name of a run inside a demo as a reader meets it."""
    return name.replace("_", " ")


def order_of(name: str) -> tuple[int, str]:
    """Sort key: the demo's own names first."""
    known = list(_NAMES)
    return (known.index(name) if name in known else len(known), name)


def tell_count(number: int, what: str) -> str:
    """Write how many there are, such as ``1 photo`` or ``6 photos``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@dataclass(frozen=True)
class Loss:
    """The losses of one training."""

    updates: list[int]
    lines: dict[str, list[float | None]]
    """subject; and with class images also prior, and the total of both."""


@dataclass(frozen=True)
class Story:
    """A run's or a demo's folder, read."""

    folder: Path
    runs: dict[str, RunFolder]
    """The runs by name; the folder itself, where it is a run, has the name ''."""
    summary: dict[str, Any]
    photos: dict[str, PhotoSet]
    """Photos by run: a demo keeps the subject's beside its runs, and a style has its own."""
    priors: dict[str, ClassImageSet]
    sets: dict[str, ImageSet]
    cards: dict[str, Scorecard]
    """Scorecards by image set."""
    records: list[tuple[str, Record]]
    """Each record with the name of its run."""
    config: LoomConfig | None
    """Settings of the first run that has readable ones."""
    events: dict[str, list[dict[str, Any]]]
    """What was logged, by run."""
    study: dict[str, Any]
    """What a study found, as its ``study.json`` has it."""
    damage: list[str]
    """What could not be read, each in one sentence."""

    @property
    def is_single(self) -> bool:
        """Whether the folder is one run, without a summary and without runs inside."""
        return not self.summary and not any(self.runs)

    @property
    def subject(self) -> str:
        """The subject as prompts name it."""
        known = self.config.subject.phrase if self.config else "A run"
        return str(self.summary.get("subject") or known)

    @property
    def class_noun(self) -> str:
        """What the subject is one of."""
        known = self.config.subject.class_noun if self.config else "subject"
        return str(self.summary.get("class_noun") or known)

    @property
    def base(self) -> str:
        """The base model's name; empty if nothing tells it."""
        named = [r.base["name"] for _, r in self.records if "name" in r.base]
        named += [s.base["name"] for s in self.sets.values() if "name" in s.base]
        return named[0] if named else (self.config.base if self.config else "")

    def place(self, name: str) -> Place:
        """Say who drew a set and what for."""
        return place_of(name, self.sets.get(name))

    def scores(self) -> dict[str, dict[str, Score]]:
        """Scores by image set and name, over all prompts.

        They come from the scorecards; a set without one takes what the summary says of it.
        """
        found = self.summary_scores()
        for name, card in self.cards.items():
            if self.place(name).purpose != "table":
                found[name] = card.all_scores
        return {name: found[name] for name in sorted(found, key=order_of) if found[name]}

    def summary_scores(self) -> dict[str, dict[str, Score]]:
        """Scores by image set and name as the summary has them, often of one prompt only."""
        found = {
            name: {
                key: _read_score(value)
                for key, value in part.items()
                if isinstance(value, dict) and "value" in value
            }
            for name, part in self.summary.items()
            if isinstance(part, dict)
        }
        return {name: scores for name, scores in found.items() if scores}

    def losses(self) -> dict[str, Loss]:
        """The losses of each run that logged any; an update taken again counts once, the last."""
        found = {}
        for name, events in self.events.items():
            # A demo's own log repeats what its runs logged.
            if not name and len(self.events) > 1:
                continue
            logged = {
                int(event["update"]): event
                for event in events
                if event.get("event") == "LossLogged" and isinstance(event.get("update"), int)
            }
            updates = sorted(logged)
            lines = {
                part: [_float(logged[update].get(part)) for update in updates]
                for part in ("total", "subject", "prior")
            }
            lines = {
                part: values
                for part, values in lines.items()
                if any(value is not None for value in values)
            }
            if "prior" not in lines and "subject" in lines:
                lines.pop("total", None)  # it is the same line
            if lines:
                found[name] = Loss(updates, lines)
        return found

    def logged_warnings(self) -> list[str]:
        """Notes that asked for attention while the runs went on, each once."""
        texts: dict[str, str] = {}
        for name, events in reversed(self.events.items()):
            for event in events:
                if event.get("event") == "Note" and event.get("warning") and event.get("text"):
                    texts.setdefault(str(event["text"]), name)
        return [
            f"{label_run(name).capitalize()}: {text}" if name else text
            for text, name in texts.items()
        ]


def read_story(folder: Path) -> Story:
    """Read a run's or a demo's folder; what is damaged is named, and the rest still read.

    Raises:
        RunFolderError: If there is no such folder, or it is neither a run nor a demo.
    """
    if not folder.is_dir():
        raise RunFolderError(f"There is no folder {folder}.", "Name the folder of a run.")
    here, damage = RunFolder(folder), list[str]()
    summary_file = folder / "summary.json"
    if not summary_file.is_file() and not here.is_run():
        raise RunFolderError(
            f"{folder} is neither a run of DreamLoom nor a folder with a summary.json.",
            "Name the folder that was given with --out.",
        )
    inside = sorted(folder.iterdir(), key=lambda path: order_of(path.name))
    runs = {
        path.name: RunFolder(path) for path in inside if path.is_dir() and RunFolder(path).is_run()
    }
    places = {"": here, **runs}
    return Story(
        folder=folder,
        runs={name: run for name, run in places.items() if run.is_run()},
        summary=_read_json(summary_file, damage),
        photos=_read_lists(read_photo_set, "photos", places, damage),
        priors=_read_lists(read_class_image_set, "priors", places, damage),
        sets=_read_sets(places, damage),
        cards=_read_cards(places, damage),
        records=_read_records(places, damage),
        config=next((c for run in places.values() if (c := _try_config(run, damage))), None),
        events={name: _events(run) for name, run in places.items()},
        study=_read_json(folder / "study.json", damage),
        damage=damage,
    )


def _try(read: Callable[[Path], T], folder: Path, damage: list[str]) -> T | None:
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return read(folder)
    except (DreamLoomError, ValueError):
        damage.append(f"The list of pictures in {folder.parent.name}/{folder.name} is damaged.")
        return None


def _read_lists(
    read: Callable[[Path], T], kind: str, places: Mapping[str, RunFolder], damage: list[str]
) -> dict[str, T]:
    found = {}
    for name, run in places.items():
        listed = _try(read, run.path / kind, damage)
        if listed is not None:
            found[name] = listed
    return found


def _try_config(run: RunFolder, damage: list[str]) -> LoomConfig | None:
    if not run.settings_file.is_file():
        return None
    try:
        return load_run_settings(run.settings_file)
    except DreamLoomError:
        damage.append(f"The settings in {run.path.name}/loom.toml cannot be read.")
        return None


def _read_sets(places: Mapping[str, RunFolder], damage: list[str]) -> dict[str, ImageSet]:
    sets = {}
    for name, run in places.items():
        folders = [path.parent for path in run.images.glob(f"*/{MANIFEST}")]
        for folder in sorted(folders, key=lambda path: order_of(path.name)):
            images = _try(read_image_set, folder, damage)
            # Cells of a grid are many, and have a sheet of their own.
            if images is not None and images.purpose != "grid":
                sets[f"{name}/{folder.name}" if name else folder.name] = images
    return sets


def _read_cards(places: Mapping[str, RunFolder], damage: list[str]) -> dict[str, Scorecard]:
    cards = {}
    for name, run in places.items():
        for set_name, card in _read_json(run.scores, damage).items():
            label = f"{name}/{set_name}" if name else set_name
            try:
                cards[label] = Scorecard.model_validate(card)
            except ValidationError:
                damage.append(f"The scores of {label} are not as this version writes them.")
    return cards


def _read_records(places: Mapping[str, RunFolder], damage: list[str]) -> list[tuple[str, Record]]:
    records = []
    for name, run in places.items():
        for path in sorted(run.records.glob("*.json")):
            if record := run.read_record(path.stem):
                records.append((name, record))
            else:
                damage.append(f"The record {path.name} of {run.path.name} is damaged.")
    return records


def _events(run: RunFolder) -> list[dict[str, Any]]:
    """Read what was logged; a line that was cut off when the run stopped is passed over."""
    if not run.events_file.is_file():
        return []
    events = []
    for line in run.events_file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _read_json(path: Path, damage: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        data = None
    if not isinstance(data, dict):
        damage.append(f"{path.name} cannot be read.")
        return {}
    return data


def _float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _read_score(data: object) -> Score:
    """Read a score from JSON; what cannot be read was not measured."""
    try:
        score = Score.model_validate(data)
    except ValidationError:
        return Score()
    return score if score.value is None or math.isfinite(score.value) else Score()
