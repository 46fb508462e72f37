"""Device, precision and seeds: where and how precisely to compute, which random numbers to draw."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from dreamloom.core.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]

if sys.platform != "win32":
    import resource

# glibc's malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD. The last is at its limit for
# small models; large ones get their larger tensors from the system, and give them back whole.
_KEEPING = {-1: 2**30, -2: 2**26, -3: 2**25}
_SPARING = {-1: 2**27, -2: 2**20, -3: 2**20}
_spares_memory: list[bool] = []

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device and the precision of the frozen base model on it; adapters are always float32."""

    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The device and precision in words, for records: ``cpu fp32``."""
        precision = next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} {precision}"
        return f"{self.device.type} {precision}"


def pick_runtime(device: str = "auto", precision: Precision = "auto") -> Runtime:
    """Choose where to compute: a CUDA GPU if there is one, else Apple's, else the processor.

    ``auto`` precision is bf16 on GPUs that compute in it, fp16 on older ones and fp32 elsewhere.
    fp16 is for GPUs: a processor computes in fp32 instead.
    Choosing the processor also changes the whole process: torch flushes subnormal numbers to 0,
    and freed memory is kept for what comes next.

    Raises:
        ConfigError: If the asked device is unknown or not present on this machine.
    """
    chosen = find_device(device)
    if precision == "auto":
        precision = "fp32"
        if chosen.type == "cuda":
            precision = "bf16" if computes_bf16(chosen) else "fp16"
    if chosen.type == "cpu":
        precision = "fp32" if precision == "fp16" else precision
        # Values below 1e-38 slow CPU kernels tenfold and carry no information here.
        torch.set_flush_denormal(True)
        _keep_freed_memory()
    return Runtime(chosen, _DTYPES[precision])


def spare_memory() -> None:
    """Let tensors give back to the system what they held, for the rest of the process.

    A large model's tensors leave gaps in what glibc keeps, which came to 2 GiB in a training of
    SDXL, and asking the system for each anew is nothing beside what is computed with it.
    """
    _spares_memory.append(True)
    _set_malloc(_SPARING)


def _keep_freed_memory() -> None:
    """Let glibc hand out again what tensors gave back, instead of asking the system each time.

    By itself it returns pieces of 128 KiB and more at once, and the system clears each anew: in a
    small model's training that took a twelfth of the time. Other C libraries stay as they are.
    """
    if not _spares_memory:
        _set_malloc(_KEEPING)


def _set_malloc(options: dict[int, int]) -> None:
    change = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if change is not None:
        for option, nbytes in options.items():
            change(option, nbytes)


def find_device(name: str = "auto") -> torch.device:
    """Find a device by its name; ``auto`` is a CUDA GPU, else Apple's, else the processor.

    Raises:
        ConfigError: If it is unknown or not present on this machine.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        # A launcher of several processes gives each a GPU of its own.
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        known = device.type in {"cpu", "cuda", "mps"}
    except RuntimeError:
        known = False
    if not known:
        raise ConfigError(
            f"--device {name} is not a device's name.", "Use auto, cpu, cuda, cuda:1 or mps."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name} was asked for, but {torch.cuda.device_count() or 'no'} CUDA GPU is "
            "visible here.",
            "Use --device cpu, or install a CUDA build of torch and a driver.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"--device {name} was asked for, but there is no Apple GPU here.", "Use --device cpu."
        )
    return device


def computes_bf16(device: torch.device) -> bool:
    """Say whether a CUDA GPU computes in bfloat16 itself; older ones only emulate it, slowly."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def device_memory_bytes(device: torch.device) -> int | None:
    """Say how much memory a GPU has; None where it shares the computer's."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def return_freed_memory() -> None:
    """Give the system what tensors gave back; see `pick_runtime`, which keeps it."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting until the device has done what was asked before.

    On a GPU that takes memory which the system cannot move, so it is for small tensors.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def seed_for(seed: int, purpose: str, *indices: int) -> int:
    """Derive the seed of one random draw from the run's seed, its purpose and its place.

    Returns:
        A number in [0, 2**63). Distinct arguments give unrelated seeds, so a resumed run throws
        the same dice as an uninterrupted one, whatever was drawn before.
    """
    # Colons separate the parts, so those of the purpose are doubled.
    text = ":".join([str(seed), purpose.replace(":", "::"), *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Make the CPU generator of one random draw; see `seed_for`."""
    return torch.Generator("cpu").manual_seed(seed_for(seed, purpose, *indices))


@dataclass
class Effort:
    """What a piece of work cost."""

    seconds: float = 0.0
    peak_mib: float = 0.0


@contextmanager
def measure_effort(runtime: Runtime | None = None) -> Iterator[Effort]:
    """Measure seconds and peak memory of a block.

    Peak memory is the GPU's allocated memory within the block; without a GPU it is the largest
    memory that this process has ever held, which a later and smaller block cannot lower (and 0 on
    Windows, where Python cannot tell).
    """
    effort = Effort()
    gpu = runtime.device if runtime is not None and runtime.device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    try:
        yield effort
    finally:
        effort.seconds = time.perf_counter() - start
        if gpu is not None:
            effort.peak_mib = torch.cuda.max_memory_allocated(gpu) / 2**20
        elif sys.platform != "win32":
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            effort.peak_mib = held / (2**20 if sys.platform == "darwin" else 2**10)


def prepare_threads(threads: int) -> None:
    """Set torch's threads, and keep denormal numbers from slowing the processor down."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
