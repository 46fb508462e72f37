"""One training in a process of its own, timed: diffusers' script as it is, or ours.

`train_vs_diffusers.py` starts it. A pair of times is taken as each optimizer step begins; what
lies between two of them is an update. diffusers' script imports torchvision for two transforms;
where that library is missing, a stand-in of these transforms alone is put in its place. The script
itself is not changed.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import math
import random
import resource
import runpy
import sys
import time
import types
from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PHOTO_PROMPT, CLASS_PROMPT = "a photo of rraj person", "a photo of a person"
RANK, RATE, TEXT_RATE, DECAY = 16, 1e-4, 5e-5, 1e-2
"""What both sides train with."""


PHASES = ("forward", "backward", "optimizer")
"""Parts of an update that are timed; the rest of it is what lies between them."""


class Clock:
    """Writes down when each optimizer step begins, and how long the phases before it took.

    Args:
        updates: The training is left when one more step than these has begun: neither side's
            saving is timed.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.times: list[tuple[float, float]] = []
        self.on_step: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None
        self._spent = dict.fromkeys(PHASES, 0.0)
        # What was spent on each phase before each step.
        self._spent_before: list[dict[str, float]] = []
        self.time_phase(torch.optim.AdamW, "step", "optimizer")
        self.time_phase(torch.autograd, "backward", "backward")
        step = torch.optim.AdamW.step

        def timed(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
            self.times.append((time.process_time(), time.perf_counter()))
            self._spent_before.append(dict(self._spent))
            self.on_step(optimizer)
            return step(optimizer, *args, **kwargs)

        torch.optim.AdamW.step = timed

    def time_phase(self, owner: Any, name: str, phase: str) -> None:
        """Count the processor time of a function towards a phase."""
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._spent[phase] += time.process_time() - began

        setattr(owner, name, timed)

    def write(self, file: Path) -> None:
        """Write the seconds of each update and before the first, and the most resident memory."""
        pairs = list(pairwise(self.times))
        found = {
            "cpu_seconds_to_first_step": self.times[0][0],
            "cpu_seconds": [end[0] - begin[0] for begin, end in pairs],
            "wall_seconds": [end[1] - begin[1] for begin, end in pairs],
            "phases": {
                phase: [
                    after[phase] - before[phase] for before, after in pairwise(self._spent_before)
                ]
                for phase in PHASES
            },
            "peak_mib": read_peak_mib(),
        }
        file.write_text(json.dumps(found))


def read_peak_mib() -> float:
    """Read what this program held at most."""
    # What getrusage tells begins with the parent's, where Linux tells its own.
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    held = int(peaks[0]) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / 1024


# ------------------------------------------------------------------ diffusers' script


def run_script(given: argparse.Namespace, extra: list[str]) -> None:
    """Run diffusers' script, unchanged, on the pictures."""
    stand_in_for_torchvision()
    sys.argv = [
        str(given.script),
        *("--pretrained_model_name_or_path", str(given.model)),
        *("--instance_data_dir", str(given.pictures / "photos")),
        *("--class_data_dir", str(given.pictures / "priors")),
        *("--instance_prompt", PHOTO_PROMPT, "--class_prompt", CLASS_PROMPT),
        *("--with_prior_preservation", "--num_class_images", "4"),
        *("--output_dir", str(given.out / "script")),
        *("--resolution", str(given.px), "--train_batch_size", "1", "--center_crop"),
        *("--learning_rate", str(RATE), "--text_encoder_lr", str(TEXT_RATE)),
        *("--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--rank", str(RANK)),
        *("--adam_weight_decay", str(DECAY), "--adam_weight_decay_text_encoder", str(DECAY)),
        *("--max_train_steps", str(given.updates + 1), "--checkpointing_steps", "100000"),
        *("--seed", "0", "--mixed_precision", "no", "--report_to", "tensorboard"),
        *(["--train_text_encoder"] if given.text else []),
        *(["--gradient_checkpointing"] if given.gradient_checkpointing else []),
        *extra,
    ]
    runpy.run_path(str(given.script), run_name="__main__")


def stand_in_for_torchvision() -> None:
    """Put the transforms that the script uses where torchvision is missing."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    # These look for torchvision once, and must not find the stand-in.
    import diffusers.training_utils  # noqa: F401
    from diffusers import StableDiffusionXLPipeline  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    library = _make_module("torchvision")
    transforms = _make_module("torchvision.transforms")
    functional = _make_module("torchvision.transforms.functional")
    for tool in (Compose, Resize, CenterCrop, RandomCrop, Flip, ToTensor, Normalize):
        setattr(transforms, tool.__name__, tool)
    transforms.RandomHorizontalFlip = Flip
    transforms.InterpolationMode = InterpolationMode
    functional.crop = crop
    library.transforms, transforms.functional = transforms, functional


def _make_module(name: str) -> Any:
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    return module


class InterpolationMode(Enum):
    """The names that the script's option may have."""

    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


class Compose:
    """One transform after another."""

    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, picture: Any) -> Any:
        """Do it."""
        for step in self.steps:
            picture = step(picture)
        return picture


