"""Stage 6: several adapters in, one adapter file out, which says and proves how it was made."""

from __future__ import annotations

from dreamloom.merge.asking import Question
from dreamloom.merge.baking import Baked, bake_adapters
from dreamloom.merge.changing import convert_file, extract_file, resize_adapter
from dreamloom.merge.making import carry_out, check_out, merge_adapters
from dreamloom.merge.recipe import (
    Part,
    Precision,
    Recipe,
    name_parts,
    parse_options,
    parse_part,
    read_recipe,
    share_blocks,
    share_prompts,
)
from dreamloom.merge.recording import record_merge
from dreamloom.merge.remix import list_parts, parse_changes, remix_merge
from dreamloom.merge.telling import diagnose_files, inspect_file
from dreamloom.merge.verify import Verified, verify_merge

__all__ = [
    "Baked",
    "Part",
    "Precision",
    "Question",
    "Recipe",
    "Verified",
    "bake_adapters",
    "carry_out",
    "check_out",
    "convert_file",
    "diagnose_files",
    "extract_file",
    "inspect_file",
    "list_parts",
    "merge_adapters",
    "name_parts",
    "parse_changes",
    "parse_options",
    "parse_part",
    "read_recipe",
    "record_merge",
    "remix_merge",
    "resize_adapter",
    "share_blocks",
    "share_prompts",
    "verify_merge",
]
