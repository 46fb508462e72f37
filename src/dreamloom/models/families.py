"""The families of base models that DreamLoom can teach, and how one is found by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamloom.core.errors import BaseModelError

if TYPE_CHECKING:
    from dreamloom.core.device import Runtime
    from dreamloom.models.base import Family, MemoryOptions, Model


def families() -> tuple[Family, ...]:
    """Every family, in the order in which they are asked; a new family is one line here."""
    from dreamloom.models.sdxl import SDXLFamily

    return (SDXLFamily(),)


def load_model(base: str, runtime: Runtime, memory_options: MemoryOptions | None = None) -> Model:
    """Load a base model with the first family that recognises its name.

    Args:
        base: What ``--base`` names.
        runtime: Where to compute.
        memory_options: How it spares memory; None keeps everything on the device as it is.

    Raises:
        BaseModelError: If no family recognises it, or it cannot be found or read.
    """
    from dreamloom.models.base import NO_SAVINGS

    for family in families():
        if family.recognises(base):
            return family.load(base, runtime, memory_options or NO_SAVINGS)
    raise BaseModelError(
        f"There is no base model {base} here: it is no known name, hub id, folder or checkpoint.",
        "An adapter tells no more than its base's name. Name the base with --base: picturebook, "
        "sdxl, a hub id like owner/name, a folder in diffusers' layout, or a .safetensors "
        "checkpoint.",
    )
