"""Two LoRAs of SDXL's full shape to one of rank 32: here, and by peft's `svd` combination.

Both adapters change the 722 linear layers within SDXL's transformers (the layers that kohya's
programs teach) and have rank 32; their factors are normal. Merged at weights 1 and 0.8, on one
thread. The error is that of the result against the best update of rank 32, which a dense SVD in
float64 finds; it is measured on one layer of each shape. Memory is the peak of the resident set
while the merge runs, above what the process held before, inputs included; Linux only.

peft takes half an hour for all layers, so it merges one layer of each shape, and its seconds are
multiplied by how many layers have that shape. Its result is compared with ours.

    OMP_NUM_THREADS=1 python benchmarks/merge_vs_peft.py [--repeats 3] [--no-peft] [--json FILE]
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dreamloom.core.run_folder import library_versions
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.ranks import parse_rank

SHAPES = {
    (1280, 1280): 372,
    (1280, 2048): 120,
    (640, 640): 70,
    (640, 2048): 20,
    (10240, 1280): 60,
    (1280, 5120): 60,
    (5120, 640): 10,
    (640, 2560): 10,
}
"""How many layers have so many outputs and inputs."""

RANK = 32
WEIGHTS = (1.0, 0.8)


def name_layer(shape: tuple[int, int], number: int) -> str:
    """Name a layer by its shape."""
    return f"unet.{shape[0]}x{shape[1]}.{number}"


def make_layer(shape: tuple[int, int], rng: torch.Generator) -> Layer:
    """Make an update with normal factors, about as large as a trained one."""
    outputs, inputs = shape
    down = torch.randn(RANK, inputs, generator=rng) / inputs**0.5
    return Layer(down, 0.01 * torch.randn(outputs, RANK, generator=rng))


def make_adapter(seed: int) -> Adapter:
    """Make an adapter of SDXL's full shape."""
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name_layer(shape, number): make_layer(shape, rng)
            for shape, count in SHAPES.items()
            for number in range(count)
        }
    )


def read_memory_mib(what: str) -> float:
    """Read VmRSS (held now) or VmHWM (held at most) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise OSError(f"there is no {what} in /proc/self/status")


def forget_peak() -> None:
    """Let VmHWM begin again at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def find_best(adapters: list[Adapter], name: str) -> torch.Tensor:
    """Find the best update of the rank by a dense SVD in float64."""
    layers = [adapter.layers[name] for adapter in adapters]
    total = sum(
        weight * (layer.up.double() @ layer.down.double())
        for layer, weight in zip(layers, WEIGHTS, strict=True)
    )
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    return (left[:, :RANK] * values[:RANK]) @ right[:RANK]


def multiply(layer: Layer) -> torch.Tensor:
    """Multiply an update out in float64."""
    return layer.up.double() @ layer.down.double()


def measure_ours(adapters: list[Adapter], repeats: int) -> dict[str, object]:
    """Merge all layers, and tell time, memory and errors."""
    request = MergeRequest(list(WEIGHTS), rank=parse_rank(str(RANK)))
    full = MergeRequest(list(WEIGHTS))
    cpu, wall = [], []
    forget_peak()
    before = read_memory_mib("VmRSS")
    merged = combine(adapters, request)
    peak = read_memory_mib("VmHWM") - before
    for _ in range(repeats):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        merged = combine(adapters, request)
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - begun_cpu)
    begun_cpu = time.process_time()
    combine(adapters, full)
    full_cpu = time.process_time() - begun_cpu
    errors = {}
    for shape in SHAPES:
        name = name_layer(shape, 0)
        best = find_best(adapters, name)
        found = multiply(merged.adapter.layers[name])
        errors["x".join(map(str, shape))] = float((found - best).norm() / best.norm())
    return {
        "layers": len(merged.adapter.layers),
        "cpu_seconds": [round(seconds, 2) for seconds in cpu],
        "wall_seconds": [round(seconds, 2) for seconds in wall],
        "full_rank_cpu_seconds": round(full_cpu, 2),
        "memory_above_inputs_mib": round(peak),
        "errors": errors,
        "left_out": merged.error,
        "finite_with_zeros": stays_finite(adapters),
    }


