"""CPU offload: the parts of a pipeline lie on the device, or wait elsewhere until they are needed.

For a GPU that is the computer's memory. A processor computes in the computer's memory itself, so
there they wait in a temporary file, of which the system reads what is used and drops it again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dreamloom.core.device import return_freed_memory
from dreamloom.core.errors import BaseModelError

_CPU = torch.device("cpu")
_DENOISER = "unet"


class CpuOffload:
    """Brings the parts of a pipeline to the device when they are needed.

    Args:
        parts: Every part by name, on the CPU.
        device: Where they compute.
        cpu_offload: Whether what is at work has the device to itself. Otherwise all parts are
            brought now, and stay until they are released. On a processor the denoiser always
            stays, and the others wait in a file.
    """

    def __init__(
        self, parts: Mapping[str, nn.Module], device: torch.device, cpu_offload: bool = False
    ) -> None:
        self.parts = dict(parts)
        self.device = device
        self.cpu_offload = cpu_offload
        self._here: set[str] = set()
        self._in_files: set[str] = set()
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
        """Let parts wait until they are needed again."""
        leaving = [name for name in names if name in self._here]
        for name in leaving:
            self.move(self.parts[name], _CPU)
        self._here.difference_update(leaving)
        if self.device.type == "cpu" and self.cpu_offload:
            self.put_into_files(leaving)
        if leaving and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Move one part."""
        module.to(device)

    def put_into_files(self, names: list[str]) -> None:
        """Let parts lie in files, once: from then on the system knows what is in use."""
        moved = [name for name in names if name not in self._in_files and name != _DENOISER]
        for name in moved:
            map_weights(self.parts[name], name)
        self._in_files.update(moved)
        if moved:
            return_freed_memory()


def map_weights(module: nn.Module, named: str) -> None:
    """Move a module's weights into a temporary file that is mapped into memory.

    They stay what they are and can be used as before; only that the system may drop them from
    memory, and reads them again from the file. The file goes with the process.

    Args:
        module: On the CPU. Its weights are not to be trained.
        named: What messages call it.

    Raises:
        BaseModelError: If there is no room for the file.
    """
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    with tempfile.TemporaryDirectory(prefix="dreamloom-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / f"{named}.safetensors"
        try:
            save_file({name: one.detach().contiguous() for name, one in held.items()}, file)
        except OSError as error:
            size = sum(one.nbytes for one in held.values()) / 2**30
            raise BaseModelError(
                f"There is no room in {tempfile.gettempdir()} for the {size:.1f} GiB that the base "
                f"model's {named} would wait in ({error}).",
                "Name a folder with more room by the environment variable TMPDIR, or set "
                "memory.cpu_offload=false.",
            ) from error
        for name, tensor in load_file(file).items():
            held[name].data = tensor
