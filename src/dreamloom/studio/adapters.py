"""Adapters that can be chosen: those of runs, of their looks, and files below the root."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dreamloom.core.run_folder import RunFolder
from dreamloom.studio.runs import Run, list_runs
from dreamloom.studio.words import say

SUFFIX = ".safetensors"
_DEEPEST = 3
_NO_ADAPTERS = frozenset(("checkpoints", "images", "latents", "looks", "photos", "priors", "saved"))


@dataclass(frozen=True)
class Adapter:
    """An adapter's file below the root.

    Args:
        root: Where all runs lie.
        path: The file.
        run: The run that it came from; None for a file of its own, such as a merged one.
        update: After how many updates it was kept; None for the run's last.
        saved: Whether it was asked for while the training ran.
    """

    root: Path
    path: Path
    run: Run | None = None
    update: int | None = None
    saved: bool = False

    @property
    def name(self) -> str:
        """The file, as seen from the root."""
        return self.path.relative_to(self.root).as_posix()

    @property
    def id(self) -> str:
        """What addresses and forms call it: no path stands in one."""
        return hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]

    @property
    def label(self) -> str:
        """What it is called on pages."""
        if self.run is None:
            return self.name.removesuffix(SUFFIX)
        if self.update is None:
            return self.run.name
        text = "adapters.saved" if self.saved else "adapters.look"
        return say(text, run=self.run.name, update=self.update)

    @property
    def changed_at(self) -> float:
        """When it was written; 0 where it has gone since."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    @property
    def version(self) -> str:
        """Tells two files of its name apart: what an answer about it depends on."""
        try:
            known = self.path.stat()
        except OSError:
            return ""
        return f"{known.st_mtime_ns} {known.st_size}"


def list_adapters(root: Path) -> list[Adapter]:
    """List all adapters below a root: by run, the one that changed last first, then the files."""
    found = [adapter for run in list_runs(root) for adapter in _list_of_run(root, run)]
    files = [Adapter(root, path) for path in _walk(root, _DEEPEST)]
    return found + sorted(files, key=lambda one: one.changed_at, reverse=True)


def find_adapter(root: Path, adapter_id: str) -> Adapter | None:
    """Find an adapter by what forms call it."""
    return next((one for one in list_adapters(root) if one.id == adapter_id), None)


def _list_of_run(root: Path, run: Run) -> Iterator[Adapter]:
    files = run.files
    if _is_own_file(files.adapter):
        yield Adapter(root, files.adapter, run)
    for path in sorted(files.validation_samples.glob(f"[0-9]*/{files.adapter.name}"), reverse=True):
        if path.parent.name.isdigit() and _is_own_file(path):
            yield Adapter(root, path, run, int(path.parent.name))
    for path in sorted(files.saved_adapters.glob(f"adapter-*{SUFFIX}"), reverse=True):
        number = path.stem.removeprefix("adapter-")
        if number.isdigit() and _is_own_file(path):
            yield Adapter(root, path, run, int(number), saved=True)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Find files of adapters outside runs' own folders."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    own = RunFolder(folder).adapter.name if RunFolder(folder).is_run() else ""
    for entry in entries:
        if entry.name.startswith(".") or entry.name == own:
            continue
        if entry.is_file(follow_symlinks=False) and entry.name.endswith(SUFFIX):
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False) and depth > 1 and entry.name not in _NO_ADAPTERS:
            yield from _walk(Path(entry.path), depth - 1)


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
