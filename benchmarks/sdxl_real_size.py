"""SDXL at its real size, with random weights: taught, drawn, merged, baked, read by others.

    python benchmarks/sdxl_real_size.py --work FOLDER [--only PART ...] [--json FILE]
    python benchmarks/sdxl_real_size.py --work FOLDER --device cuda [--script SCRIPT]
    python benchmarks/sdxl_real_size.py --work FOLDER --device cuda --small    98 M parameters

The base model is made once, 6.5 GiB in fp16 as SDXL is published, and kept in FOLDER. Each case
runs in a process of its own with a time limit, and its result is written as soon as it is there, so
that whatever ends the run leaves what was measured. On a processor the cases are those that two
cores and 24 GiB do in less than half an hour; on a GPU they come in the order of what is asked
most: seconds per update and the share of the device, then the ladder of what is recomputed and how
the base is kept, then the limits of 8 to 24 GiB that the allocator is held to.

Peaks are what tensors hold: on a GPU what torch allocated, on a processor what the process holds
of memory that no file lies behind, looked at fifty times a second. Beside them stands what the
plan said before anything was loaded. With random weights pictures are noise, and learning is not
judged here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from small_sdxl import make_pictures, make_real_sdxl, make_small_sdxl, write_single_file
from train_vs_diffusers import describe_machine

from dreamloom.core.config.loading import load_config
from dreamloom.core.device import find_device, pick_runtime
from dreamloom.core.events import Event, LossLogged, Progress, ValidationSampled
from dreamloom.memory.device_memory import (
    CONTEXT_BYTES,
    PROCESS_BYTES,
    read_device_memory,
    read_memory,
)
from dreamloom.memory.host import has_bf16_units
from dreamloom.memory.plan import plan_run
from dreamloom.memory.predict import GIB, count_flops
from dreamloom.memory.work import find_table
from dreamloom.models.matrix_products import measure_matrix_rate
from dreamloom.pipeline.train import train_folder

HERE = Path(__file__).parent
COMMAND = (sys.executable, "-m", "dreamloom")
WARM_UP = 1
PHOTOS = 2


@dataclass(frozen=True)
class Training:
    """A training of one kind.

    Args:
        name: In words.
        px: Side of the pictures.
        sets: Settings beside the common ones.
        updates: How many.
        limit_gib: Memory that the plan and a GPU's allocator are held to.
    """

    name: str
    px: int
    sets: tuple[str, ...] = ()
    updates: int = 3
    limit_gib: float | None = None


@dataclass(frozen=True)
class Step:
    """Something that is done with what was taught.

    Args:
        name: In words.
        do: Does it in a folder, and says what was measured.
    """

    name: str
    do: Callable[[argparse.Namespace, Path], dict[str, Any]]


# ------------------------------------------------------------------ training


def _gpu_training(name: str, photos: int, *sets: str, limit_gib: float | None = None) -> Training:
    sizes = (f"train.batch_photos={photos}", f"train.batch_priors={photos}")
    looks = ("validation.every=12", "validation.images=1", "validation.steps=2")
    return Training(name, 1024, (*sizes, *looks, "priors.count=2", *sets), 12, limit_gib)


WHOLE = ("memory.base_quantization=whole", "memory.cpu_offload=false")
TEXT = "adapter.text_encoders=true"
ON_GPU = (
    *(
        _gpu_training(
            f"{photos} + {photos} images at once, recomputing {levels}{told}",
            photos,
            f"memory.gradient_checkpointing={levels}",
            f"memory.micro_batch_size={2 * photos}",
            *WHOLE,
            *more,
        )
        for photos, levels, told, more in (
            (1, "none", "", ()),
            (4, "none", "", ()),
            (1, "none", ", blocks compiled", ("train.compile=blocks",)),
            (4, "none", ", blocks compiled", ("train.compile=blocks",)),
            (1, "full", "", ()),
            (4, "full", "", ()),
        )
    ),
    *(
        _gpu_training(
            f"text encoders too, 1 image a pass, recomputing {levels}, base {base}",
            1,
            f"memory.gradient_checkpointing={levels}",
            f"memory.base_quantization={base}",
            "memory.micro_batch_size=1",
            "memory.cpu_offload=true",
            TEXT,
        )
        for levels, base in (
            ("none", "whole"),
            ("low", "whole"),
            ("full", "whole"),
            ("full", "int8"),
            ("full", "nf4"),
            ("high", "whole"),
        )
    ),
    *(
        _gpu_training(f"text encoders too, planned for {limit} GiB", 1, TEXT, limit_gib=limit)
        for limit in (12, 16, 8, 24)
    ),
)

_SMALL_RUN = ("train.batch_photos=1", "train.batch_priors=1", "priors.kind=base", "train.rank=4")
ON_PROCESSOR = (
    Training("256 px, as planned", 256, _SMALL_RUN),
    Training("512 px, as planned", 512, _SMALL_RUN, 2),
    Training("256 px, base in bf16", 256, (*_SMALL_RUN, "memory.base_quantization=bf16"), 2),
    Training(
        "256 px, base in int8, one image a pass",
        256,
        (*_SMALL_RUN, "memory.base_quantization=int8", "memory.micro_batch_size=1"),
        2,
    ),
    Training(
        "256 px, text encoders too, all recomputed",
        256,
        (*_SMALL_RUN, TEXT, "memory.gradient_checkpointing=full"),
        2,
    ),
    Training(
        "256 px, parts take turns, rank 16",
        256,
        (*_SMALL_RUN, "memory.cpu_offload=true", "train.rank=16"),
        2,
    ),
    Training("1024 px, as planned, photos alone", 1024, (*_SMALL_RUN, "priors.kind=none"), 2),
    Training("256 px, class images drawn", 256, (*_SMALL_RUN, "priors.kind=generated"), 2),
    *(
        # Where the processor multiplies in bf16 itself, the plan chooses that.
        [Training("256 px, computed in fp32", 256, (*_SMALL_RUN, "precision=fp32"), 2)]
        if has_bf16_units()
        else []
    ),
)


@dataclass
class Watch:
    """Takes the peak memory of each phase and the time of each update.

    Args:
        device: Whose memory.
    """

    device: torch.device
    peaks_gib: dict[str, float] = field(default_factory=dict)
    ends: list[tuple[float, float]] = field(default_factory=list)
    held: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        """Begin to look."""
        if self.device.type == "cpu":
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no more."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.held = max(self.held, read_held_gib())

    def end(self, phase: str) -> None:
        """End a phase: what was held at most is its own."""
        if self.device.type == "cuda":
            self.held = torch.cuda.max_memory_allocated(self.device) / GIB
            torch.cuda.reset_peak_memory_stats(self.device)
        self.peaks_gib[phase] = round(max(self.held, self.peaks_gib.get(phase, 0.0)), 3)
        self.held = 0.0

    def observe(self, event: Event) -> None:
        """Follow a training."""
        if isinstance(event, Progress) and event.task == "encoding pictures":
            if event.done == event.total:
                self.end("caching")
        elif isinstance(event, LossLogged):
            self.ends.append((time.perf_counter(), time.process_time()))
            self.end("training")
        elif isinstance(event, ValidationSampled):
            self.end("sampling")


def read_held_gib(pid: str = "self") -> float:
    """Read what a process holds of memory that no file lies behind; Linux alone tells it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    rows = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(rows["RssAnon"].split()[0]) * 1024 / GIB if "RssAnon" in rows else 0.0


