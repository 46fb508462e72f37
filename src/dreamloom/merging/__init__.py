"""Ways to make one adapter out of several; `methods` lists them, `combine` carries one out."""

from __future__ import annotations

from dreamloom.merging.blocks import NO_BLOCKS, BlockWeights, parse_blocks, read_blocks
from dreamloom.merging.merging import Combined, LayerReport, Uncut, Wish, combine, merge_uncut
from dreamloom.merging.method import Context, Method, Option, Part
from dreamloom.merging.methods import METHODS, find_method
from dreamloom.merging.ranks import FULL, RankWish, parse_rank

__all__ = [
    "FULL",
    "METHODS",
    "NO_BLOCKS",
    "BlockWeights",
    "Combined",
    "Context",
    "LayerReport",
    "Method",
    "Option",
    "Part",
    "RankWish",
    "Uncut",
    "Wish",
    "combine",
    "find_method",
    "merge_uncut",
    "parse_blocks",
    "parse_rank",
    "read_blocks",
]