class Resize:
    """Scale the shorter side to a length."""

    def __init__(self, side: int, interpolation: InterpolationMode) -> None:
        self.side, self.kind = side, Image.Resampling[interpolation.name]

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Do it."""
        scale = self.side / min(picture.size)
        size = tuple(max(self.side, int(length * scale)) for length in picture.size)
        return picture if size == picture.size else picture.resize(size, self.kind)


class RandomCrop:
    """Cut a square anywhere."""

    def __init__(self, side: int) -> None:
        self.side = side

    @staticmethod
    def get_params(picture: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Draw top and left; return them with the size."""
        free = picture.height - size[0], picture.width - size[1]
        return random.randint(0, free[0]), random.randint(0, free[1]), *size

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Do it."""
        return crop(picture, *self.get_params(picture, (self.side, self.side)))


class CenterCrop(RandomCrop):
    """Cut a square from the middle."""

    @staticmethod
    def get_params(picture: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Find top and left; return them with the size."""
        free = picture.height - size[0], picture.width - size[1]
        return round(free[0] / 2), round(free[1] / 2), *size


class Flip:
    """Mirror always: the script makes one, and asks for it with a flag only."""

    def __init__(self, p: float) -> None:
        if p != 1.0:
            raise ValueError("this stand-in mirrors always")

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Do it."""
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class ToTensor:
    """Make a float tensor in [0, 1] with the channels first."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Do it."""
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() / 255


class Normalize:
    """Take a mean off and divide by a deviation."""

    def __init__(self, mean: list[float], deviation: list[float]) -> None:
        self.mean, self.deviation = mean[0], deviation[0]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Do it."""
        return (pixels - self.mean) / self.deviation


def crop(picture: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """Cut a rectangle."""
    return picture.crop((left, top, left + width, top + height))


# ------------------------------------------------------------------ ours


def run_ours(given: argparse.Namespace) -> None:
    """Train through the stage that `dreamloom train` calls."""
    from dreamloom.training.train import train_adapter

    train_adapter(*prepare_ours(given), make_config(given))


def prepare_ours(given: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Make a run, and load the model, the photos and the class images."""
    from dreamloom.core.device import pick_runtime
    from dreamloom.core.manifests import ClassImageSet
    from dreamloom.core.run_folder import RunFolder
    from dreamloom.data.photos.prepare import load_photos
    from dreamloom.models.families import load_model

    run = RunFolder(given.out / "ours")
    run.claim()
    model = load_model(str(given.model), pick_runtime("cpu", "fp32"))
    photos = load_photos(given.pictures / "photos", run, given.px)
    files = tuple(path.name for path in sorted((given.pictures / "priors").iterdir()))
    priors = ClassImageSet(
        folder=given.pictures / "priors",
        files=files,
        prompt=CLASS_PROMPT,
        resolution_px=given.px,
        made_from="benchmark",
    )
    return run, model, photos, priors


def make_config(given: argparse.Namespace) -> Any:
    """The script's settings in our names."""
    from dreamloom.core.config.loading import load_config

    settings = {
        "base": str(given.model),
        "seed": 0,
        "precision": "fp32",
        "photos.resolution_px": given.px,
        "photos.shape": "square",
        "subject.phrase": "rraj person",
        "subject.photo_prompt": "a photo of {subject}",
        "priors.count": 1,
        "train.steps": given.updates + 1,
        "train.checkpointing_steps": 100_000,
        "train.batch_photos": 1,
        "train.batch_priors": 1,
        "train.rank": RANK,
        "train.target_modules": "attention",
        "train.learning_rate": RATE,
        "train.text_learning_rate": TEXT_RATE,
        "train.lr_scheduler": "constant",
        "train.warmup_steps": 0,
        "train.weight_decay": DECAY,
        "memory.gradient_checkpointing": "full" if given.gradient_checkpointing else "none",
        "adapter.init_lora_weights": "gaussian",
        "adapter.text_encoders": bool(given.text),
        "objective.weighting": "none",
        "validation.tracker": "none",
        **dict(pair.split("=", 1) for pair in given.set),
    }
    advice = {"resolution_px": given.px, "guidance": 5.0, "learning_rate": RATE}
    return load_config(overrides=settings).resolve(
        {**advice, "target_modules": "attention", "weighting": "none"}
    )


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the arguments; what is left over goes to diffusers' script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who", choices=["script", "ours"])
    parser.add_argument("--script", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--px", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--text", action="store_true", help="train the text encoders too")
    parser.add_argument("--checkpointing", dest="gradient_checkpointing", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="one of our settings")
    parser.add_argument("--result", type=Path, required=True)
    return parser.parse_known_args(arguments)


def main() -> None:
    """Train, and write the times."""
    given, extra = parse()
    torch.set_num_threads(1)
    clock = Clock(given.updates)
    if given.who == "script":
        run_script(given, extra)
    else:
        run_ours(given)
    if len(clock.times) < given.updates + 1 or math.isnan(clock.times[0][0]):
        raise RuntimeError(f"only {len(clock.times)} optimizer steps were seen")
    clock.write(given.result)


if __name__ == "__main__":
    main()
