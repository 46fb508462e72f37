"""Inspect a LoRA file: its layers, ranks, norm, format and metadata in plain values."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from dreamloom.lora.adapter import KIND_NAMES
from dreamloom.lora.readers import name_readers
from dreamloom.lora.reading import read_adapter_file
from dreamloom.lora.sdxl_layers import COMPONENTS


def describe_adapter(path: Path) -> dict[str, object]:
    """Summarise an adapter file in plain values: layers, ranks, size, norm, how it was made.

    ``format`` says whose names the file uses, ``readers`` which programs load all of it, ``stored``
    how many layers it keeps as which kind of product, and ``components`` for each part of the
    pipeline how many layers change and which share of the squared norm is theirs. Other kinds than
    LoRA have no ranks, no norm and no shares (None), since these depend on the base.

    Raises:
        AdapterError: If the file cannot be read; see `read_adapter`.
    """
    found = read_adapter_file(path)
    adapter = found.adapter
    ranks = Counter(adapter.ranks.values())
    counts = Counter(name.partition(".")[0] for name in adapter.layer_names)
    energies: dict[str, float] = {}
    if adapter.peft is None:
        for component in counts:
            own = {n: la for n, la in adapter.layers.items() if n.startswith(f"{component}.")}
            energies[component] = replace(adapter, layers=own).norm() ** 2
    total = sum(energies.values())
    summary: dict[str, object] = {
        "file": str(path),
        "format": found.naming,
        "readers": name_readers(path) if path.is_file() else "",
        "stored": dict(found.stored),
        "layers": len(adapter.layer_names),
        "components": {
            component: {
                "layers": counts[component],
                "energy": energies[component] / total if total > 0 else None,
            }
            for component in COMPONENTS
            if component in counts
        },
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "parameters": adapter.parameters,
        "norm": adapter.norm() if adapter.peft is None else None,
        "metadata": dict(adapter.metadata),
    }
    if adapter.peft is not None:
        summary["kind"] = KIND_NAMES[adapter.kind]
    if adapter.tokens:
        summary["words"] = list(adapter.tokens)
    return summary
