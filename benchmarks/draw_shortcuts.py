"""What guidance in an interval and deep levels reused save, and how far the pictures move.

Each way draws the same shots in one process, in turn; seconds are the processor's, their median
over the rounds. PSNR is that of each picture to the same one drawn in full, the median over the
shots: how far pictures move is no measure of how good they are.

    OMP_NUM_THREADS=1 python benchmarks/draw_shortcuts.py [--base picturebook] [--adapter FILE]
        [--prompt TEXT] [--seeds 8] [--steps 30] [--rounds 3] [--json FILE]
"""

import argparse
import math
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from draw_vs_diffusers import measure_decibels
from PIL import Image

from dreamloom.core.device import pick_runtime
from dreamloom.core.run_folder import library_versions, write_json
from dreamloom.lora.reading import read_adapter
from dreamloom.models.base import Sampler, Shot
from dreamloom.models.families import load_model


def list_ways(steps: int, guidance: float) -> dict[str, Sampler]:
    """Name the ways to draw; the first one is in full."""
    whole = (0.0, 1.0)
    return {
        "in full": Sampler("ddim", steps, guidance),
        "guided in [0.2, 0.8]": Sampler("ddim", steps, guidance, (0.2, 0.8)),
        "guided in [0, 0.5]": Sampler("ddim", steps, guidance, (0.0, 0.5)),
        "deep levels every 2 steps": Sampler("ddim", steps, guidance, whole, 2),
        "deep levels every 3 steps": Sampler("ddim", steps, guidance, whole, 3),
        "deep levels every 5 steps": Sampler("ddim", steps, guidance, whole, 5),
        "[0, 0.5] and every 2 steps": Sampler("ddim", steps, guidance, (0.0, 0.5), 2),
    }


def main() -> None:
    """Draw in each way, in turn, and print what each saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="picturebook")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompt", default="a photo of a person")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    model = load_model(given.base, pick_runtime("cpu"))
    ways = list_ways(given.steps, model.advice.guidance)
    shots = [Shot(given.prompt, seed) for seed in range(given.seeds)]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    drawn: dict[str, list[Image.Image]] = {}
    active = (
        model.apply_adapters([(read_adapter(given.adapter), 1.0)])
        if given.adapter
        else nullcontext()
    )
    with active:
        model.sample(shots[:2], ways["in full"])
        for _ in range(given.rounds):
            for name, sampler in ways.items():
                start = time.process_time()
                drawn[name] = model.sample(shots, sampler)
                taken[name].append(time.process_time() - start)
    seconds = {name: statistics.median(each) for name, each in taken.items()}
    rows = {}
    for name, pictures in drawn.items():
        pairs = zip(drawn["in full"], pictures, strict=True)
        near = statistics.median(measure_decibels(*pair) for pair in pairs)
        rows[name] = {
            "seconds": taken[name],
            "times_faster": seconds["in full"] / seconds[name],
            "psnr_db": None if math.isinf(near) else near,
        }
        print(f"{name:28} {rows[name]['times_faster']:5.2f} times as fast, PSNR {near:5.1f} dB")
    if given.json:
        write_json(
            given.json,
            {"ways": rows, "threads": torch.get_num_threads(), "versions": library_versions()},
        )


if __name__ == "__main__":
    main()
