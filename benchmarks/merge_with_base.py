"""What merges that ask the base model cost, and how much of each adapter they miss.

    dreamloom demo --preset quick --out runs/quick
    python benchmarks/merge_with_base.py runs/quick/with_prior/adapter.safetensors \
        runs/quick/style/adapter.safetensors

Prints a table in Markdown, which stands in `docs/merging-with-the-base.md`. What is missed is
measured on prompts and a seed that no method has seen: the mean square distance between what the
merge and what the adapter alone predict on the adapter's prompts, as a share of the base model's.
The last column is the distance from the plain sum on prompts that ask for both, likewise.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from dreamloom.core.device import measure_effort, pick_runtime
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.reading import read_adapter
from dreamloom.merging.activations.forward_passes import (
    ForwardPasses,
    MergePrompts,
    list_passes,
    weigh_adapters,
)
from dreamloom.merging.activations.masks import measure_missed, record_examples
from dreamloom.merging.activations.prepare import prepare_merge
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.method import Value
from dreamloom.models.base import Model
from dreamloom.models.families import load_model

WAYS: tuple[tuple[str, Mapping[str, Value]], ...] = (
    ("sum", {}),
    ("ssr", {}),
    ("ssr", {"prompts": 1, "steps": 1}),
    ("ssr", {"joint": 1.0}),
    ("regmean", {}),
    ("regmean", {"joint": 1.0}),
    ("ziprank", {}),
    ("ziprank", {"joint": 1.0}),
    ("ziplora", {}),
    ("ziplora", {"joint": 1.0}),
)
HELD_OUT = MergePrompts(
    each=(
        (
            "a photo of rraj person wearing a hat",
            "a painting of rraj person",
            "a photo of rraj person in a park",
            "rraj person at Oktoberfest",
        ),
        (
            "pixel, a photo of a robot in a city",
            "pixel, a photo of a person with brown hair at night",
            "pixel, a photo of a robot",
            "pixel, a photo of a dog wearing a cap",
        ),
    ),
    joint=(
        "pixel, a photo of rraj person wearing sunglasses",
        "pixel, rraj person wearing a hat",
        "pixel, a photo of rraj person in a park",
        "pixel, rraj person at Oktoberfest",
    ),
)
STEPS, SEED = 6, 4321


def measure(model: Model, adapters: list[Adapter], out: Path | None) -> None:
    """Merge in each way, print what it costs and misses, and keep the adapters if asked to."""
    from dreamloom.lora.writing import write_adapter

    plain = MergeRequest([1.0, 1.0])
    passes = list_passes(weigh_adapters(adapters, plain), HELD_OUT, joint=True)
    recorded = record_examples(ForwardPasses(model, adapters, plain, passes, STEPS, SEED))
    print("| method | seconds | misses of subject | misses of style | from the sum, both asked |")
    print("|---|---|---|---|---|")
    for method, options in WAYS:
        request = MergeRequest([1.0, 1.0], method, options)
        with measure_effort() as effort:
            prepared = prepare_merge(model, adapters, request)
            merged = combine(adapters, request, prepared.layers if prepared else None).adapter
        missed = measure_missed(model, recorded, merged)
        told = ", ".join(f"{name}={value:g}" for name, value in options.items())
        name = f"`{method}`" + (f", {told}" if told else "")
        shares = " | ".join(f"{share:.3f}" for share in missed)
        print(f"| {name} | {effort.seconds:.1f} | {shares} |", flush=True)
        if out:
            stem = "-".join([method, *(f"{key}{value:g}" for key, value in options.items())])
            write_adapter(out / f"{stem}.safetensors", merged)


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", nargs=2, type=Path, help="the subject's and the style's")
    parser.add_argument("--base", default="picturebook")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a folder for the merged adapters")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = load_model(asked.base, pick_runtime())
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
    measure(model, [read_adapter(path) for path in asked.adapters], asked.out)


if __name__ == "__main__":
    main()
