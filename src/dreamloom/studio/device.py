"""What this machine has and how busy it is: processors, memory, disk, and GPUs where they tell."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_WAIT_SECONDS = 3
_ASKED = "name,memory.used,memory.total,utilization.gpu"
_MIB = 2**20
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        name: Its name.
        used_bytes: How much of its memory is in use.
        total_bytes: How much it has.
        load_percent: How busy it is; None where it does not tell.
    """

    name: str
    used_bytes: float
    total_bytes: float
    load_percent: float | None


@dataclass(frozen=True)
class Device:
    """What this machine has.

    Args:
        processors: How many processors may be used here.
        load_percent: How busy they are.
        memory_used_bytes: How much memory is in use.
        memory_total_bytes: How much there is.
        disk_free_bytes: How much is free on the disk of the root.
        disk_total_bytes: How large that is.
        gpus: Its GPUs.
    """

    processors: int
    load_percent: float
    memory_used_bytes: float
    memory_total_bytes: float
    disk_free_bytes: float
    disk_total_bytes: float
    gpus: tuple[Gpu, ...]


def look_at_device(root: Path) -> Device:
    """Look at this machine; takes a fifth of a second, or three where its GPUs do not answer."""
    load = psutil.cpu_percent(interval=_LOOK_SECONDS)
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(root)
    return Device(
        processors=_count_processors(),
        load_percent=load,
        memory_used_bytes=memory.total - memory.available,
        memory_total_bytes=memory.total,
        disk_free_bytes=disk.free,
        disk_total_bytes=disk.total,
        gpus=_ask_gpus(),
    )


def _count_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ask_gpus() -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    argv = [program, f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=_WAIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return read_gpus(done.stdout) if done.returncode == 0 else ()


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Read what ``nvidia-smi`` says, a line for each GPU; lines without memory are left out."""
    found = []
    for line in text.splitlines():
        name, *cells = (cell.strip() for cell in line.rsplit(",", 3))
        numbers = [_read_number(cell) for cell in cells]
        if len(numbers) == 3 and numbers[0] is not None and numbers[1] is not None:
            found.append(Gpu(name, numbers[0] * _MIB, numbers[1] * _MIB, numbers[2]))
    return tuple(found)


def _read_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # such as [N/A]
        return None
