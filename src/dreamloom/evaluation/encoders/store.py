"""Where fetched models lie, and whether they are still what was fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dreamloom.core.errors import EvaluationError
from dreamloom.core.run_folder import file_sha256, write_json
from dreamloom.evaluation.encoders.catalogue import MODELS, ModelFile, Pinned

LOCK = "lock.json"
"""Beside a model's files: what was fetched, from where, and the hash of each file."""
FOLDER_VARIABLE = "DREAMLOOM_MODELS"
"""The environment variable that names another folder for fetched models."""
NO_OPENCV = "OpenCV is not installed; install it with 'pip install \"dreamloom[faces]\"'"
"""Why there is no face model where its package is not there, as a clause."""

State: TypeAlias = Literal["here", "not here", "embedded", "not offered"]


@dataclass(frozen=True)
class Kept:
    """A model on this machine, with every hash compared.

    Args:
        folder: Holds its files.
        name: Names the model and its bytes, for keys.
    """

    folder: Path
    name: str


@dataclass(frozen=True)
class Missing:
    """What cannot be used; ``reason`` is one clause to stand behind "not measured:"."""

    reason: str


@dataclass(frozen=True)
class Listed:
    """One line of ``dreamloom models list``.

    Args:
        model: The model.
        state: Whether it can be used on this machine. Sizes are compared, hashes only on use.
        why: What to do, or why it is not offered; empty for what is here.
    """

    model: Pinned
    state: State
    why: str

    def as_json(self) -> dict[str, Any]:
        """Give the line as plain values."""
        model = self.model
        return {
            "name": model.name,
            "purpose": model.purpose,
            "licence": model.licence,
            "size_mib": model.size_mib,
            "state": self.state,
            "why": self.why,
            "source": model.source,
            "repository": model.repository,
            "revision": model.revision,
            "hashes": ("known" if model.hashes_known else "taken when fetched")
            if model.files
            else None,
            "note": model.note,
        }


def models_folder() -> Path:
    """Where fetched models lie: ``DREAMLOOM_MODELS``, or DreamLoom's part of the user's cache."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dreamloom" / "models"


def model_folder(model: Pinned) -> Path:
    """Where the files of one fetched model lie."""
    return models_folder() / model.name


def keep_lock(model: Pinned, folder: Path, revision: str | None) -> None:
    """Write down what was fetched into a folder: the hash and size of each file."""
    files = {
        file.name: {
            "sha256": file_sha256(folder / file.name),
            "bytes": (folder / file.name).stat().st_size,
        }
        for file in model.files
    }
    lock = {
        "model": model.name,
        "repository": model.repository,
        "revision": revision,
        "files": files,
    }
    write_json(folder / LOCK, lock)


def find_kept(model: Pinned) -> Kept | Missing:
    """Find a model on this machine and compare the hash of each of its files."""
    if model.source == "package":
        return _find_in_package(model)
    folder = model_folder(model)
    lock = _read_lock(folder)
    if lock is None:
        return Missing(f"{model.name} is not on this machine; {model.wanted}")
    if damage := _find_damage(model, folder, lock, is_thorough=True):
        return Missing(f"{model.name} {damage}; {model.wanted}")
    weights = lock["files"][model.files[0].name]["sha256"]
    version = model.revision or weights
    return Kept(folder, f"{model.repository}@{version[:12]}")


def list_models() -> list[Listed]:
    """List every model with its state on this machine; nothing heavy is loaded for it."""
    return [Listed(model, *_judge_state(model)) for model in MODELS]


def damage_of(file: ModelFile, path: Path) -> str:
    """Say in what a file differs from the catalogue; empty if in nothing that is known."""
    if file.size is not None and path.stat().st_size != file.size:
        return f"has {path.stat().st_size} bytes, not {file.size}"
    if file.sha256 is not None and (found := file_sha256(path)) != file.sha256:
        return f"has the SHA-256 {found}, not {file.sha256}"
    return ""


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while an encoder is read into words for the user."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise EvaluationError(
            f"The encoder in {folder} cannot be read: {error}.",
            "Fetch it again, or name another one.",
        ) from error


def _judge_state(model: Pinned) -> tuple[State, str]:
    if model.source == "embedded":
        return "embedded", ""
    if model.source == "none":
        return "not offered", model.note
    if model.source == "package":
        is_here = all(map(find_spec, ("dlib", "face_recognition_models")))
        return ("here", "") if is_here else ("not here", model.wanted)
    folder, absence = model_folder(model), ""
    lock = _read_lock(folder)
    if lock is None:
        absence = model.wanted
    elif damage := _find_damage(model, folder, lock, is_thorough=False):
        absence = f"{damage}; {model.wanted}"
    elif model.extra == "faces" and find_spec("cv2") is None:
        absence = 'OpenCV is not installed: pip install "dreamloom[faces]"'
    return ("not here", absence) if absence else ("here", "")


def _find_damage(model: Pinned, folder: Path, lock: dict[str, Any], is_thorough: bool) -> str:
    """Compare files with the lock, and the lock with the catalogue; empty if they agree."""
    for file in model.files:
        path, locked = folder / file.name, lock["files"].get(file.name)
        if locked is None or not path.is_file():
            return f"lacks {file.name}"
        if file.sha256 not in {None, locked["sha256"]}:
            return f"was fetched in another version: {file.name} is not the pinned one"
        if path.stat().st_size != locked["bytes"] or (
            is_thorough and file_sha256(path) != locked["sha256"]
        ):
            return f"has changed since it was fetched ({file.name})"
    return ""


def _read_lock(folder: Path) -> dict[str, Any] | None:
    try:
        lock = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = lock.get("files") if isinstance(lock, dict) else None
    is_lock = isinstance(files, dict) and all(
        isinstance(entry, dict) and {"sha256", "bytes"} <= set(entry) for entry in files.values()
    )
    return lock if is_lock else None


def _find_in_package(model: Pinned) -> Kept | Missing:
    # The package is not imported: it asks for pkg_resources, which setuptools has no more.
    spec = find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations or find_spec("dlib") is None:
        return Missing(f"{model.name} is not installed; {model.wanted}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "models"
    for file in model.files:
        path = folder / file.name
        damage = damage_of(file, path) if path.is_file() else "is absent"
        if damage:
            return Missing(f"{model.name} cannot be used: {file.name} {damage}; {model.wanted}")
    return Kept(folder, f"{model.files[0].name}@{(model.files[0].sha256 or '')[:12]}")