def stays_finite(adapters: list[Adapter]) -> bool:
    """Say whether a merge is finite where a factor, or both adapters' factors, are all zeros."""
    some = [name_layer(shape, 0) for shape in SHAPES]
    first, second = ({name: adapter.layers[name] for name in some} for adapter in adapters)
    for name in some[1:]:
        layer = second[name]
        second[name] = Layer(layer.down, torch.zeros_like(layer.up))
    first[some[1]] = Layer(first[some[1]].down, torch.zeros_like(first[some[1]].up))
    request = MergeRequest(list(WEIGHTS), rank=parse_rank(str(RANK)))
    merged = combine([Adapter(first), Adapter(second)], request).adapter
    return all(
        bool(torch.isfinite(layer.up).all() and torch.isfinite(layer.down).all())
        for layer in merged.layers.values()
    )


def measure_peft(shape: tuple[int, int], adapters: list[Adapter]) -> dict[str, float]:
    """Merge one layer by peft, with its default and with the thin SVD that it can be asked for."""
    name = name_layer(shape, 0)
    ours = combine(
        [Adapter({name: adapter.layers[name]}) for adapter in adapters],
        MergeRequest(list(WEIGHTS), rank=parse_rank(str(RANK))),
    ).adapter.layers[name]
    found = {}
    for kind, whole in (("default", True), ("thin", False)):
        outputs, inputs = shape
        base = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
        model = get_peft_model(base, config, adapter_name="first")
        model.add_adapter("second", config)
        layer = model.base_model.model[0]
        for part, adapter in zip(("first", "second"), adapters, strict=True):
            layer.lora_A[part].weight.data = adapter.layers[name].down.clone()
            layer.lora_B[part].weight.data = adapter.layers[name].up.clone()
        begun = time.process_time()
        model.add_weighted_adapter(
            ["first", "second"],
            list(WEIGHTS),
            "merged",
            combination_type="svd",
            svd_rank=RANK,
            svd_full_matrices=whole,
        )
        found[kind] = time.process_time() - begun
        theirs = layer.get_delta_weight("merged").detach().double()
        found[f"{kind} differs"] = float((theirs - multiply(ours)).norm() / multiply(ours).norm())
    return found


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    adapters = [make_adapter(seed) for seed in (1, 2)]
    ours = measure_ours(adapters, given.repeats)
    seconds = min(ours["cpu_seconds"])
    print(
        f"{ours['layers']} layers, two adapters of rank {RANK} to rank {RANK}, one thread:\n"
        f"  {seconds} s of processor time (runs: {ours['cpu_seconds']}; on the clock "
        f"{ours['wall_seconds']}); full rank {ours['full_rank_cpu_seconds']} s\n"
        f"  {ours['memory_above_inputs_mib']} MiB above the inputs, the result included\n"
        f"  error against the best of that rank at most {max(ours['errors'].values()):.1e}\n"
        f"  finite with factors of zeros: {'yes' if ours['finite_with_zeros'] else 'no'}",
        flush=True,
    )
    found = {"ours": ours, "versions": library_versions()}
    if not given.no_peft:
        theirs = {"x".join(map(str, shape)): measure_peft(shape, adapters) for shape in SHAPES}
        found["peft"] = theirs
        print("\n| layer | how many | peft, default, s each | thin, s each | differs from ours |")
        print("|---|---|---|---|---|")
        for (shape, measured), count in zip(theirs.items(), SHAPES.values(), strict=True):
            print(
                f"| {shape} | {count} | {measured['default']:.2f} | {measured['thin']:.2f} "
                f"| {measured['thin differs']:.0e} |"
            )
        for kind in ("default", "thin"):
            total = sum(
                count * measured[kind]
                for measured, count in zip(theirs.values(), SHAPES.values(), strict=True)
            )
            found[f"peft_{kind}_seconds"], found[f"ratio_{kind}"] = total, total / seconds
            print(
                f"peft, {kind}: {total:.0f} s for all layers by these counts, "
                f"{total / seconds:.0f} times as long"
            )
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
