"""What two adapters have to do with each other, layer by layer, before they are merged."""

from __future__ import annotations

from dreamloom.merging.diagnose.advice import give_advice
from dreamloom.merging.diagnose.groups import Group, group_layers
from dreamloom.merging.diagnose.measuring import Diagnosis, LayerPair, diagnose_adapters
from dreamloom.merging.diagnose.picture import draw_diagnosis

__all__ = [
    "Diagnosis",
    "Group",
    "LayerPair",
    "diagnose_adapters",
    "draw_diagnosis",
    "give_advice",
    "group_layers",
]
