"""A full-size SDXL with random weights on a GPU: peak memory and seconds per update.

    python benchmarks/sdxl_full_size.py [--script train_dreambooth_lora_sdxl.py] [--json FILE]
    python benchmarks/sdxl_full_size.py --small --device cpu    tries the same on 98 M parameters

In this order:

1. diffusers' own script, if it is given: bf16, gradient checkpointing, one photo and one class
   image.
2. Ours, uncompiled: one and four photos with as many class images at once, nothing recomputed and
   everything.
3. Ours with repeated blocks compiled.
4. The ladder of what is recomputed and how the base is kept, both text encoders taught.
5. Limits of 8, 12, 16 and 24 GiB: plan chooses, the allocator is held to the limit, and class
   images, caching, training, sampling and saving must stay within it.

Each case runs in a process of its own. The share of the device is 14.19 TFLOP (forward and backward
passes of one image at 1024 px without recomputing, LoRA of rank 16) times the images, over the time
and the rate of a large matrix product that is measured first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from small_sdxl import make_pictures, make_small_sdxl

from dreamloom.core.config.loading import load_config, setting_names
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Runtime, measure_matrix_rate, pick_runtime
from dreamloom.core.events import Event, LossLogged, Progress, ValidationSampled
from dreamloom.core.run_folder import RunFolder, library_versions
from dreamloom.data.class_images import make_class_images
from dreamloom.data.photos.prepare import load_photos
from dreamloom.memory.choose import CONTEXT_BYTES
from dreamloom.memory.plan import apply_plan, plan_run, read_memory
from dreamloom.memory.predict import GIB
from dreamloom.models.base import BaseIdentity, MemoryOptions, Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.models.meta_model import make_meta_model
from dreamloom.models.sdxl import SDXLModel
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.training.train import train_adapter

HERE = Path(__file__).parent
TFLOP_PER_IMAGE = 14.19
WARM_UP = 3
LIMITS_GIB = (8, 12, 16, 24)
TEXT = ("adapter.text_encoders=true",)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: In words.
        sets: Settings beside the common ones.
        limit_gib: Memory that the plan and the allocator are held to.
    """

    name: str
    sets: tuple[str, ...] = ()
    limit_gib: float | None = None


def _case(name: str, photos: int, *memory: str, more: tuple[str, ...] = ()) -> Case:
    sizes = (f"train.batch_photos={photos}", f"train.batch_priors={photos}")
    return Case(name, (*sizes, *(f"memory.{one}" for one in memory), *more))


