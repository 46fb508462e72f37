"""What a merge must know from the base model: how its layers are filled, which masks fit."""

from __future__ import annotations

from dreamloom.merging.activations.forward_passes import Inquiry, list_asks, weigh_adapters
from dreamloom.merging.activations.prepare import PREPARERS, Preparation, prepare_merge
from dreamloom.merging.activations.prompts import MergePrompts, find_prompts
from dreamloom.merging.activations.targets import Examples, measure_missed, record_examples

__all__ = [
    "PREPARERS",
    "Examples",
    "Inquiry",
    "MergePrompts",
    "Preparation",
    "find_prompts",
    "list_asks",
    "measure_missed",
    "prepare_merge",
    "record_examples",
    "weigh_adapters",
]
