"""Classifier-free guidance: what a pipeline must be given for its two halves."""

from __future__ import annotations

import math
from typing import Any

import torch

from dreamloom.models.base import Sampler
from dreamloom.models.prompts import SDXLConditioning
from dreamloom.models.sampling_shortcuts import IntervalGuidance


def guidance_options(
    chosen: SDXLConditioning, negative: SDXLConditioning | None, sampler: Sampler
) -> dict[str, Any]:
    """Say how the pipeline must be called for prompts and a sampler's guidance."""
    if sampler.guidance <= 1:
        return {"prompt_embeds": chosen.tokens, "guidance_scale": sampler.guidance}
    if negative is None:
        negative = SDXLConditioning(
            torch.zeros_like(chosen.tokens), torch.zeros_like(chosen.pooled)
        )
    else:
        negative = negative.take(torch.zeros(len(chosen), dtype=torch.int64))
    # Both halves go through the U-Net together.
    length = math.lcm(chosen.tokens.shape[1], negative.tokens.shape[1])
    negative = negative.aligned(length)
    halves = {
        "prompt_embeds": chosen.aligned(length).tokens,
        "negative_prompt_embeds": negative.tokens,
        "negative_pooled_prompt_embeds": negative.pooled,
    }
    if sampler.guidance_interval == (0.0, 1.0):
        return {"guidance_scale": sampler.guidance, **halves}
    part = IntervalGuidance(
        sampler.guidance, sampler.guidance_interval, negative.tokens, negative.pooled
    )
    return {**part.options(), **halves}
