"""How much memory a device has, as it was said or found, and what of it tensors may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.memory.host import may_have_gpu, read_host_memory
from dreamloom.memory.predict import GIB

if TYPE_CHECKING:
    import torch

CONTEXT_BYTES = round(0.75 * GIB)
"""What a GPU's driver is allowed beside tensors."""
PROCESS_BYTES = GIB // 2
"""What Python, torch and the other libraries take of the computer's own memory."""
# What the allocator cannot hand out again because it is in pieces, and what kernels work in.
_LOST_SHARE = 0.05

_UNITS = {"": GIB, "g": GIB, "gb": 10**9, "gib": GIB, "m": 2**20, "mb": 10**6, "mib": 2**20}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_LEAST_MEMORY = GIB // 8


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory as it was said.

    Args:
        nbytes: How much that is; of a computer, what is free.
        said: In words.
        is_host: Whether it is the computer's own, which a processor computes in.
        is_set: Whether ``memory.limit`` sets it.
    """

    nbytes: int
    said: str
    is_host: bool = False
    is_set: bool = False

    @property
    def gib(self) -> float:
        """In GiB (2^30 bytes)."""
        return self.nbytes / GIB

    @property
    def usable_bytes(self) -> int:
        """How much of it tensors may hold.

        A GPU's driver takes about 0.75 GiB, Python with its libraries 0.5 GiB of the computer's;
        and a twentieth is lost to pieces and workspaces. These are allowances; only that of the
        libraries was measured (0.44 GiB).
        """
        beside = PROCESS_BYTES if self.is_host else CONTEXT_BYTES
        return max(0, round(self.nbytes * (1 - _LOST_SHARE)) - beside)


def read_memory(text: str, *, is_host: bool = False) -> DeviceMemory:
    """Read a size of memory: 12GiB, 12GB, 11.5 or 8192MiB; a bare number means GiB.

    Args:
        text: The size.
        is_host: Whether it is of the computer's own memory.

    Raises:
        ConfigError: If it is none, or too small for any GPU.
    """
    found = _SIZE.fullmatch(text)
    unit = found.group(2).lower() if found else "?"
    if found is None or unit not in _UNITS:
        raise ConfigError(
            f"{text!r} is no size of memory.",
            "Write it like 12GiB (2^30 bytes each), 12GB (10^9 bytes each) or 8192MiB.",
        )
    nbytes = round(float(found.group(1)) * _UNITS[unit])
    if nbytes < _LEAST_MEMORY:
        raise ConfigError(
            f"{text!r} is {nbytes / 2**20:.0f} MiB, less than any GPU has.",
            "Write it with its unit, like 12GiB.",
        )
    said = f"{nbytes / GIB:.4g} GiB"
    if unit in ("gb", "mb"):
        said = f"{text.strip()} ({nbytes / GIB:.2f} GiB)"
    return DeviceMemory(nbytes, said, is_host)


def find_memory(said: str | None, config: LoomConfig) -> DeviceMemory:
    """Take the memory that was named as a GPU's, or else that of the device that is here.

    Raises:
        ConfigError: If the device is not here, or the size is none.
    """
    if said is not None:
        return read_memory(said)
    if config.device == "cpu" or (config.device == "auto" and not may_have_gpu()):
        has = describe_host()
    else:
        # torch takes seconds to load, and only it knows what a GPU has.
        from dreamloom.core.device import find_device

        device = find_device(config.device)
        found = read_device_memory(device)
        if found is None:
            raise ConfigError(
                f"How much memory {device.type} has is not known.", "Name it: --gpu-memory 12GiB."
            )
        has = found
    return apply_limit(has, config)


def apply_limit(memory: DeviceMemory, config: LoomConfig) -> DeviceMemory:
    """Take ``memory.limit`` instead of what a device has, where the settings name one.

    Raises:
        ConfigError: If it is no size.
    """
    if config.memory.limit == "auto":
        return memory
    return replace(read_memory(config.memory.limit, is_host=memory.is_host), is_set=True)


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """Read how much memory a device has; None where it shares the computer's without limits."""
    from dreamloom.core.device import device_memory_bytes

    if device.type == "cpu":
        return describe_host()
    has = device_memory_bytes(device)
    return None if has is None else read_memory(f"{has / 2**20:.0f}MiB")


def describe_host() -> DeviceMemory:
    """Read what is free of this computer's memory, or of what a container may take of it."""
    host = read_host_memory()
    # What this process holds is free for what it is about to do.
    free = min(host.total, host.free + psutil.Process().memory_info().rss)
    of = "this container" if host.is_limited else "this computer"
    said = f"{free / GIB:.1f} GiB that {of} has free, of {host.total / GIB:.1f}"
    return DeviceMemory(free, said, is_host=True)
