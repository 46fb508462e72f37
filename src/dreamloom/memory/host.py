"""The computer's own memory: how much is free, also within the limit of a container."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# By version of control groups: the limit, what is used, and what of that is a cache of files.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

_BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class HostMemory:
    """The computer's memory, or what a container has of it.

    Args:
        free: Bytes that a new program can have.
        total: Bytes in all.
        is_limited: Whether a container's limit is what bounds them.
    """

    free: int
    total: int
    is_limited: bool = False


def read_host_memory(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> HostMemory:
    """Read how much memory is free here.

    Args:
        root: Where Linux shows control groups; elsewhere there are none.
        own: Which groups this process is in, as ``/proc/self/cgroup`` tells it.
    """
    machine = psutil.virtual_memory()
    memory = HostMemory(int(machine.available), int(machine.total))
    if own is None:
        try:
            own = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        except OSError:
            own = ""
    for folder, names in _list_groups(root, own):
        try:
            limit = int((folder / names[0]).read_text())
            used = int((folder / names[1]).read_text())
            rows = map(str.split, (folder / "memory.stat").read_text().splitlines())
            cached = int(dict(rows)[names[2]])
        except (OSError, ValueError, KeyError):
            continue  # no such group, or no limit ("max")
        free = min(memory.free, max(0, limit - used + cached))
        if limit < memory.total or free < memory.free:
            memory = HostMemory(free, min(limit, memory.total), is_limited=True)
    return memory


def has_bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Say whether the processor multiplies matrices in bfloat16 itself, as far as Linux tells.

    Such are Intel's from Cooper Lake and AMD's from Zen 4 on (AVX-512 BF16, AMX), and Arm's with
    BF16.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    rows = [row for row in text.splitlines() if row.startswith(("flags", "Features"))]
    words = set(rows[0].split()) if rows else set()
    return bool(words & _BF16_UNITS)


def may_have_gpu(devices: Path = Path("/dev")) -> bool:
    """Say whether a GPU could be here: on Linux without a driver's device there is none.

    Looked for are Nvidia's, AMD's and that of Windows' subsystem for Linux.
    """
    if not sys.platform.startswith("linux"):
        return True
    return any((devices / name).exists() for name in ("nvidiactl", "kfd", "dxg"))


def _list_groups(root: Path, own: str) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """List the folders of this process's groups and of all above them: each limits those below."""
    for line in own.splitlines():
        _, controllers, inner = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _V1) if controllers else (root, _V2)
        folder = top / inner.lstrip("/")
        while True:
            yield folder, names
            if folder in (top, folder.parent):
                break
            folder = folder.parent
