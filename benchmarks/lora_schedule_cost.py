"""What it costs to let adapters follow a drawing, and to share SDXL's layers out for K-LoRA.

Two adapters of rank 16 in every layer of picturebook are worn plainly, by curves, in turns, by
K-LoRA and in one half of guidance; then K-LoRA's table is made for two of rank 32 in the 722
linear layers of SDXL's transformers. Random weights: the time does not depend on them. Seconds
are the processor's, the least of the rounds.

    python benchmarks/lora_schedule_cost.py [--rounds 3] [--steps 8] [--threads 1]
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from merge_vs_peft import SHAPES

from dreamloom.core.device import pick_runtime
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.models.base import AdapterSpec, Model, Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.models.lora_schedule import (
    Composition,
    Curve,
    Strength,
    set_lora_schedules,
    share_layers,
)

SHOTS = [Shot("a photo of a person", seed) for seed in range(2)]


def make_adapter(model: Model, seed: int) -> Adapter:
    """Fill a fresh adapter with noise."""
    model.attach_adapter(AdapterSpec(rank=16, alpha=16.0, target_modules="all", seed=seed))
    fresh = model.read_adapter()
    model.detach_adapter()
    return Adapter(
        {n: Layer(x.down, 0.01 * torch.randn(x.up.shape)) for n, x in fresh.layers.items()}
    )


def make_sdxl_adapter(rank: int) -> Adapter:
    """Make factors of SDXL's shapes."""
    shapes = [shape for shape, count in SHAPES.items() for _ in range(count)]
    return Adapter(
        {
            f"unet.{number}": Layer(torch.randn(rank, inputs), torch.randn(outputs, rank))
            for number, (outputs, inputs) in enumerate(shapes)
        }
    )


def spend(work: Callable[[], object]) -> float:
    """Processor seconds of a piece of work."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def peak_mib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_drawing(rounds: int, steps: int) -> None:
    """Print the seconds of drawing in each manner."""
    model = load_model("picturebook", pick_runtime("cpu"))
    pair = [make_adapter(model, 1), make_adapter(model, 2)]
    weights, curves = [1.0, 1.0], [Curve.constant(1.0)] * 2
    ways: dict[str, list[Strength]] = {
        "plain weights": set_lora_schedules(pair, weights),
        "curves": set_lora_schedules(pair, curves),
        "switch": set_lora_schedules(pair, weights, Composition("switch")),
        "k-lora": set_lora_schedules(pair, weights, Composition("k-lora")),
        "conditional only": set_lora_schedules(pair, weights, Composition(conditional_only=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, strengths in ways.items():
            with model.apply_adapters(list(zip(pair, strengths, strict=True))):
                sampler = Sampler("ddim", steps, 4.0)
                seconds[name].append(spend(lambda: model.sample(SHOTS, sampler)))  # noqa: B023
    plain = min(seconds["plain weights"])
    for name, found in seconds.items():
        print(f"{name:18} {min(found):6.2f} s  {min(found) / plain:5.2f} times plain")


def measure_table(rank: int) -> None:
    """Print the seconds and the memory of K-LoRA's table at SDXL's size."""
    pair = make_sdxl_adapter(rank), make_sdxl_adapter(rank)
    before = peak_mib()
    seconds = spend(lambda: share_layers(*pair))
    print(f"K-LoRA's table, SDXL: {seconds:.1f} s, {peak_mib() - before:.0f} MiB above the inputs")


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    measure_drawing(given.rounds, given.steps)
    measure_table(32)


if __name__ == "__main__":
    main()
