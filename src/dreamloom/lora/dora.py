"""DoRA and LoraConfig in PEFT's form: factors, ranks, lora_alpha, each output's magnitude."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreamloom.lora.adapter import Layer, PeftState
from dreamloom.lora.sdxl_layers import COMPONENTS

DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def make_dora(layers: Mapping[str, Layer], magnitudes: Mapping[str, Tensor]) -> PeftState:
    """Put factors, whose scales are folded in, and magnitudes together, as PEFT names them."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {
            name + DOWN: layer.down,
            name + UP: layer.up,
            name + MAGNITUDE: magnitudes[name],
        }
    return PeftState("dora", tensors, describe_lora({n: la.rank for n, la in layers.items()}, True))


def describe_lora(ranks: Mapping[str, int], use_dora: bool = False) -> dict[str, dict[str, Any]]:
    """Describe layers whose scales are folded in as PEFT's LoraConfig, by component.

    Alpha equals the rank for every layer, so that readers apply the factors as they are.
    """
    configs: dict[str, dict[str, Any]] = {}
    for component in COMPONENTS:
        own = {
            name.removeprefix(component + "."): rank
            for name, rank in ranks.items()
            if name.startswith(component + ".")
        }
        if not own:
            continue
        counts = Counter(own.values())
        common = max(counts, key=lambda rank: (counts[rank], rank))
        special = {_match(name): rank for name, rank in sorted(own.items()) if rank != common}
        configs[component] = {
            "peft_type": "LORA",
            "r": common,
            "lora_alpha": common,
            "rank_pattern": special,
            "alpha_pattern": special,
            "target_modules": sorted(own),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
        } | ({"use_dora": True} if use_dora else {})
    return configs


def _match(name: str) -> str:
    """Write the pattern of one layer's name."""
    bare = name.removeprefix("text_model.")
    if bare.startswith("encoder.layers."):
        # Versions of transformers differ in the wrapper; PEFT lets a pattern mean a name's end.
        return re.escape(bare)
    # PEFT reads these names as patterns of names' ends; "^" ties each to its own layer.
    return f"^{re.escape(name)}"
