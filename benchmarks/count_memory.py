"""Count what a full-size SDXL needs of a GPU's memory, without a GPU and without its weights.

    python benchmarks/count_memory.py            counts six settings and compares them with plan
    python benchmarks/count_memory.py --write    makes the tables that `dreamloom plan` reads

Counted are the tensors that the real modules make, on fake tensors. It takes some minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dreamloom.memory.measure import count_table
from dreamloom.memory.phases import Case, count_phases
from dreamloom.memory.predict import GIB, Setting, predict_memory_use
from dreamloom.memory.table import PICTUREBOOK_FILE, SDXL_FILE, read_table
from dreamloom.models.base import AdapterSpec, MemoryOptions
from dreamloom.picturebook import weights_folder

COMMAND = "python benchmarks/count_memory.py --write"
# Checkpointing, storage, whether parts take turns: from roomy to tight.
SETTINGS = (
    ("none", "whole", False),
    ("high", "whole", False),
    ("low", "whole", True),
    ("full", "whole", True),
    ("full", "int8", True),
    ("full", "nf4", True),
)


def compare(resolution_px: int) -> list[dict[str, object]]:
    """Count and predict each setting: rank 16, both text encoders taught, one image a pass."""
    rows = []
    for levels, kind, in_turn in SETTINGS:
        spec = AdapterSpec(16, 16.0, "attention", 0, text_encoders=True)
        counted = count_phases(Case(resolution_px, spec, levels, MemoryOptions(kind, in_turn)))
        setting = Setting(
            resolution_px,
            text_encoders=True,
            gradient_checkpointing=levels,
            quantization=kind,
            cpu_offload=in_turn,
        )
        predicted = predict_memory_use(read_table(), setting).phases
        row = {"checkpointing": levels, "base": kind, "in turn": in_turn}
        for phase, size in counted.items():
            row[phase] = [round(size / GIB, 2), round(predicted[phase] / GIB, 2)]
        most, told = max(counted.values()), max(predicted.values())
        row["peak"] = [round(most / GIB, 2), round(told / GIB, 2)]
        row["off by"] = round(told / most - 1, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="make plan's tables")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="write the comparison there")
    given = parser.parse_args()
    if given.write:
        small = weights_folder()
        for file, side, folder in ((SDXL_FILE, 1024, None), (PICTUREBOOK_FILE, 128, small)):
            table = count_table(COMMAND, side, folder, lambda case: print(case, flush=True))
            file.write_text(table.as_json(), encoding="utf-8")
            print(f"written: {file}")
        return
    rows = compare(given.resolution)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
