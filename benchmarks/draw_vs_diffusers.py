"""Drawing many pictures, beside a plain loop over diffusers' pipeline, on picturebook.

The same prompts, seeds, scheduler and steps in one process, in turn: a loop that calls diffusers'
pipeline once for each prompt and seed, as most scripts do, and `Model.sample`, which encodes each
prompt once and draws in batches. Seconds are of processor time; the first round warms up and is
not counted. The pictures are compared pixel by pixel.

    OMP_NUM_THREADS=1 python benchmarks/draw_vs_diffusers.py [--prompts 6] [--seeds 8]
        [--steps 50] [--batch N] [--rounds 3] [--adapter FILE] [--json FILE]
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image

from dreamloom.core.device import pick_runtime
from dreamloom.core.run_folder import library_versions, write_json
from dreamloom.models.base import Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.picturebook import weights_folder

PLACES = ("", " in the snow", " in a city", " on a beach", " in a forest", " at night")


def draw_by_loop(
    pipeline: StableDiffusionXLPipeline, shots: list[Shot], sampler: Sampler
) -> list[Image.Image]:
    """Call diffusers' pipeline once for each picture."""
    return [
        pipeline(
            shot.prompt,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            generator=torch.Generator("cpu").manual_seed(shot.seed),
        ).images[0]
        for shot in shots
    ]


def measure_decibels(one: Image.Image, other: Image.Image) -> float:
    """Give the PSNR of two pictures in dB; infinite where they are the same."""
    first, second = (np.asarray(image, dtype=np.float64) / 255 for image in (one, other))
    error = float(np.square(first - second).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def main() -> None:
    """Draw in both ways, in turn, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6, choices=range(1, len(PLACES) + 1))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, help="Pictures at once; as generate does if left out.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    prompts = [f"a photo of a person{place}" for place in PLACES[: given.prompts]]
    shots = [Shot(prompt, seed) for prompt in prompts for seed in range(given.seeds)]
    sampler = Sampler("ddim", given.steps, 4.0)
    model = load_model("picturebook", pick_runtime("cpu"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(weights_folder(), dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    batch = {} if given.batch is None else {"batch": given.batch}
    ways = {
        "diffusers, one by one": lambda some: draw_by_loop(pipeline, some, sampler),
        "dreamloom": lambda some: model.sample(some, sampler, **batch),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    drawn: dict[str, list[Image.Image]] = {}
    for way in ways.values():
        way(shots[:2])
    for _ in range(given.rounds):
        for name, way in ways.items():
            start = time.process_time()
            drawn[name] = way(shots)
            taken[name].append(time.process_time() - start)
    plain, ours = (statistics.median(seconds) for seconds in taken.values())
    alike = [measure_decibels(*pair) for pair in zip(*drawn.values(), strict=True)]
    for name, seconds in taken.items():
        each = ", ".join(f"{one:.1f}" for one in seconds)
        print(f"{name:22} {statistics.median(seconds):7.1f} s of processor time ({each})")
    print(
        f"{plain / ours:.2f} times as fast; {len(shots)} pictures, PSNR {min(alike):.1f} dB or more"
    )
    if given.json:
        write_json(
            given.json,
            {
                "seconds": taken,
                "ratio": plain / ours,
                "psnr_db": [None if math.isinf(one) else one for one in alike],
                "threads": torch.get_num_threads(),
                "versions": library_versions(),
            },
        )


if __name__ == "__main__":
    main()
