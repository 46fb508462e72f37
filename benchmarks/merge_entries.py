"""What methods that look at single entries leave of two random adapters, and what they take.

    python benchmarks/merge_entries.py [--side 1280] [--rank 16] [--seed 0]
    python benchmarks/merge_entries.py --largest
    python benchmarks/merge_entries.py --sdxl [--method ties] [--cut-to 32] [--repeats 2]
    python benchmarks/merge_entries.py --sdxl --threshold model

The first prints a table in Markdown, which stands in `docs/merging-entries.md`: two updates of one
layer, their factors normal, merged at weights 1 and 1, and cut to the rank of both together where
the method's result is no LoRA. The second merges the largest layer of SDXL, 10240 × 1280, from two
adapters of rank 32, each method in a process of its own, and prints the seconds that one thread
computed and the peak of memory above what the process held before; Linux only. The third merges
one layer of each shape that SDXL's adapters change, cut to a rank by all singular vectors, as
`torch.linalg.svd` finds them, and as `combine` does it, and counts up what all 722 layers take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from merge_vs_peft import RANK, SHAPES, WEIGHTS, make_layer

from dreamloom.lora.adapter import Adapter
from dreamloom.merging.factors import Factors, stack, truncate_matrix
from dreamloom.merging.merging import MergeRequest, combine, merge_uncut
from dreamloom.merging.method import Context, LayerPart
from dreamloom.merging.methods import find_method
from dreamloom.merging.ranks import parse_rank

T = TypeVar("T")

METHODS = ("magnitude", "ties", "dare", "della", "breadcrumbs", "sce")
SPACES = ("dense", "knots", "core")
DENSITIES = (0.2, 0.5, 0.9)


def make_parts(shape: tuple[int, int], rank: int, seed: int) -> list[LayerPart]:
    """Make two updates at weight 1."""
    rng = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    return [
        LayerPart(
            Factors(
                torch.randn(outputs, rank, generator=rng),
                torch.randn(rank, inputs, generator=rng),
            ),
            weight=1.0,
            number=number,
        )
        for number in (1, 2)
    ]


def merge(
    parts: Sequence[LayerPart], name: str, space: str, density: float
) -> torch.Tensor | Factors:
    """Merge one layer."""
    method = find_method(name)
    spread = {"spread": min(0.1, 1 - density)} if name == "della" else {}
    options = method.read_options({"space": space, "density": density, **spread})
    return method.merge(parts, Context("layer", options, seed=0, adapters=len(parts)))


def look(parts: Sequence[LayerPart], name: str, space: str, density: float) -> dict[str, float]:
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


def cut_by_all(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a matrix by all of its singular vectors."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def measure_layer(
    way: str, name: str, threshold: str, rank: int, repeats: int, shape: tuple[int, int]
) -> None:
    """Merge one layer from two adapters and cut it, and print what that took as JSON.

    Args:
        way: ``before`` cuts by all singular vectors, ``now`` is `combine`.
        name: The method.
        threshold: ``layer`` or, for methods that know it, ``model``: the same work, done before.
        rank: What is cut to.
        repeats: The quickest counts.
        shape: Outputs and inputs.
    """
    torch.set_num_threads(1)
    # Libraries load before the clock runs.
    torch.linalg.svd(torch.eye(8))
    torch.linalg.eigh(torch.eye(8, dtype=torch.float64))
    adapters = [
        Adapter({"unet.x": make_layer(shape, torch.Generator().manual_seed(seed))})
        for seed in (1, 2)
    ]
    options = {"space": "dense"} | ({} if threshold == "layer" else {"threshold": threshold})
    request = MergeRequest(WEIGHTS, name, options, parse_rank(str(rank)))

    def merge_and_cut() -> tuple[torch.Tensor, torch.Tensor]:
        if way == "before":
            return cut_by_all(next(merge_uncut(adapters, request)).update, rank)
        layer = combine(adapters, request).adapter.layers["unet.x"]
        return layer.up, layer.down

    (up, down), seconds, peak = take_time(merge_and_cut)
    # The peak is that of the first time: later on, the process keeps what it has freed.
    whole = next(merge_uncut(adapters, request)).update
    merging = take_time(lambda: next(merge_uncut(adapters, request)))[1]
    for _ in range(repeats - 1):
        seconds = min(seconds, take_time(merge_and_cut)[1])
        merging = min(merging, take_time(lambda: next(merge_uncut(adapters, request)))[1])
    error = float((whole.double() - up.double() @ down.double()).norm() / whole.double().norm())
    print(json.dumps({"seconds": seconds, "merging": merging, "peak": peak, "error": error}))


def print_sdxl(name: str, threshold: str, rank: int, repeats: int) -> None:
    """Print what a merge of SDXL's full shape takes, by one layer of each shape."""
    print(
        f"{name}, dense, two adapters of rank {RANK} to rank {rank}, one thread\n\n"
        "| layer | how many | merge alone, s | with all singular vectors, s | now, s | ratio "
        "| peak before, MiB | now | error more than the least |\n" + "|---" * 9 + "|",
        flush=True,
    )
    totals = {"before": 0.0, "now": 0.0, "merging": 0.0}
    for shape, count in SHAPES.items():
        settings = [name, threshold, str(rank), str(repeats), *map(str, shape)]
        found = {}
        for way in ("before", "now"):
            command = [sys.executable, __file__, "--layer", way, *settings]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[way] = json.loads(done.stdout)
            totals[way] += count * found[way]["seconds"]
        before, now = found["before"], found["now"]
        totals["merging"] += count * now["merging"]
        print(
            f"| {shape[0]} × {shape[1]} | {count} | {now['merging']:.2f} | {before['seconds']:.2f} "
            f"| {now['seconds']:.2f} | {before['seconds'] / now['seconds']:.1f} "
            f"| {before['peak']:.0f} | {now['peak']:.0f} "
            f"| {now['error'] / before['error'] - 1:.0e} |",
            flush=True,
        )
    cuts = [totals[way] - totals["merging"] for way in ("before", "now")]
    print(
        f"\nall {sum(SHAPES.values())} layers by these counts: {totals['before']:.0f} s before, "
        f"{totals['now']:.0f} s now, {totals['before'] / totals['now']:.1f} times as fast; of that "
        f"the merge {totals['merging']:.0f} s, and the cut {cuts[0]:.0f} s before, {cuts[1]:.0f} s "
        f"now, {cuts[0] / cuts[1]:.1f} times as fast"
    )


def main() -> None:
    """Print one of the three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1280)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--sdxl", action="store_true")
    parser.add_argument("--method", default="ties", choices=METHODS)
    parser.add_argument("--threshold", default="layer", choices=("layer", "model"))
    parser.add_argument("--cut-to", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--layer", nargs=7, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(*given.one)
    elif given.layer:
        way, name, threshold, rank, repeats, outputs, inputs = given.layer
        shape = int(outputs), int(inputs)
        measure_layer(way, name, threshold, int(rank), int(repeats), shape)
    elif given.largest:
        print_largest()
    elif given.sdxl:
        print_sdxl(given.method, given.threshold, given.cut_to, given.repeats)
    else:
        print_table(given.side, given.rank, given.seed)


if __name__ == "__main__":
    main()
