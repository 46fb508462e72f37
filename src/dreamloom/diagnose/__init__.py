"""What two adapters have to do with each other, layer by layer, before they are merged."""

from __future__ import annotations

from dreamloom.diagnose.advice import give_advice
from dreamloom.diagnose.groups import Group, group_layers
from dreamloom.diagnose.measuring import Diagnosis, LayerPair, diagnose_adapters
from dreamloom.diagnose.picture import draw_diagnosis

__all__ = [
    "Diagnosis",
    "Group",
    "LayerPair",
    "diagnose_adapters",
    "draw_diagnosis",
    "give_advice",
    "group_layers",
]
