"""Seconds of processor time per update: ours beside diffusers' own training script, unchanged.

    OMP_NUM_THREADS=1 python benchmarks/train_vs_diffusers.py --script train_dreambooth_lora_sdxl.py
        [--rounds 3] [--updates 8] [--case NAME ...] [--check] [--json FILE]

The script is ``examples/dreambooth/train_dreambooth_lora_sdxl.py`` of diffusers; download it.
Both sides teach the same SDXL of 98 M parameters with random weights (`small_sdxl.py`), from the
same photos, class images and prompts: rank 16, one photo and one class image an update, float32,
one thread, AdamW, constant rate. They run by turns, each time in a process of its own
(`run_training.py`). An update's time is the processor time between two optimizer steps; the first
two updates are left out. A round's figure is the median of its updates; the ratio is that of the
medians over the rounds. What differs: with text encoders, the script also teaches the first one's
last layer, which SDXL does not read.

With ``--check`` twenty updates of both sides meet the same noise, timesteps, pictures and first
weights, and their adapters are compared.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from small_sdxl import make_pictures, make_small_sdxl

from dreamloom.core.run_folder import library_versions

WARM_UP = 2
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """What is compared, and flags of the script alone."""

    name: str
    px: int
    text: bool = False
    script: tuple[str, ...] = ()
    bar: float = 1.6

    def flags(self, who: str) -> list[str]:
        """List the arguments of one side."""
        own = self.script if who == "script" else ()
        return ["--px", str(self.px), *(["--text"] if self.text else []), *own]


CASES = [
    *(
        Case(f"{px} px, text encoders {'taught' if text else 'frozen'}", px, text)
        for px in (128, 256)
        for text in (False, True)
    ),
    Case("128 px, script with checkpointing", 128, script=("--checkpointing",), bar=2.7),
]


def run(who: str, case: Case, given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train once in a process of its own; return its times."""
    with TemporaryDirectory(dir=work) as folder:
        result = Path(folder) / "times.json"
        command = [
            *(sys.executable, str(HERE / "run_training.py"), who, "--script", str(given.script)),
            *("--model", str(work / "model"), "--pictures", str(work / f"{case.px}")),
            *("--out", folder, "--updates", str(given.updates), "--result", str(result)),
            *case.flags(who),
        ]
        done = subprocess.run(
            command, env=quiet_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode or not result.exists():
            raise RuntimeError(f"{who} failed at {case.name}:\n{done.stderr[-2000:]}")
        return dict(json.loads(result.read_text()))


def quiet_environment() -> dict[str, str]:
    """One thread, and nothing from the network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def measure(case: Case, given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Compare both sides over some rounds."""
    seconds: dict[str, list[float]] = {"script": [], "ours": []}
    peaks: dict[str, float] = {}
    for _ in range(given.rounds):
        for who in ("script", "ours"):
            found = run(who, case, given, work)
            seconds[who].append(statistics.median(found["cpu_seconds"][WARM_UP:]))
            peaks[who] = found["peak_mib"]
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    return {
        "case": case.name,
        "rounds": seconds,
        "seconds": medians,
        "ratio": medians["script"] / medians["ours"],
        "bar": case.bar,
        "peak_mib": peaks,
    }


def tell(found: dict[str, Any]) -> str:
    """One line of the table."""
    script, ours = found["seconds"]["script"], found["seconds"]["ours"]
    peaks = found["peak_mib"]
    verdict = "yes" if found["ratio"] >= found["bar"] else "no"
    return (
        f"| {found['case']} | {script:.3f} | {ours:.3f} | {found['ratio']:.2f} | {found['bar']} "
        f"| {verdict} | {peaks['script']:.0f} / {peaks['ours']:.0f} |"
    )


def describe_machine() -> dict[str, Any]:
    """Name the processor, the day and the libraries."""
    processor = platform.processor() or platform.machine()
    details = Path("/proc/cpuinfo")
    if details.exists():
        names = [one for one in details.read_text().splitlines() if one.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "date": date.today().isoformat(),
        "versions": library_versions(),
    }


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--case", action="append", help="part of a case's name; all without")
    parser.add_argument("--check", action="store_true", help="compare what is learned instead")
    parser.add_argument("--work", type=Path, help="folder for model and pictures, kept")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not given.script.is_file():
        parser.error(f"--script {given.script} is no file; download it from diffusers' repository")
    with TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        make_small_sdxl(work / "model")
        for px in sorted({case.px for case in CASES}):
            make_pictures(work / str(px) / "photos", 4, px, seed=1)
            make_pictures(work / str(px) / "priors", 4, px, seed=2)
        found = check(given, work) if given.check else compare(given, work)
    if given.json:
        given.json.write_text(json.dumps({**describe_machine(), **found}, indent=2))


def compare(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure the cases that were asked for, and print a table of them."""
    chosen = [
        case for case in CASES if not given.case or any(part in case.name for part in given.case)
    ]
    print("| case | script, s | ours, s | times faster | asked | holds | peak MiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for case in chosen:
        rows.append(measure(case, given, work))
        print(tell(rows[-1]), flush=True)
    return {"cases": rows}


def check(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Let both sides learn the same; compare adapters."""
    found = {}
    for text in (False, True):
        with TemporaryDirectory(dir=work) as folder:
            learn("script", Case("check", 128, text), given, work, Path(folder))
            told = learn("ours", Case("check", 128, text), given, work, Path(folder))
            name = f"text encoders {'taught' if text else 'frozen'}"
            found[name] = json.loads(told.splitlines()[-1])
            print(f"{name}: {found[name]}", flush=True)
    return {"check": found}


def learn(who: str, case: Case, given: argparse.Namespace, work: Path, folder: Path) -> str:
    """Train one side in a process of its own; return what it printed."""
    with TemporaryDirectory(dir=folder) as out:
        command = [
            *(sys.executable, str(HERE / "same_training.py"), who, "--script", str(given.script)),
            *("--model", str(work / "model"), "--pictures", str(work / "128"), "--updates", "20"),
            *("--out", out, "--result", str(folder / "told.safetensors")),
            *case.flags(who),
        ]
        done = subprocess.run(
            command, env=quiet_environment(), capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{who} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
