"""Files that other programs wrote: read by DreamLoom as what they are, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from clients.measure import compare_changes
from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.sdxl_layers import respell_text
from dreamloom.models.peftstate import change_of


def read_theirs(path: Path, changes: Path, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compare what we read in a file with what its writer's forward pass changes.

    Returns:
        As `compare_changes`; or ``refused``, the sentence that the user would see.
    """
    # PEFT's folders stand beside the name of the file that there is not.
    source = path if path.exists() else path.with_suffix("")
    try:
        adapter = read_adapter(source)
    except AdapterError as error:
        return {"refused": error.problem.replace(str(source), "FILE")}
    return compare_changes(load_file(changes), compute_changes(adapter, weights))


def compute_changes(adapter: Adapter, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter changes of the small base, by the layers' names."""
    state = adapter.peft
    if state is None:
        return {name: layer.update() for name, layer in adapter.layers.items()}
    return {
        respell_text(name): change_of(state, name, weights[respell_text(name)])
        for name in state.layer_names
    }
