"""DreamLoom: teach Stable Diffusion XL a subject, draw it, measure it, merge it.

The names below are the promised ones; each is loaded on first use, so that importing the package
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_DOORS = {
    "Adapter": "lora",
    "DreamLoomError": "core.errors",
    "LoomConfig": "core.config",
    "RunDir": "core.run_folder",
    "evaluate_images": "evaluation",
    "generate_images": "inference.generate",
    "load_config": "core.config",
    "load_model": "models",
    "load_photos": "data.photos",
    "make_priors": "data.class_images",
    "merge_adapters": "merging.files",
    "pick_runtime": "core.device",
    "read_adapter": "lora",
    "train_adapter": "training",
    "write_adapter": "lora",
    "write_report": "report",
}

__all__ = sorted(_DOORS)


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'dreamloom' has no attribute {name!r}")
    return getattr(import_module(f"dreamloom.{_DOORS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