def train(case: Training, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Teach as `dreamloom train` does, with peaks by phase beside the plan's."""
    device = find_device(given.device)
    px = 128 if given.small else case.px
    sets = (
        "subject.phrase=rraj person",
        f"train.steps={case.updates}",
        *("train.lr_scheduler=constant", "priors.steps=2", "priors.count=2"),
        "validation.scores=false",
        f"photos.resolution_px={px}",
        *case.sets,
        *([f"memory.limit={case.limit_gib}GiB"] if case.limit_gib else []),
    )
    config = load_config(sets=sets, overrides={"device": given.device, "base": str(given.base)})
    has = read_device_memory(device)
    assert has is not None
    memory = read_memory(f"{case.limit_gib}GiB") if case.limit_gib else has
    plan = plan_run(config, memory, photos=PHOTOS)
    _hold_to(case.limit_gib, device)
    photos = make_pictures(folder / "photos", PHOTOS, px, seed=0)
    with Watch(device) as watch:
        run, _, _ = train_folder(photos, config, folder / "run", observe=watch.observe)
        watch.end("saving")
    setting = plan.choice.setting
    wall, cpu = (
        statistics.median(b - a for a, b in pairwise(ends[WARM_UP - 1 :]))
        for ends in zip(*watch.ends, strict=True)
    )
    images = setting.micro_batch_size * setting.passes
    flops = images * count_flops(find_table(config.base), setting)
    kept = given.work / "adapter.safetensors"
    if case.px == 256 or not kept.is_file():
        kept.write_bytes(run.adapter.read_bytes())
    predicted = {
        phase: round(size / GIB, 3) for phase, size in plan.choice.memory_use.phases.items()
    }
    beside = PROCESS_BYTES if memory.is_host else 0
    return {
        "px": px,
        "seconds per update": round(wall, 4),
        "processor seconds per update": round(cpu, 4),
        "images per second": round(images / wall, 3),
        "TFLOP per update": round(flops / 1e12, 3),
        "share": _tell_share(
            flops / (cpu if device.type == "cpu" else wall), given, setting.precision
        ),
        "peak GiB": watch.peaks_gib,
        "planned GiB": predicted,
        "peak with libraries": round((plan.choice.memory_use.peak_bytes + beside) / GIB, 3),
        "chosen": plan.as_dict()["settings"],
        "limit GiB": case.limit_gib,
    }


def _tell_share(rate: float, given: argparse.Namespace, precision: str) -> float | None:
    """Say which share of the device's matrix rate was used; of the small model it says nothing."""
    return None if given.small else round(rate / 1e12 / given.rates[precision], 3)


def _hold_to(limit_gib: float | None, device: torch.device) -> None:
    """Let the allocator have no more than a GPU of that size would give it."""
    if limit_gib is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    share = (limit_gib * GIB - CONTEXT_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


# ------------------------------------------------------------------ what is done with it


def run_command(*words: str | Path) -> dict[str, Any]:
    """Run one of our commands; say how long it took and what it held at most."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    held, said = 0.0, []
    reader = threading.Thread(target=lambda: said.append(process.stdout.read()))  # type: ignore[union-attr]
    reader.start()
    while process.poll() is None:
        held = max(held, read_held_gib(str(process.pid)))
        time.sleep(0.02)
    reader.join()
    if process.returncode:
        raise RuntimeError(f"{words[0]}: {said[0].strip()[-400:]}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak GiB": {"whole": round(held, 3)}}


def _drawing_px(given: argparse.Namespace) -> int:
    return 128 if given.small else 512 if given.device == "cpu" else 1024


def draw(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Draw with the adapter, by us and by diffusers' own pipeline; compare the pictures."""
    px = _drawing_px(given)
    told = run_command(
        *("generate", "--base", given.base, "--adapter", given.work / "adapter.safetensors"),
        *("--prompt", "a photo of rraj person", "--seeds", "1", "--scheduler", "ddim"),
        *("--steps", "2", "--guidance", "5", "--size", f"{px}x{px}"),
        *("--device", given.device, "--set", "precision=fp32", "--out", folder / "drawn"),
    )
    (ours,) = (folder / "drawn").glob("images/*/*.png")
    began = time.perf_counter()
    theirs = _draw_by_diffusers(given, px)
    return {
        "px": px,
        **told,
        "seconds by diffusers": round(time.perf_counter() - began, 1),
        "PSNR dB": round(_compare(ours, theirs), 1),
    }


def _draw_by_diffusers(given: argparse.Namespace, px: int) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        given.base, torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(given.work / "adapter.safetensors"))
    pipeline.to(given.device)
    return pipeline(
        "a photo of rraj person",
        num_inference_steps=2,
        guidance_scale=5.0,
        height=px,
        width=px,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]


def _compare(file: Path, other: Any) -> float:
    import numpy as np
    from PIL import Image

    with Image.open(file) as picture:
        ours = np.asarray(picture.convert("RGB"), dtype=np.float64)
    error = float(np.mean((ours - np.asarray(other, dtype=np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def merge(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Merge the adapter with itself at another weight."""
    adapter = given.work / "adapter.safetensors"
    return run_command(
        "merge", f"{adapter}:1", f"{adapter}:0.5", "--out", folder / "merged.safetensors"
    )


def bake(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the base model with the adapter in it."""
    adapter = given.work / "adapter.safetensors"
    return run_command("bake", f"{adapter}:1", "--base", given.base, "--out", folder / "baked")


def extract(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take the adapter out of the model that it was baked into."""
    baked = given.work / "cases" / "baked" / "baked"
    words = ("extract", baked, "--base", given.base, "--rank", "4", "--out")
    return run_command(*words, folder / "extracted.safetensors")


def read_single_file(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the base model in the original layout, and draw the same from it as from its folder."""
    file = folder / "model.safetensors"
    write_single_file(given.base, file)
    rows, pictures = [], []
    for number, base in enumerate((file, given.base)):
        rows.append(
            run_command(
                *("generate", "--base", base, "--prompt", "a photo of a person", "--seeds", "1"),
                *("--scheduler", "ddim", "--steps", "1", "--size", "256x256", "--guidance", "1"),
                *("--device", given.device, "--out", folder / str(number)),
            )
        )
        pictures += (folder / str(number)).glob("images/*/*.png")
    file.unlink()
    same = pictures[0].read_bytes() == pictures[1].read_bytes()
    return {"px": 256, **rows[0], "same picture as from the folder": same}


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Score what was drawn by the encoders that are here, and write the report."""
    drawn = given.work / "cases" / "drawn-by-us-and-by-diffusers" / "drawn"
    photos = make_pictures(folder / "photos", PHOTOS, 256, seed=0)
    (pictures,) = (one.parent for one in drawn.glob("images/*/manifest.json"))
    told = run_command("evaluate", pictures, "--photos", photos, "--device", given.device)
    return {**told, "report": run_command("report", drawn)["seconds"]}


STEPS = (
    Step("drawn by us and by diffusers", draw),
    Step("merged", merge),
    Step("baked", bake),
    Step("extracted", extract),
    Step("scored and reported", measure),
    Step("read from a single file", read_single_file),
)


# ------------------------------------------------------------------ all cases


def list_cases(given: argparse.Namespace) -> list[Training | Step]:
    """List what is run here, most asked first."""
    trainings = ON_PROCESSOR if given.device == "cpu" else ON_GPU
    cases: list[Training | Step] = [*trainings, *STEPS]
    if not given.only:
        return cases
    return [case for case in cases if any(part in case.name for part in given.only)]


def run_apart(case: Training | Step, given: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own; an error is a result, too."""
    result = given.work / "result.json"
    result.unlink(missing_ok=True)
    flags = ["--device", given.device, "--work", str(given.work), "--case", case.name]
    flags += ["--rates", json.dumps(given.rates), *(["--small"] if given.small else [])]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, __file__, *flags],
            capture_output=True,
            text=True,
            check=False,
            timeout=60 * given.minutes,
        )
    except subprocess.TimeoutExpired:
        return {"case": case.name, "failed": f"took longer than {given.minutes:g} minutes"}
    if done.returncode or not result.is_file():
        last = (done.stderr.strip() or f"no word, exit status {done.returncode}").splitlines()[-1]
        return {"case": case.name, "failed": last}
    row = json.loads(result.read_text(encoding="utf-8"))
    return {"case": case.name, "whole seconds": round(time.perf_counter() - began), **row}


def run_here(name: str, given: argparse.Namespace) -> None:
    """Run the case of that name, and write its result."""
    case = next(one for one in (*ON_GPU, *ON_PROCESSOR, *STEPS) if one.name == name)
    folder = given.work / "cases" / name.replace(" ", "-").replace(",", "").replace("+", "and")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row = train(case, given, folder) if isinstance(case, Training) else case.do(given, folder)
    (given.work / "result.json").write_text(json.dumps(row), encoding="utf-8")


def run_script(given: argparse.Namespace) -> dict[str, Any]:
    """Time diffusers' script on the same model, with its own gradient checkpointing."""
    px = 128 if given.small else 1024
    pictures = given.work / "pictures"
    make_pictures(pictures / "photos", 4, px, seed=0)
    make_pictures(pictures / "priors", 4, px, seed=1)
    result = given.work / "script.json"
    command = [sys.executable, str(HERE / "run_training.py"), "script"]
    command += ["--script", str(given.script), "--model", str(given.base)]
    command += ["--pictures", str(pictures), "--px", str(px), "--updates", "12", "--checkpointing"]
    command += ["--out", str(given.work), "--result", str(result)]
    command += [] if given.device == "cpu" else ["--mixed_precision", "bf16"]
    subprocess.run(command, check=True, timeout=60 * given.minutes)
    seconds = statistics.median(json.loads(result.read_text())["wall_seconds"][2:])
    return {
        "case": "diffusers' script, 1 + 1 images, gradient checkpointing",
        "seconds per update": round(seconds, 4),
        "images per second": round(2 / seconds, 3),
    }


def make_base(given: argparse.Namespace) -> Path:
    """Make the random base model, unless it is there."""
    if given.small:
        return make_small_sdxl(given.work / "small")
    return make_real_sdxl(given.work / "base")


def measure_rates(given: argparse.Namespace) -> dict[str, float]:
    """Measure the rate of matrix products in each precision, in TFLOP/s.

    A processor's is that of one second of processor time, so that other programs count little.
    """
    device = pick_runtime(given.device, "fp32").device
    side, clock = (1024, time.process_time) if device.type == "cpu" else (None, time.perf_counter)
    return {
        name: measure_matrix_rate(device, dtype, side, clock)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    if "failed" in row:
        print(f"{row['case']}: failed: {row['failed']}", flush=True)
        return
    words = ", ".join(f"{name} {value}" for name, value in row.items() if name != "case")
    print(f"{row['case']}: {words}", flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where the random model is kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="98 M parameters instead of 2.6 G")
    parser.add_argument("--script", type=Path, help="train_dreambooth_lora_sdxl.py of diffusers")
    parser.add_argument("--only", action="append", help="cases with this in their name")
    parser.add_argument("--minutes", type=float, default=10, help="for one case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--rates", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run one case here, or all of them each in a process of its own."""
    given = parse()
    given.work.mkdir(parents=True, exist_ok=True)
    given.base = make_base(given)
    if given.case:
        run_here(given.case, given)
        return
    given.rates = measure_rates(given)
    told = {
        **describe_machine(),
        "date": date.today().isoformat(),
        "device": given.device,
        "threads": torch.get_num_threads(),
        "matrix TFLOP/s": {name: round(rate, 4) for name, rate in given.rates.items()},
    }
    print(json.dumps(told), flush=True)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        show(row)
        if given.json:
            given.json.write_text(json.dumps({**told, "rows": rows}, indent=2) + "\n")

    if given.script:
        keep(run_script(given))
    for case in list_cases(given):
        keep(run_apart(case, given))


if __name__ == "__main__":
    main()
