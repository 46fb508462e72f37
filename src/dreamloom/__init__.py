"""DreamLoom: teach Stable Diffusion XL a subject, draw it, measure it, merge it.

The names below are the promised ones; each is loaded on first use, so that importing the package
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_DOORS = {
    "Adapter": "adapters",
    "DreamLoomError": "errors",
    "LoomConfig": "config",
    "RunDir": "rundir",
    "evaluate_images": "evaluate",
    "generate_images": "generate",
    "load_config": "config",
    "load_model": "families",
    "load_photos": "photos",
    "make_priors": "priors",
    "merge_adapters": "merge",
    "pick_runtime": "runtime",
    "read_adapter": "adapters",
    "train_adapter": "train",
    "write_adapter": "adapters",
    "write_report": "report",
}

__all__ = sorted(_DOORS)


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'dreamloom' has no attribute {name!r}")
    return getattr(import_module(f"dreamloom.{_DOORS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