WHOLE = ("base=whole", "one_at_a_time=false")
CASES = (
    _case("1 + 1 images at once, nothing recomputed", 1, "checkpointing=none", *WHOLE),
    _case("1 + 1 images at once, all recomputed", 1, "checkpointing=full", *WHOLE),
    _case("4 + 4 images at once, nothing recomputed", 4, "checkpointing=none", *WHOLE),
    _case("4 + 4 images at once, all recomputed", 4, "checkpointing=full", *WHOLE),
    *(
        _case(
            f"{photos} + {photos} images at once, nothing recomputed, blocks compiled",
            photos,
            "checkpointing=none",
            *WHOLE,
            more=("train.compile=blocks",),
        )
        for photos in (1, 4)
        # Not every version compiles.
        if "train.compile" in setting_names()
    ),
    *(
        _case(
            f"text too, 1 image a pass, recomputing {levels}, base {base}",
            1,
            f"checkpointing={levels}",
            f"base={base}",
            "images_per_pass=1",
            "one_at_a_time=true",
            more=TEXT,
        )
        for levels, base in (
            ("none", "whole"),
            ("high", "whole"),
            ("low", "whole"),
            ("full", "whole"),
            ("full", "int8"),
            ("full", "nf4"),
        )
    ),
    *(
        Case(
            f"text too, planned for {limit} GiB",
            ("train.batch_photos=1", "train.batch_priors=1", *TEXT),
            limit,
        )
        for limit in LIMITS_GIB
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
    times: list[float] = field(default_factory=list)

    def end(self, phase: str) -> None:
        """End a phase: what was held at most is its own."""
        if self.device.type != "cuda":
            return
        held = torch.cuda.max_memory_allocated(self.device) / GIB
        self.peaks_gib[phase] = round(max(held, self.peaks_gib.get(phase, 0.0)), 3)
        torch.cuda.reset_peak_memory_stats(self.device)

    def observe(self, event: Event) -> None:
        """Follow a training."""
        if isinstance(event, Progress) and event.stage == "train":
            if event.task == "encoding pictures" and event.done == event.total:
                self.end("caching")
        elif isinstance(event, LossLogged):
            self.times.append(time.perf_counter())
            self.end("training")
        elif isinstance(event, ValidationSampled):
            self.end("sampling")

    @property
    def seconds_per_update(self) -> float:
        """The median, without the first."""
        ends = self.times[WARM_UP - 1 :]
        return statistics.median(b - a for a, b in pairwise(ends))


def run_case(case: Case, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Go through class images, caching, training, sampling and saving of one case."""
    runtime = pick_runtime(given.device, "auto")
    config, memory_options, planned = _settle_case(case, given)
    model = _make_model(given, runtime, memory_options, case.limit_gib)
    watch = Watch(runtime.device)
    run = RunFolder(folder / "run")
    run.claim()
    config = resolve_defaults(config, model)
    side = int(config.photos.resolution_px)
    photos = load_photos(make_pictures(folder / "photos", 4, side, seed=0), run, side)
    watch.end("loading")
    priors = make_class_images(run, model, config.class_prompt(), config.worded_priors(), 0, side)
    watch.end("class images")
    train_adapter(run, model, photos, priors, config, watch.observe)
    watch.end("saving")
    model.sample([Shot("a photo of a person", 0)], Sampler("ddim", 2, 5.0), side)
    watch.end("drawing")
    images = 2 * config.train.batch_photos * config.train.gradient_accumulation_steps
    seconds = watch.seconds_per_update
    return {
        "case": case.name,
        "seconds per update": round(seconds, 4),
        "images per second": round(images / seconds, 3),
        "peak GiB": watch.peaks_gib or None,
        "planned GiB": planned,
        "limit GiB": case.limit_gib,
        "settings": config.memory.model_dump(mode="json"),
    }


def _settle_case(
    case: Case, given: argparse.Namespace
) -> tuple[LoomConfig, MemoryOptions, dict[str, float] | None]:
    common = (
        f"train.steps={given.updates}",
        *("train.rank=16", "train.lr_scheduler=constant", "priors.count=2", "priors.steps=2"),
        *(
            f"validation.every={given.updates}",
            "validation.images=1",
            "validation.steps=2",
            "validation.scores=false",
        ),
        f"photos.resolution_px={given.px}",
    )
    config = load_config(sets=(*common, *case.sets), overrides={"device": given.device})
    planned = None
    if not given.small:
        memory = read_memory(f"{case.limit_gib or 80}GiB")
        plan = plan_run(config.model_copy(update={"base": "sdxl"}), memory, photos=4)
        config = apply_plan(config, plan)
        sizes = plan.choice.memory_use.phases
        planned = {phase: round(size / GIB, 3) for phase, size in sizes.items()}
        drawn = plan.choice.setting.drawn_at_once
    else:
        drawn = None
    memory_settings = config.memory
    quantization = "whole" if memory_settings.base == "auto" else memory_settings.base
    return config, MemoryOptions(quantization, memory_settings.cpu_offload is True, drawn), planned


def _make_model(
    given: argparse.Namespace,
    runtime: Runtime,
    memory_options: MemoryOptions,
    limit_gib: float | None,
) -> SDXLModel:
    if given.small:
        model = load_model(str(make_small_sdxl(given.work / "small")), runtime, memory_options)
        if not isinstance(model, SDXLModel):
            raise TypeError("the small model is an SDXL")
        return model
    with torch.device(runtime.device):
        pipeline = make_meta_model(runtime.dtype)
    pipeline.to("cpu")
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    _hold_to(limit_gib, runtime.device)
    return SDXLModel(
        pipeline, BaseIdentity("random", "sdxl", "random"), runtime, memory_options=memory_options
    )


def _hold_to(limit_gib: float | None, device: torch.device) -> None:
    """Let the allocator have no more than a GPU of that size would give it."""
    if limit_gib is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    share = (limit_gib * GIB - CONTEXT_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


# ------------------------------------------------------------------ all cases


def run_apart(number: int, given: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own; an error is a result, too."""
    with TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        flags = ["--device", given.device, "--updates", str(given.updates), "--px", str(given.px)]
        flags += ["--work", str(given.work), "--only", str(number), "--json", str(result)]
        flags += ["--small"] if given.small else []
        done = subprocess.run(
            [sys.executable, __file__, *flags], capture_output=True, text=True, check=False
        )
        if done.returncode or not result.is_file():
            last = (done.stderr.strip() or "no word").splitlines()[-1]
            return {"case": CASES[number].name, "failed": last}
        return dict(json.loads(result.read_text(encoding="utf-8")))


def run_script(given: argparse.Namespace) -> dict[str, Any]:
    """Time diffusers' script on the same model, as the seed ran it."""
    model = given.work / ("small" if given.small else "full")
    if not (model / "model_index.json").exists():
        if given.small:
            make_small_sdxl(model)
        else:
            make_meta_model(torch.bfloat16).save_pretrained(model)
    pictures = given.work / "pictures"
    make_pictures(pictures / "photos", 4, given.px, seed=0)
    make_pictures(pictures / "priors", 4, given.px, seed=1)
    result = given.work / "script.json"
    command = [sys.executable, str(HERE / "run_training.py"), "script"]
    command += ["--script", str(given.script), "--model", str(model), "--pictures", str(pictures)]
    command += ["--px", str(given.px), "--updates", str(given.updates), "--checkpointing"]
    command += ["--out", str(given.work), "--result", str(result)]
    command += [] if given.device == "cpu" else ["--mixed_precision", "bf16"]
    subprocess.run(command, check=True)
    seconds = statistics.median(json.loads(result.read_text())["wall_seconds"][WARM_UP - 1 :])
    return {
        "case": "diffusers' script, 1 + 1 images, gradient checkpointing",
        "seconds per update": round(seconds, 4),
        "images per second": round(2 / seconds, 3),
    }


def add_share(row: dict[str, Any], rate_tflops: float | None) -> dict[str, Any]:
    """Say which share of the device's rate a case used."""
    if rate_tflops and "images per second" in row:
        row["share"] = round(TFLOP_PER_IMAGE * row["images per second"] / rate_tflops, 3)
    return row


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    if "failed" in row:
        print(f"{row['case']}: failed: {row['failed']}", flush=True)
        return
    parts = [f"{row['seconds per update']} s per update, {row['images per second']} images/s"]
    if row.get("share") is not None:
        parts.append(f"{100 * row['share']:.1f} % of the device")
    if row.get("peak GiB"):
        told = row.get("planned GiB") or {}
        peaks = (f"{name} {size}" for name, size in row["peak GiB"].items())
        parts.append(f"peak GiB: {', '.join(peaks)}")
        parts.append(f"planned {told.get('training')} for training" if told else "")
    print(f"{row['case']}: {'; '.join(part for part in parts if part)}", flush=True)


def describe(given: argparse.Namespace, rate_tflops: float | None) -> dict[str, Any]:
    """Say where and with what the rows were measured."""
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else given.device
    return {
        "device": name,
        "date": date.today().isoformat(),
        "versions": library_versions(),
        "matrix rate TFLOP/s": rate_tflops,
        "px": given.px,
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="98 M parameters instead of 2.6 G")
    parser.add_argument("--px", type=int, help="1024, or 128 with --small")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--script", type=Path, help="train_dreambooth_lora_sdxl.py of diffusers")
    parser.add_argument("--work", type=Path, help="where the random model is kept")
    parser.add_argument("--only", type=int, action="append", help="these cases alone, from 0")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.px = given.px or (128 if given.small else 1024)
    if given.updates < WARM_UP + 2:
        parser.error(f"--updates must be {WARM_UP + 2} or more")
    return given


def main() -> None:
    """Run one case here, or all of them each in a process of its own."""
    given = parse()
    alone = given.only is not None and len(given.only) == 1 and given.json is not None
    with TemporaryDirectory() as scratch:
        given.work = given.work or Path(scratch)
        if alone:
            row = run_case(CASES[given.only[0]], given, Path(scratch))
            given.json.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
            return
        rate = None
        if given.device != "cpu":
            rate = round(measure_matrix_rate(torch.device(given.device), torch.bfloat16), 1)
            print(f"matrix products: {rate} TFLOP/s in bf16", flush=True)
        rows = [run_script(given)] if given.script else []
        for row in rows:
            show(add_share(row, rate))
        for number in given.only or range(len(CASES)):
            rows.append(add_share(run_apart(number, given), None if given.small else rate))
            show(rows[-1])
    if given.json:
        told = {**describe(given, rate), "rows": rows, "cases": [asdict(case) for case in CASES]}
        given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
