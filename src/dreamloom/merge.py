"""Stage 6: several adapters in, one adapter file out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dreamloom.adapters import Adapter, read_adapter, refuse_other_kinds, write_adapter
from dreamloom.combine import Wish, combine, find_method
from dreamloom.errors import AdapterError, ConfigError, RunFolderError
from dreamloom.events import Observer, StageDone, StageStarted, silent
from dreamloom.rundir import Record, RunDir, file_sha256
from dreamloom.runtime import measure_effort


@dataclass(frozen=True)
class Part:
    """One adapter of a merge, and how strongly it goes in."""

    path: Path
    weight: float = 1.0


def parse_part(text: str) -> Part:
    """Read ``FILE`` or ``FILE:WEIGHT`` as typed on the command line.

    Raises:
        ConfigError: If what follows the colon is not a number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or "\\" in weight or Path(text).is_file():
        return Part(Path(text))
    try:
        return Part(Path(path), float(weight))
    except ValueError:
        raise ConfigError(
            f"{text!r} ends in {weight!r}, which is not a weight.", "Write FILE:0.8, or just FILE."
        ) from None


def merge_adapters(
    parts: Sequence[Part],
    out: Path,
    method: str = "sum",
    overwrite: bool = False,
    observe: Observer = silent,
) -> Adapter:
    """Combine adapter files into one that can be loaded alone.

    Returns:
        The merged adapter, as written to ``out``.

    Raises:
        AdapterError: If a file cannot be read, or the adapters belong to different base models.
        ConfigError: If the method is unknown or the weights are not usable.
        RunFolderError: If ``out`` exists and must not be overwritten.
    """
    if out.is_dir():
        raise RunFolderError(f"{out} is a folder.", "Name a .safetensors file.")
    if out.exists() and not overwrite:
        raise RunFolderError(f"{out} exists already.", "Name another file, or add --overwrite.")
    find_method(method)
    observe(StageStarted("merge", f"{len(parts)} adapters"))
    with measure_effort() as effort:
        adapters = [read_adapter(part.path) for part in parts]
        _check_same_base(parts, adapters)
        for part, adapter in zip(parts, adapters, strict=True):
            refuse_other_kinds(adapter, str(part.path), "can be merged")
        merged = combine(adapters, Wish([part.weight for part in parts], method)).adapter
        merged = replace(merged, metadata=_tell(parts, adapters, method))
        write_adapter(out, merged)
    observe(StageDone("merge", effort.seconds, str(out)))
    return merged


def _check_same_base(parts: Sequence[Part], adapters: Sequence[Adapter]) -> None:
    known = {
        adapter.metadata["dreamloom.base_fingerprint"]: (part, adapter)
        for part, adapter in zip(parts, adapters, strict=True)
        if "dreamloom.base_fingerprint" in adapter.metadata
    }
    if len(known) > 1:
        told = ", ".join(
            f"{part.path} ({adapter.metadata.get('dreamloom.base', 'unknown')})"
            for part, adapter in known.values()
        )
        raise AdapterError(
            f"The adapters were made for different base models: {told}.",
            "Only adapters of one base model can be merged.",
        )


def _tell(parts: Sequence[Part], adapters: Sequence[Adapter], method: str) -> dict[str, str]:
    """Say how the file was made, so that it can tell when it is found alone in a folder."""
    story = {
        "dreamloom.kind": "merge",
        "dreamloom.method": method,
        "dreamloom.parts": json.dumps(
            [
                {
                    "file": part.path.name,
                    "sha256": file_sha256(part.path),
                    "weight": part.weight,
                    "subject": adapter.metadata.get("dreamloom.subject", ""),
                }
                for part, adapter in zip(parts, adapters, strict=True)
            ]
        ),
    }
    # The first part is the subject, by custom; its words still name it in the merge.
    for key in (
        "dreamloom.base",
        "dreamloom.base_fingerprint",
        "dreamloom.subject",
        "dreamloom.class_noun",
        "dreamloom.layout",
        "dreamloom.prediction",
        "dreamloom.zero_terminal_snr",
    ):
        found = [adapter.metadata[key] for adapter in adapters if key in adapter.metadata]
        if found:
            story[key] = found[0]
    return story


def record_merge(
    run: RunDir, parts: Sequence[Part], out: Path, merged: Adapter, seconds: float
) -> Record:
    """Write the record of a merge that lies inside a run."""
    record = Record(
        stage="merge",
        inputs={f"part{i}": file_sha256(part.path) for i, part in enumerate(parts)},
        settings={
            "method": merged.metadata["dreamloom.method"],
            "weights": [part.weight for part in parts],
            "files": [_name_within(run, part.path) for part in parts],
        },
        outputs=run.hash_outputs(out),
        results={
            "layers": len(merged.layers),
            "ranks": sorted(set(merged.ranks.values())),
            "norm": merged.norm(),
        },
        seconds=seconds,
    )
    run.write_record(record)
    return record


def _name_within(run: RunDir, path: Path) -> str:
    """Name a file of the run by its place there, for every run calls its adapter the same."""
    inside = path.resolve().is_relative_to(run.path.resolve())
    return path.resolve().relative_to(run.path.resolve()).as_posix() if inside else path.name
