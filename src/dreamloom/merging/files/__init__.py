"""Stage 6: several adapters in, one adapter file out, which says and proves how it was made."""

from __future__ import annotations

from dreamloom.merging.files.base_model import Question
from dreamloom.merging.files.convert import convert_file, extract_file, resize_adapter
from dreamloom.merging.files.fuse import FusedCheckpoint, fuse_into_checkpoint
from dreamloom.merging.files.inspect import diagnose_files, inspect_file
from dreamloom.merging.files.merge import carry_out, check_out, merge_adapters
from dreamloom.merging.files.recipe import (
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
from dreamloom.merging.files.record import record_merge
from dreamloom.merging.files.reweight import list_parts, parse_changes, remix_merge
from dreamloom.merging.files.verify import Verified, verify_merge

__all__ = [
    "FusedCheckpoint",
    "Part",
    "Precision",
    "Question",
    "Recipe",
    "Verified",
    "carry_out",
    "check_out",
    "convert_file",
    "diagnose_files",
    "extract_file",
    "fuse_into_checkpoint",
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
