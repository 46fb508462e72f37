"""Adapters: the one in-memory form of a LoRA, and the files it is read from and written to.

What other programs need of it is found here, too, and loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Adapter": "adapter",
    "Layer": "adapter",
    "make_dora": "peftconfig",
    "read_adapter": "reading",
    "write_adapter": "writing",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dreamloom.lora' has no attribute {name!r}")
    return getattr(import_module(f"dreamloom.lora.{_HOMES[name]}"), name)
