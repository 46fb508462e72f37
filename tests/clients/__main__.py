"""One program in a process of its own: ``python -m clients PROGRAM TASK FOLDER [CHECKOUT]``.

What it finds is one JSON file, ``FOLDER/TASK-PROGRAM.json``.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clients.measure import compare_changes
from clients.small_base import load_base


def read_files(program: Any, made: Any, folder: Path) -> dict[str, Any]:
    """Let a program load each of our files, and compare what it makes of it."""
    found: dict[str, Any] = {}
    for case, files in json.loads((folder / "ours.json").read_text()).items():
        wanted = load_file(folder / f"{case}.changes")
        for format, file in files.items():
            if file.startswith("not written"):
                continue
            try:
                changes = program.apply_file(made, Path(file))
                found[f"{case}|{format}"] = compare_changes(wanted, changes)
            except Exception as error:
                traceback.print_exc()
                told = str(error).strip().splitlines() or [""]
                found[f"{case}|{format}"] = {"refused": f"{type(error).__name__}: {told[0]}"}
    return found


def write_files(program: Any, made: Any, folder: Path) -> dict[str, Any]:
    """Let a program write a file of each kind, with the changes of its own forward pass."""
    written: dict[str, Any] = {}
    for case in program.CASES:
        file = folder / f"{program.__name__.rpartition('.')[2]}-{len(written)}.safetensors"
        try:
            changes = program.write_file(made, case, file)
            save_file({n: t.detach().contiguous() for n, t in changes.items()}, f"{file}.changes")
            written[case] = {"file": str(file), "changes": f"{file}.changes"}
        except Exception as error:
            traceback.print_exc()
            written[case] = {"failed": f"{type(error).__name__}: {error}"}
    return written


def main(name: str, task: str, folder: Path, checkout: str = "") -> None:
    """Run one task of one program."""
    program = importlib.import_module(f"clients.{name}")
    with torch.no_grad():
        made = program.prepare(Path(checkout), load_base(folder))
        found = {"read": read_files, "write": write_files}[task](program, made, folder)
    (folder / f"{task}-{name}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:5])
