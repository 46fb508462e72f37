"""What a merge must know from the base model: how its layers are filled, which masks fit."""

from __future__ import annotations

from dreamloom.calibrate.examples import Examples, measure_missed, record_examples
from dreamloom.calibrate.inquiry import Inquiry, list_asks, weigh_adapters
from dreamloom.calibrate.preparing import PREPARERS, Preparation, prepare_merge
from dreamloom.calibrate.prompts import MergePrompts, find_prompts

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
