"""What methods that look at single entries leave of two random adapters, and what they take.

    python benchmarks/merge_entries.py [--side 1280] [--rank 16] [--seed 0]
    python benchmarks/merge_entries.py --largest

The first prints a table in Markdown, which stands in `docs/merging-entries.md`: two updates of one
layer, their factors normal, merged at weights 1 and 1, and cut to the rank of both together where
the method's result is no LoRA. The second merges the largest layer of SDXL, 10240 × 1280, from two
adapters of rank 32, each method in a process of its own, and prints the seconds that one thread
computed and the peak of memory above what the process held before; Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from dreamloom.combine import Context, Part, find_method
from dreamloom.combine.factors import Factors, stack, truncate_matrix

T = TypeVar("T")

METHODS = ("magnitude", "ties", "dare", "della", "breadcrumbs", "sce")
SPACES = ("dense", "knots", "core")
DENSITIES = (0.2, 0.5, 0.9)


def make_parts(shape: tuple[int, int], rank: int, seed: int) -> list[Part]:
    """Make two updates at weight 1."""
    dice = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    return [
        Part(
            Factors(
                torch.randn(outputs, rank, generator=dice),
                torch.randn(rank, inputs, generator=dice),
            ),
            weight=1.0,
            number=number,
        )
        for number in (1, 2)
    ]


def merge(parts: Sequence[Part], name: str, space: str, density: float) -> torch.Tensor | Factors:
    """Merge one layer."""
    method = find_method(name)
    spread = {"spread": min(0.1, 1 - density)} if name == "della" else {}
    options = method.read_options({"space": space, "density": density, **spread})
    return method.merge(parts, Context("layer", options, seed=0, adapters=len(parts)))


def look(parts: Sequence[Part], name: str, space: str, density: float) -> dict[str, float]:
    """What a merged layer is like, before and after it is cut to the rank of its parts together."""
    plain = stack([(part.factors, part.weight) for part in parts]).multiply()
    merged = merge(parts, name, space, density)
    if isinstance(merged, Factors):
        whole = written = merged.multiply()
    else:
        together = sum(part.factors.rank for part in parts)
        whole, written = merged, truncate_matrix(merged, together).multiply()
    return {
        "kept": float(written.norm() ** 2 / whole.norm() ** 2),
        "strength": float((written * plain).sum() / plain.norm() ** 2),
        "off": float((whole - plain).norm() / plain.norm()),
        "off as written": float((written - plain).norm() / plain.norm()),
    }


def print_table(side: int, rank: int, seed: int) -> None:
    """Print every method and density, a space beside the other."""
    parts = make_parts((side, side), rank, seed)
    print(
        "| method | density | dense: energy kept | off the sum, uncut | as written | strength "
        "| knots: off the sum | strength | core: off the sum | strength |"
    )
    print("|---" * 10 + "|")
    for name in METHODS:
        for density in DENSITIES:
            dense, knots, core = (look(parts, name, space, density) for space in SPACES)
            cells = [
                f"{dense['kept']:.0%}",
                f"{dense['off']:.2f}",
                f"{dense['off as written']:.2f}",
            ]
            cells += [f"{dense['strength']:.2f}"]
            for one in (knots, core):
                cells += [f"{one['off as written']:.2f}", f"{one['strength']:.2f}"]
            print(f"| {name} | {density:g} | " + " | ".join(cells) + " |", flush=True)


def read_mib(field: str) -> float:
    """What the process holds (VmRSS), or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(name: str, space: str) -> None:
    """Merge the largest layer once and print what it took."""
    torch.set_num_threads(1)
    parts = make_parts((10240, 1280), 32, seed=0)
    merge(make_parts((64, 64), 4, seed=0), name, space, 0.5)  # libraries load before the clock runs
    merged, seconds, peak = take_time(lambda: merge(parts, name, space, 0.5))
    if isinstance(merged, Factors):
        numbers = merged.up.numel() + merged.down.numel()
    else:
        numbers = merged.numel()
    print(f"| {name} | {space} | {seconds:.1f} | {peak:.0f} | {numbers * 4 / 2**20:.0f} |")
    if name == "magnitude" and isinstance(merged, torch.Tensor):
        _, seconds, peak = take_time(lambda: truncate_matrix(merged, 64))
        print(f"| then cut to rank 64 | {space} | {seconds:.1f} | {peak:.0f} | 3 |")


def take_time(work: Callable[[], T]) -> tuple[T, float, float]:
    """What comes of some work, its seconds, and its peak of memory above what was held, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = read_mib("VmRSS"), time.process_time()
    done = work()
    return done, time.process_time() - start, read_mib("VmHWM") - before


def print_largest() -> None:
    """Print every method and space, each measured in a process of its own."""
    print("| method | space | seconds | peak above the adapters, MiB | of that the result |")
    print("|---|---|---|---|---|", flush=True)
    for name in METHODS:
        for space in SPACES:
            subprocess.run([sys.executable, __file__, "--one", name, space], check=True)


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1280)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(*given.one)
    elif given.largest:
        print_largest()
    else:
        print_table(given.side, given.rank, given.seed)


if __name__ == "__main__":
    main()
