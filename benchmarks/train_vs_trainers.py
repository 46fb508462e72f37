"""Every trainer of SDXL LoRAs side by side on a processor: seconds, memory, loss.

    python benchmarks/train_vs_trainers.py
        --trainer kohya=CHECKOUT --python kohya=VENV/bin/python
        --trainer diffusers=CHECKOUT --trainer advanced=CHECKOUT
        --trainer onetrainer=CHECKOUT --python onetrainer=VENV/bin/python
        [--px 128 256] [--rounds 3] [--updates 12] [--check 32] [--full-size] [--json FILE]

Trainers are run from checkouts that you download, their files unchanged, each with the Python that
has what it requires; without ``--python`` it is this one. Ours is always among them. All teach the
same SDXL of 98 M parameters with random weights from the same pictures: rank 16, alpha 16, the
attention layers, float32, torch's AdamW, two images an update (a photo and a class image where
the trainer pairs them), latents and prompts cached where it can, text encoders frozen, nothing
recomputed, one thread. ``trainer_launchers.py`` says what each is given, and what of kohya's code
is set from outside. ``kohya-all`` is kohya with the layers that it teaches by itself, all linear
ones of the transformers; ``ours-all`` is ours with the same.

They run by turns, each time in a process of its own. An update's time is the processor time between
two optimizer steps; the first two are left out. A round's figure is the median of its updates, the
table's that of the rounds. The share of the limit is the operations of one update, counted by torch
on the U-Net that is taught, over what a large product of matrices does in that time; its rate
is the best of those measured between the runs, by the faster of torch's two libraries. A second
table says the same by phase: the denoiser's forward pass, autograd's backward pass, the optimizer's
step, and the rest of an update. Encoding is in what precedes the first step.

The loss is measured by our code on the same photos, noise and timesteps for the base and for each
adapter, as its trainer wrote it after ``--check`` updates in the first round; so a trainer that
leaves out work does not pass for a fast one. With ``--full-size`` the base is SDXL at its real size
with random weights: 6.5 GiB on disk, and trainers hold 15 GiB and more in float32.

SimpleTuner is not among them: it and what it requires ask for Python 3.12, where it was not tried.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from run_training import PHASES
from small_sdxl import make_pictures
from train_vs_diffusers import WARM_UP, describe_machine, quiet_environment
from trainer_base import count_update, make_base
from trainer_launchers import LAUNCHERS

from dreamloom.models.matrix_products import measure_matrix_rate

HERE = Path(__file__).parent
OURS = ("ours", "ours-all")


@dataclass
class Row:
    """What is known of one trainer at one size.

    Args:
        trainer: Its name.
        px: Side of the pictures.
        rounds: Median seconds of processor time per update.
        peak_mib: Most resident memory.
        first: Seconds of processor time until the first optimizer step.
        phases: For each phase the median seconds of each round.
        loss: With its adapter, or why there is none.
        failed: The last line of its error.
    """

    trainer: str
    px: int
    rounds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    first: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: {one: [] for one in PHASES})
    loss: float | str | None = None
    failed: str = ""

    @property
    def seconds(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)


@dataclass
class Size:
    """What is known of one size of pictures.

    Args:
        px: Their side.
        flop: Operations of one update with attention layers taught, by phase.
        rows: One for each trainer.
        base_loss: Loss of the base alone.
    """

    px: int
    flop: dict[str, float]
    rows: list[Row]
    base_loss: float | str | None = None


def measure_rate() -> float:
    """Measure how many operations a second of processor time has in a large product."""
    return 1e12 * measure_matrix_rate(torch.device("cpu"), torch.float32, clock=time.process_time)


def train(row: Row, updates: int, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train once in a process of its own; return its times and where its adapter is."""
    result = folder / "result.json"
    command = [
        given.python.get(row.trainer, sys.executable),
        *(str(HERE / "trainer_launchers.py"), row.trainer, "--model", str(given.base)),
        *("--checkout", str(given.trainer.get(row.trainer, HERE))),
        *("--pictures", str(given.work / str(row.px)), "--out", str(folder)),
        *("--px", str(row.px), "--updates", str(updates - 1), "--result", str(result)),
    ]
    done = subprocess.run(
        command,
        env=quiet_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * given.minutes,
    )
    if done.returncode or not result.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return dict(json.loads(result.read_text()))


