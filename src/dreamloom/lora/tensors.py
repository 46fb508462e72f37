"""Open a file of tensors, after looking at everything that can be wrong with it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.lora.headers import check_layout

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that can run code when they are opened."""


def refuse_pickles(path: Path) -> None:
    """Refuse a pickle by its name, before it is opened.

    Raises:
        AdapterError: If it is one.
    """
    if path.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{path} is a pickle ({path.suffix}), which can run code when it is opened.",
            "DreamLoom reads .safetensors only; ask its author for that format.",
        )


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, in the file's precision, and its header's story.

    Raises:
        AdapterError: If the file is missing, a pickle, empty, cut off or damaged.
    """
    refuse_pickles(path)
    if not path.is_file():
        raise AdapterError(f"There is no adapter at {path}.", "Check the path.")
    try:
        check_layout(path)
        with safe_open(path, framework="pt") as file:
            story = dict(file.metadata() or {})
            # The file itself is no mapping: it has keys, and no iterator over them.
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors: {error}.",
            "The file may be cut off; copy or download it again.",
        ) from error
    return tensors, story


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor of any precision holds neither NaN nor infinity."""
    return bool(torch.isfinite(tensor.float()).all())
