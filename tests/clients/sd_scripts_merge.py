"""The merging script of kohya's sd-scripts, `networks/sdxl_merge_lora.py`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from clients.sd_scripts import prepare, take_changes

__all__ = ["apply_file", "prepare"]


def apply_file(made: SimpleNamespace, path: Path) -> dict[str, Tensor]:
    """Merge a file into the model as the script does."""
    script = importlib.import_module("networks.sdxl_merge_lora")
    script.merge_to_sd_model(*made.texts, made.unet, [str(path)], [1.0], [], torch.float32)
    return take_changes(made)