def take_turn(row: Row, first: bool, given: argparse.Namespace) -> None:
    """Train once more by one trainer, and add what was found to its row."""
    updates = given.check if first and given.check else given.updates
    with TemporaryDirectory(dir=given.work) as scratch:
        try:
            found = train(row, updates, given, Path(scratch))
            if first and given.check:
                shutil.copy(found["adapter"], name_adapter(row, given))
        except Exception as error:
            # Whatever it is, the others go on.
            row.failed = (str(error).strip() or type(error).__name__).splitlines()[-1]
            return
    row.rounds.append(statistics.median(found["cpu_seconds"][WARM_UP:]))
    row.first.append(found["cpu_seconds_to_first_step"])
    for phase, seconds in found["phases"].items():
        row.phases[phase].append(statistics.median(seconds[WARM_UP:]))
    row.peak_mib = max(row.peak_mib, found["peak_mib"])


def name_adapter(row: Row, given: argparse.Namespace) -> Path:
    """Say where the adapter of a trainer is kept."""
    folder = given.work / "adapters" / str(row.px)
    folder.mkdir(parents=True, exist_ok=True)
    return Path(folder / f"{row.trainer}.safetensors")


def judge(size: Size, given: argparse.Namespace) -> None:
    """Measure the losses of the base and of all adapters, in a process of its own."""
    trained = [row for row in size.rows if row.rounds]
    with TemporaryDirectory(dir=given.work) as scratch:
        result = Path(scratch) / "losses.json"
        command = [
            *(sys.executable, str(HERE / "trainer_base.py"), "--model", str(given.base)),
            *("--pictures", str(given.work / str(size.px)), "--px", str(size.px)),
            *("--out", scratch, "--result", str(result)),
            *(str(name_adapter(row, given)) for row in trained),
        ]
        done = subprocess.run(
            command, env=quiet_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"no loss was measured:\n{done.stderr[-2000:]}")
        losses = json.loads(result.read_text())
    size.base_loss = losses["base"]
    for row in trained:
        row.loss = losses[row.trainer]


def compare(sizes: list[Size], rates: list[float], px: int, given: argparse.Namespace) -> None:
    """Let all trainers take their turns at one size."""
    rows = [Row(name, px) for name in given.names]
    size = Size(px, count_update(given.base, px), rows)
    sizes.append(size)
    for number in range(given.rounds):
        for row in rows:
            if row.failed:
                continue
            rates.append(measure_rate())
            take_turn(row, number == 0, given)
            told = row.failed or f"{row.rounds[-1]:.3f} s"
            print(f"  {px} px, round {number + 1}, {row.trainer}: {told}", flush=True)
            keep(sizes, rates, given)
        if number == 0 and given.check:
            judge(size, given)


def keep(sizes: list[Size], rates: list[float], given: argparse.Namespace) -> None:
    """Write what is known so far."""
    if given.json:
        told = {**describe_machine(), "matrix_flop_per_second": max(rates)}
        kept = [describe(size, max(rates)) for size in sizes]
        given.json.write_text(json.dumps({**told, "sizes": kept}, indent=2) + "\n")


def describe(size: Size, rate: float) -> dict[str, Any]:
    """Put the figures of one size into words for a file."""
    ours = {row.trainer: row.seconds for row in size.rows if row.trainer in OURS and row.rounds}
    rows, flop = [], sum(size.flop.values())
    for row in size.rows:
        told = {"trainer": row.trainer, "failed": row.failed}
        if row.rounds:
            own = ours.get("ours-all" if row.trainer.endswith("-all") else "ours")
            phases = {phase: statistics.median(seconds) for phase, seconds in row.phases.items()}
            told |= {
                "phases": {**phases, "rest": row.seconds - sum(phases.values())},
                "seconds": row.seconds,
                "times_ours": row.seconds / own if own else None,
                "rounds": row.rounds,
                "share": None if row.trainer.endswith("-all") else flop / row.seconds / rate,
                "peak_mib": row.peak_mib,
                "seconds_to_first_step": statistics.median(row.first),
                "loss": row.loss,
            }
        rows.append(told)
    return {"px": size.px, "flop": size.flop, "base_loss": size.base_loss, "trainers": rows}


