"""Classifier-free guidance: how its two halves are put together, and what the pipeline is told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamloom.models.base import Sampler
from dreamloom.models.prompts import SDXLConditioning
from dreamloom.models.sampling_shortcuts import IntervalGuidance


def guidance_options(
    chosen: SDXLConditioning, negative: SDXLConditioning | None, sampler: Sampler
) -> dict[str, Any]:
    """Say how diffusers' pipeline must be called for prompts and a sampler's guidance.

    Args:
        chosen: The prompts, one for each picture.
        negative: The prompt of the unconditional half; None for zeros.
        sampler: Its guidance, with the interval and the rescaling of it.
    """
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
    options = {
        "prompt_embeds": chosen.aligned(length).tokens,
        "negative_prompt_embeds": negative.tokens,
        "negative_pooled_prompt_embeds": negative.pooled,
        # diffusers' own: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed
        # (arXiv:2305.08891), Eq. 15 and 16.
        "guidance_rescale": sampler.guidance_rescale,
    }
    if sampler.guidance_interval == (0.0, 1.0):
        return {"guidance_scale": sampler.guidance, **options}
    part = IntervalGuidance(
        sampler.guidance, sampler.guidance_interval, negative.tokens, negative.pooled
    )
    return {**part.options(), **options}


def optimized_scale(
    conditional: Float[Tensor, "images channels height width"],
    unconditional: Float[Tensor, "images channels height width"],
) -> Float[Tensor, "images 1 1 1"]:
    """Give for each picture the factor of its unconditional prediction that fits the other best.

    s* = <c, u> / |u|^2 makes |c - s u| least. 1 where the unconditional prediction is all zeros,
    and any factor would do.

    Source:
        Fan et al., CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models
        (arXiv:2503.18886), the optimized scale. There the predictions are velocities of a flow;
        here whatever the base predicts. We add nothing to the denominator.

    Example:
        >>> c, u = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 2.0)
        >>> optimized_scale(c, u).item()
        1.5
    """
    # Sums of products leave half precision's range.
    c, u = (one.flatten(1).float() for one in (conditional, unconditional))
    square = (u * u).sum(dim=1)
    scale = torch.where(square > 0, (c * u).sum(dim=1) / square, 1.0)
    return scale[:, None, None, None]


@contextmanager
def scaling_unconditional(pipeline: Any, wanted: bool) -> Iterator[None]:
    """Multiply the unconditional half of each guided prediction by `optimized_scale`, for a block.

    Args:
        pipeline: An SDXL pipeline, which draws with u + g (c - u), and so with s u + g (c - s u).
        wanted: Whether to do so at all.
    """
    if not wanted:
        yield
        return

    def scale(unet: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor]) -> Any:
        del unet, inputs
        if not pipeline.do_classifier_free_guidance:
            return output
        unconditional, conditional = output[0].chunk(2)
        factor = optimized_scale(conditional, unconditional).to(unconditional.dtype)
        return (torch.cat([factor * unconditional, conditional]),)

    hook = pipeline.unet.register_forward_hook(scale)
    try:
        yield
    finally:
        hook.remove()
