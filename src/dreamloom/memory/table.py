"""A few counted numbers of one base model, from which every setting's memory is predicted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

SDXL_FILE = Path(__file__).with_name("sdxl.json")
"""The table of SDXL's published size; `benchmarks/count_memory.py --write` makes it."""
PICTUREBOOK_FILE = Path(__file__).with_name("picturebook.json")
"""The table of the embedded model; made by the same command."""


@dataclass(frozen=True)
class MemoryTable:
    """Bytes that were counted, at 16 bits and one resolution.

    Args:
        made_by: The command that made it.
        resolution_px: Side of the pictures that were counted.
        unet: Bytes of the denoiser by how it is stored.
        text: Bytes of both text encoders by how they are stored: whole or int8.
        vae: Bytes of the autoencoder.
        adapter: Parameters of the denoiser's adapter per rank, by target modules.
        text_adapter: The same for the text encoders.
        training: By checkpointing, what forward and backward passes hold of one image.
        target_modules: What they hold more of one image than with ``attention`` alone,
            unrecomputed.
        rank: The same per rank above 16.
        text_training: By target modules, what they hold more for trained text encoders.
        stored: What turning stored weights back holds, by how they are stored.
        denoise: What denoising holds of one row; a picture is two, both halves of guidance.
        decode: What decoding a picture holds.
        encode: What encoding a picture holds.
        prompts: What encoding prompts holds.
        flops: Floating-point operations: ``forward`` of one image, and of its forward and backward
            passes by checkpointing; ``encode`` and ``decode`` of the autoencoder.
    """

    made_by: str
    resolution_px: int
    unet: dict[str, int]
    text: dict[str, int]
    vae: int
    adapter: dict[str, int]
    text_adapter: dict[str, int]
    training: dict[str, int]
    target_modules: dict[str, int]
    rank: int
    text_training: dict[str, int]
    stored: dict[str, int]
    denoise: int
    decode: int
    encode: int
    prompts: int
    flops: dict[str, float]

    def as_json(self) -> str:
        """Write it down."""
        return json.dumps(asdict(self), indent=2) + "\n"


@cache
def read_table(file: Path = SDXL_FILE) -> MemoryTable:
    """Read a table; by default that of SDXL's published size."""
    entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return MemoryTable(**entries)
