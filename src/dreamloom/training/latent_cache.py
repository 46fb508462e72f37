"""Latent cache: encoded crops on disk, which a training that goes on does not encode again."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamloom.core.run_folder import TEMPORARY, atomic_path
from dreamloom.models.base import Latents

_PARTS = ("mean", "deviation")
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class LatentStore:
    """Latents by what they were made from: the pixels of the crop, and who encoded them.

    What is read is checked; a damaged file is as good as none, and is told of once. So is a disk
    that takes no more.

    Args:
        folder: Where the files lie; nothing else should.
        made_by: What decides how pixels are encoded, such as the base model's fingerprint and the
            device and precision.
        warn: Called with a sentence for the user.
    """

    def __init__(self, folder: Path, made_by: Sequence[str], warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._made_by = "\n".join(made_by)
        self._warn = warn
        self._has_warned = False
        self._is_full = False

    def find(self, pixels: UInt8[Tensor, "3 height width"]) -> Latents | None:
        """Find what was encoded from a crop, on the CPU; None if it is not there or damaged."""
        path = self._file(pixels)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                mean, deviation = (file.get_tensor(part) for part in _PARTS)
                checksum = (file.metadata() or {})["checksum"]
            if checksum != _checksum(mean, deviation):
                raise ValueError("its contents do not match its checksum")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            self._warn_once(f"{path} is damaged, so its picture is encoded again: {error}")
            return None
        return Latents(mean, deviation)

    def keep(self, pixels: UInt8[Tensor, "3 height width"], latents: Latents) -> None:
        """Write what was encoded from a crop, unless the disk is full."""
        if self._is_full:
            return
        mean, deviation = (
            part.detach().to("cpu", torch.float32).contiguous()
            for part in (latents.mean, latents.deviation)
        )
        try:
            with atomic_path(self._file(pixels)) as temporary:
                save_file(
                    dict(zip(_PARTS, (mean, deviation), strict=True)),
                    temporary,
                    metadata={"checksum": _checksum(mean, deviation)},
                )
        except (OSError, SafetensorError) as error:
            self._is_full = True
            self._warn_once(f"encoded pictures are not kept in {self.folder}: {error}")

    def clear(self) -> None:
        """Remove all of them, once the training is finished."""
        for written in self.folder.glob("*.safetensors"):
            if written.name.startswith(TEMPORARY) or _NAME.fullmatch(written.name):
                written.unlink(missing_ok=True)
        # What is somebody else's stays, and so does the folder then.
        with suppress(OSError):
            self.folder.rmdir()

    def _file(self, pixels: Tensor) -> Path:
        key = hashlib.sha256(f"{self._made_by}\n{tuple(pixels.shape)}\n".encode())
        key.update(pixels.contiguous().numpy().data)
        return self.folder / f"{key.hexdigest()}.safetensors"

    def _warn_once(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(text)


def _checksum(mean: Tensor, deviation: Tensor) -> str:
    total = zlib.crc32(mean.numpy().data)
    return f"{zlib.crc32(deviation.numpy().data, total):08x}"