def tell(size: Size, rate: float) -> str:
    """Make the table of one size."""
    told = describe(size, rate)
    lines = [
        f"\n{size.px} px: {sum(size.flop.values()) / 1e9:.1f} GFLOP an update, matrix rate "
        f"{rate / 1e9:.1f} GFLOP/s, loss of the base {tell_number(size.base_loss, '.5f')}\n",
        "| trainer | s/update | times ours | share of the limit | to the first step, s "
        "| peak MiB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in told["trainers"]:
        if row["failed"]:
            lines.append(f"| {row['trainer']} | failed: {row['failed'][:160]} | | | | | |")
            continue
        times, share, loss = (
            tell_number(row[name], form)
            for name, form in (("times_ours", ".2f"), ("share", ".0%"), ("loss", ".5f"))
        )
        lines.append(
            f"| {row['trainer']} | {row['seconds']:.3f} | {times} | {share} "
            f"| {row['seconds_to_first_step']:.1f} | {row['peak_mib']:.0f} | {loss} |"
        )
    return "\n".join([*lines, *tell_phases(size, rate, told["trainers"])])


def tell_phases(size: Size, rate: float, rows: list[dict[str, Any]]) -> list[str]:
    """Make the lines of the table of phases."""
    lines = [
        "",
        "| trainer, seconds (share of the limit) | " + " | ".join([*PHASES, "rest"]) + " |",
    ]
    lines.append("|---" * (len(PHASES) + 2) + "|")
    for row in rows:
        cells = [
            f"{seconds:.3f} ({flop / seconds / rate:.0%})" if flop else f"{seconds:.3f}"
            for phase, seconds in row.get("phases", {}).items()
            for flop in (None if row["trainer"].endswith("-all") else size.flop.get(phase),)
        ]
        if cells:
            lines.append(f"| {row['trainer']} | " + " | ".join(cells) + " |")
    return lines


def tell_number(value: float | str | None, form: str) -> str:
    """Write a number, or what is said in its place."""
    return format(value, form) if isinstance(value, float) else value or "–"


def split_pair(text: str) -> tuple[str, str]:
    """Split ``name=path``."""
    name, mark, path = text.partition("=")
    if not mark or name not in LAUNCHERS:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=PATH of {', '.join(LAUNCHERS)}")
    return name, os.path.abspath(path)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trainer", type=split_pair, action="append", default=[], help="NAME=CHECKOUT")
    add("--python", type=split_pair, action="append", default=[], help="NAME=its interpreter")
    add("--px", type=int, nargs="+", default=[128, 256])
    add("--rounds", type=int, default=3)
    add("--updates", type=int, default=12, help="of a training; OneTrainer rounds up to fours")
    add("--check", type=int, default=32, help="updates of the first round; 0 judges nothing")
    add("--full-size", action="store_true", help="SDXL's real size instead of 98 M parameters")
    add("--minutes", type=float, default=20, help="for one training")
    add("--work", type=Path, help="folder for model and pictures, kept")
    add("--json", type=Path)
    given = parser.parse_args()
    given.trainer, given.python = dict(given.trainer), dict(given.python)
    alike = "ours-all" if any(name.endswith("-all") for name in given.trainer) else "ours"
    given.names = list(dict.fromkeys(["ours", *given.trainer, alike]))
    return given


def main() -> None:
    """Measure, print tables, and write the figures as they come."""
    given = parse()
    torch.set_num_threads(1)
    sizes: list[Size] = []
    rates = [measure_rate()]
    with TemporaryDirectory() as scratch:
        given.work = (given.work or Path(scratch)).resolve()
        given.work.mkdir(parents=True, exist_ok=True)
        name = "full" if given.full_size else "small"
        given.base = make_base(given.work / name, given.full_size)
        for px in given.px:
            for kind, seed in (("photos", 1), ("priors", 2)):
                if not (given.work / str(px) / kind).exists():
                    make_pictures(given.work / str(px) / kind, 4, px, seed=seed)
            compare(sizes, rates, px, given)
        for size in sizes:
            print(tell(size, max(rates)), flush=True)


if __name__ == "__main__":
    main()
