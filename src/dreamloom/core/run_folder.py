"""The run folder: names of files, atomic writes, records of stages, fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from dreamloom.core.errors import RunFolderError
from dreamloom.core.events import Event, Observer
from dreamloom.core.toml_files import ClosedModel, write_out_bytes

TEMPORARY = ".writing-"
"""How the names of files begin that are being written."""

_LIBRARIES = ("dreamloom", "torch", "diffusers", "transformers", "peft", "safetensors", "pillow")


class Record(ClosedModel):
    """What one stage did: enough to repeat it, and to know whether it must be repeated."""

    stage: str
    """The stage's name, for example ``train``."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Fingerprints of everything that the result depends on, by name."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The stage's settings, resolved."""
    outputs: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each file written, by its path inside the run folder."""
    results: dict[str, Any] = Field(default_factory=dict)
    """Figures of the stage itself: losses, counts, scores."""
    base: dict[str, str] = Field(default_factory=dict)
    """The base model: name, fingerprint, revision."""
    seed: int | None = None
    runtime: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0
    finished_at: str = Field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds")
    )
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())


def library_versions() -> dict[str, str]:
    """Name the versions of Python and the libraries that a result may depend on."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(*values: Any) -> str:
    """Hash plain values (numbers, text, lists, dictionaries, dataclasses, paths): 64 hex digits.

    Names in dictionaries are text; their order does not matter. A list and a tuple of the same
    values are the same.
    """
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, default=_plain, separators=(",", ":")).encode()
    ).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot fingerprint a {type(value).__name__}")


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` when the block succeeds.

    A block that fails, or a process that dies in it, leaves ``path`` as it was; so does a power
    cut, for the contents reach the disk before the name does. The temporary name keeps the
    suffix, because some writers choose their format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix}"
    # Made here, the file has the mode of any other new one; only the system knows the umask
    # without changing it for all threads. A writer that replaces the file may make it private.
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = os.fstat(handle).st_mode & 0o777
    os.close(handle)
    try:
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    if path.is_dir():
        # Windows opens no folders, and some network drives sync none.
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Let what the system says of a block that only writes be an error that names ``path``.

    Raises:
        RunFolderError: If the disk is full, may not be written to, or fails.
    """
    try:
        yield
    except (OSError, RunFolderError) as error:
        # A writer inside may have said so of a temporary name.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise RunFolderError(
            f"{path} cannot be written: {cause.strerror or cause}.",
            "Make room there, or name another place to write; nothing was half-written.",
        ) from cause


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder; if the block succeeds, it takes the place of ``path``.

    A block that fails leaves ``path`` as it was, and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as workplace:
        fresh = Path(workplace) / path.name
        fresh.mkdir()
        yield fresh
        for written in (*(file for file in fresh.rglob("*") if file.is_file()), fresh):
            _sync(written)
        old = Path(workplace) / "old"
        if path.exists():
            path.rename(old)
        try:
            fresh.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        # Names of files may hold bytes that are no UTF-8; JSON takes what stands for them.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """Spell plain values and records as JSON, as files have it."""
    return json.dumps(value, indent=2, default=_plain, ensure_ascii=False)


class RunFolder:
    """One run's folder: where everything lies, and what has been done."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.settings_file = self.path / "loom.toml"
        """Every setting, resolved."""
        self.events_file = self.path / "events.jsonl"
        """What happened, one JSON object a line."""
        self.records = self.path / "records"
        """One JSON record per stage."""
        self.adapter = self.path / "adapter.safetensors"
        """What training made."""
        """The same for ComfyUI and AUTOMATIC1111, where it was asked for."""
        self.checkpoints = self.path / "checkpoints"
        """What an interrupted training goes on from."""
        self.latents = self.path / "latents"
        """Encoded crops, while a training is not finished."""
        self.validation_samples = self.path / "looks"
        """Pictures, scores and adapters from within the training, by the update."""
        self.validation_prompts = self.validation_samples / "prompts.json"
        """The prompts of these pictures, where they were changed while the training ran."""
        self.saved_adapters = self.path / "saved"
        """Adapters that were asked for while the training ran, by the update."""
        self.training_file = self.path / "training.json"
        """Which process trains, while one does."""
        self.requests = self.path / "requests"
        """What a running training was asked for and has not taken yet."""
        self.priors = self.path / "priors"
        """Class images drawn by the base model."""
        self.photos = self.path / "photos"
        """Upright, cropped copies of the photos, without location data."""
        self.images = self.path / "images"
        """Pictures, one folder with a manifest per set."""
        self.grids = self.path / "grids"
        """Grids of pictures: which sets their cells are, and a contact sheet of each."""
        self.scores = self.path / "scores.json"
        """Scores by image set."""
        self.report = self.path / "report.html"
        """The page that tells the run's story."""

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def refuse_other_folders(self) -> None:
        """Check that the folder can be this run's, without making it.

        Raises:
            RunFolderError: If the path is a file, or a folder with other things in it.
        """
        if self.path.is_file():
            raise RunFolderError(
                f"{self.path} is a file, not a folder.", "Name a folder with --out."
            )
        if self.path.is_dir() and any(self.path.iterdir()) and not self.is_run():
            raise RunFolderError(
                f"{self.path} already holds other files and is not a run of DreamLoom.",
                "Name a new or empty folder with --out.",
            )

    def claim(self) -> None:
        """Make the folder, or accept an empty one or a run; see `refuse_other_folders`."""
        self.refuse_other_folders()
        self.records.mkdir(parents=True, exist_ok=True)

    def is_run(self) -> bool:
        """Say whether this folder was made by DreamLoom."""
        return self.settings_file.is_file() or self.records.is_dir()

    def record_file(self, stage: str) -> Path:
        """Where a stage's record lies; an image set's stage may be named ``generate-table``."""
        return self.records / f"{stage}.json"

    def write_record(self, record: Record) -> None:
        """Write a stage's record: the sign that the stage is finished."""
        write_text(self.record_file(record.stage), record.model_dump_json(indent=2) + "\n")

    def read_record(self, stage: str) -> Record | None:
        """Read a stage's record; None if the stage has not finished, or its record is damaged.

        Fields that another version of DreamLoom wrote are passed over.
        """
        path = self.record_file(stage)
        if not path.is_file():
            return None
        try:
            written = dict(json.loads(path.read_text(encoding="utf-8")))
            known = {name: written[name] for name in Record.model_fields if name in written}
            return Record.model_validate(known)
        except (ValueError, TypeError):
            return None

    def finished(self, stage: str, inputs: Mapping[str, str]) -> Record | None:
        """Return a stage's record if it was made from just these inputs and its files are there.

        A file whose bytes are not those that were written, such as an adapter cut off by a full
        disk, is as good as gone.
        """
        record = self.read_record(stage)
        if record is None or record.inputs != write_out_bytes(dict(inputs)):
            return None
        return record if not self.list_changed(record) else None

    def list_changed(self, record: Record) -> list[str]:
        """List the outputs of a record that are gone or not as they were written."""
        return [
            name
            for name, sha256 in record.outputs.items()
            if not (self.path / name).is_file() or file_sha256(self.path / name) != sha256
        ]

    def hash_outputs(self, *paths: Path) -> dict[str, str]:
        """Hash files of this run for a record, by their path inside the folder."""
        return {str(path.relative_to(self.path)): file_sha256(path) for path in paths}

    def observer(self) -> Observer:
        """Make an observer that appends each event to ``events.jsonl``."""

        def observe(event: Event) -> None:
            entry = {
                "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "event": type(event).__name__,
                **dataclasses.asdict(event),
            }
            with self.events_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

        return observe
