"""Random numbers of a merge, which depend on nothing that a user may turn around unawares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from dreamloom.merging.factors import norm
from dreamloom.merging.method import Context, LayerPart


def make_rng(parts: Sequence[LayerPart], context: Context) -> list[torch.Generator]:
    """Give each adapter dice of its own in a layer.

    They are seeded by the seed, the layer and the adapter's place among the others by the size of
    its update. So the order in which the adapters are named, their file format and how their
    updates are split into factors change nothing.

    Returns:
        One generator on the CPU for each part, in the order of ``parts``.
    """
    sizes = [(norm(part.factors), part.weight) for part in parts]
    order = sorted(range(len(parts)), key=sizes.__getitem__)
    rng = []
    for number in range(len(parts)):
        text = f"{context.seed}/{context.layer}/{order.index(number)}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        rng.append(torch.Generator().manual_seed(seed))
    return rng
