"""The record of a merge that lies inside a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dreamloom.core.run_folder import Record, RunFolder, file_sha256
from dreamloom.lora.adapter import Adapter
from dreamloom.merging.files.recipe import AdapterPart


def record_merge(
    run: RunFolder, parts: Sequence[AdapterPart], out: Path, merged: Adapter, seconds: float
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


def _name_within(run: RunFolder, path: Path) -> str:
    """Name a file of the run by its place there, for every run calls its adapter the same."""
    inside = path.resolve().is_relative_to(run.path.resolve())
    return path.resolve().relative_to(run.path.resolve()).as_posix() if inside else path.name
