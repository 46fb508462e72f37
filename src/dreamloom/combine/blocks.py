"""Weights of single layers: by pattern, by a block's name, or by the lists that tools know."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockWeights:
    """What an adapter's weight is multiplied by in each layer.

    Args:
        rules: Pairs of a pattern and a weight; the last pattern that matches a layer's name
            counts. A layer that none matches has weight 1.
    """

    rules: Sequence[tuple[str, float]] = ()

    def of(self, layer: str) -> float:
        """The weight of a layer, by its name such as ``unet.mid_block.attentions.0.proj_in``."""
        weight = 1.0
        for pattern, value in self.rules:
            if fnmatch.fnmatchcase(layer, pattern):
                weight = value
        return weight


NO_BLOCKS = BlockWeights()
"""Weight 1 in every layer."""
