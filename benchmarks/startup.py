"""How long the command line and the library take to start, in seconds of processor time.

Each is started in a process of its own, in turn, and its user and system time is read when it has
ended: wall time depends on what else runs. An empty program is measured beside them.

    python benchmarks/startup.py [--rounds 9] [--json FILE]
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from dreamloom.core.run_folder import library_versions, write_json

PROGRAMS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import dreamloom": [sys.executable, "-c", "import dreamloom"],
    "dreamloom --help": [sys.executable, "-m", "dreamloom", "--help"],
    "dreamloom train --help": [sys.executable, "-m", "dreamloom", "train", "--help"],
}
GOALS_S = {"import dreamloom": 0.1, "dreamloom --help": 0.2}


def measure_start(program: list[str]) -> float:
    """Run a program to its end; give the seconds of processor time that it and its children took.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    before = os.times()
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def main() -> None:
    """Start each in turn, and print the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for program in PROGRAMS.values():
        measure_start(program)  # its compiled modules are written once
    taken: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(given.rounds):
        for name, program in PROGRAMS.items():
            taken[name].append(measure_start(program))
    for name, seconds in taken.items():
        goal = f"goal {GOALS_S[name]:.2f}" if name in GOALS_S else ""
        middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
        print(f"{name:24} {middle:.3f} s ({least:.3f} to {most:.3f})  {goal}".rstrip())
    if given.json:
        write_json(given.json, {"seconds": taken, "versions": library_versions()})


if __name__ == "__main__":
    main()
