"""Drawing with fewer operations than every step in full; off unless asked for.

Both change the pictures. What they change is measured in docs/drawing.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamloom.models.lora_branches import find_moment

_TOKENS, _POOLED, _TIME_IDS = "prompt_embeds", "add_text_embeds", "add_time_ids"


# ------------------------------------------------------------------ guidance in an interval


class IntervalGuidance:
    """Guides in one part of a drawing; the other steps predict for the prompt alone, at half cost.

    Args:
        guidance: The weight inside the interval, above 1.
        interval: Its first and last progress, 0 at a drawing's first step and 1 at its last.
        tokens: What the unconditional half attends to.
        pooled: The same half's pooled embedding.

    Source:
        Kynkäänniemi et al., Applying Guidance in a Limited Interval Improves Sample and
        Distribution Quality in Diffusion Models (arXiv:2404.07724), Eq. 6. There the interval is
        one of noise levels.
    """

    def __init__(
        self,
        guidance: float,
        interval: tuple[float, float],
        tokens: Float[Tensor, "images tokens features"],
        pooled: Float[Tensor, "images features"],
    ) -> None:
        self._guidance, self._interval = guidance, interval
        self._tokens, self._pooled = tokens, pooled

    def options(self) -> dict[str, Any]:
        """What diffusers' pipeline must be called with."""
        return {
            "guidance_scale": self._weigh(0.0),
            "callback_on_step_end": self._prepare_next,
            "callback_on_step_end_tensor_inputs": [_TOKENS, _POOLED, _TIME_IDS],
        }

    def _weigh(self, progress: float) -> float:
        first, last = self._interval
        return self._guidance if first <= progress <= last else 1.0

    def _prepare_next(
        self, pipeline: Any, number: int, timestep: Any, given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        del timestep
        timesteps = pipeline.scheduler.timesteps
        if number + 1 == len(timesteps):
            return given
        weight = self._weigh(find_moment(timesteps[number + 1], timesteps).progress)
        was_guided = pipeline.do_classifier_free_guidance
        # The pipeline asks for it anew at each step, and has no other way to be told.
        pipeline._guidance_scale = weight
        if was_guided == pipeline.do_classifier_free_guidance:
            return given
        if was_guided:
            return {name: both.chunk(2)[1] for name, both in given.items()}
        return {
            _TOKENS: torch.cat([self._tokens, given[_TOKENS]]),
            _POOLED: torch.cat([self._pooled, given[_POOLED]]),
            _TIME_IDS: torch.cat([given[_TIME_IDS]] * 2),
        }


# ------------------------------------------------------------------ deep levels reused


@contextmanager
def reusing_deep_levels(pipeline: Any, interval: int) -> Iterator[None]:
    """Compute the U-Net's deep levels at each ``interval``-th step of a drawing only.

    The steps between compute the first level, which holds what is small, and take the others'
    result from the last step that was computed in full. 1 computes every step in full.

    Source:
        Ma, Fang and Wang, DeepCache: Accelerating Diffusion Models for Free (arXiv:2312.00858),
        with the cache at the first level.
    """
    if interval <= 1:
        yield
        return

    def is_due(timestep: Any) -> bool:
        return find_moment(timestep, pipeline.scheduler.timesteps).step % interval == 0

    cache = _DeepCache(pipeline.unet, is_due)
    try:
        yield
    finally:
        cache.remove()


class _DeepCache:
    def __init__(self, unet: Any, is_due: Callable[[Any], bool]) -> None:
        self._is_due = is_due
        self.rows, self._rows_cached = 0, 0
        self.is_reusing = False
        deep = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
        self._blocks = [one for one in deep if one is not None]
        for block in self._blocks:
            block.forward = _Reused(block, self, is_read=block is self._blocks[-1])
        self._hook = unet.register_forward_pre_hook(self._choose)

    def _choose(self, unet: nn.Module, inputs: tuple[Any, ...]) -> None:
        del unet
        self.rows = len(inputs[0])
        # Where guidance ends, half of the rows are left; where it begins, half are not known.
        self.is_reusing = not self._is_due(inputs[1]) and self.rows <= self._rows_cached
        if not self.is_reusing:
            self._rows_cached = self.rows

    def remove(self) -> None:
        self._hook.remove()
        for block in self._blocks:
            vars(block).pop("forward", None)


class _Reused:
    """A deep block's forward pass, or what it gave before.

    Args:
        block: The block.
        cache: Says whether to compute.
        is_read: Whether what it gives is read when the deep levels are not computed. Of the others
            only the shapes are, so only these are kept.
    """

    def __init__(self, block: nn.Module, cache: _DeepCache, is_read: bool) -> None:
        self._forward: Callable[..., Any] = block.forward
        self._cache, self._is_read = cache, is_read
        self._cached: Any = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self._cache.is_reusing:
            return _map_tensors(self._cached, lambda one: one[-self._cache.rows :])
        result = self._forward(*inputs, **named)
        self._cached = (
            result
            if self._is_read
            else _map_tensors(result, lambda one: one.new_zeros(()).expand(one.shape))
        )
        return result


def _map_tensors(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(given, tuple):
        return tuple(_map_tensors(one, change) for one in given)
    return change(given)
