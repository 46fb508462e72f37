"""CPU offload: the parts of a pipeline lie on the device, or wait in the computer's memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_CPU = torch.device("cpu")


class CpuOffload:
    """Brings the parts of a pipeline to the device when they are needed.

    Args:
        parts: Every part by name, on the CPU.
        device: Where they compute.
        cpu_offload: Whether what is at work has the device to itself. Otherwise all parts are
            brought now, and stay until they are released.
    """

    def __init__(
        self, parts: Mapping[str, nn.Module], device: torch.device, cpu_offload: bool = False
    ) -> None:
        self.parts = dict(parts)
        self.device = device
        self.cpu_offload = cpu_offload
        self._here: set[str] = set()
        if not cpu_offload:
            self.load(*parts)

    def load(self, *names: str, exclusive: bool = False) -> None:
        """Bring parts to the device.

        Args:
            names: Which.
            exclusive: Whether the others are of no use meanwhile: one at a time, they go.
        """
        if exclusive and self.cpu_offload:
            self.unload(*(self._here - set(names)))
        for name in names:
            if name not in self._here:
                self.move(self.parts[name], self.device)
                self._here.add(name)

    def unload(self, *names: str) -> None:
        """Put parts into the computer's memory, until they are needed again."""
        leaving = [name for name in names if name in self._here]
        for name in leaving:
            self.move(self.parts[name], _CPU)
        self._here.difference_update(leaving)
        if leaving and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Move one part."""
        module.to(device)
