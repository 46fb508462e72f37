"""Patterns of layer names (block weights, target modules), and B-LoRA's two blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

B_LORA_BLOCKS: Mapping[str, str] = MappingProxyType(
    {"content": "unet.up_blocks.0.attentions.0", "style": "unet.up_blocks.0.attentions.1"}
)
"""SDXL's blocks that hold mostly content and mostly style.

Source:
    Frenkel et al., Implicit Style-Content Separation using B-LoRA (arXiv:2403.14572), section 4.
"""


def matches(pattern: str, name: str) -> bool:
    """Say whether a pattern is a run of whole parts of a layer's name; ``*`` stands for anything.

    Example:
        >>> matches("attentions.1", "unet.up_blocks.0.attentions.1.proj_in")
        True
        >>> matches("attentions.1", "unet.up_blocks.0.attentions.10.proj_in")
        False
        >>> matches("up_blocks.*.to_q", "unet.up_blocks.0.attentions.1.attn1.to_q")
        True
    """
    return _compile(pattern).search(name) is not None


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> re.Pattern[str]:
    inner = ".*".join(map(re.escape, pattern.split("*")))
    return re.compile(rf"(^|\.)({inner})(\.|$)")
