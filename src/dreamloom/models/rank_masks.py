"""Rank masks: which ranks of an adapter's updates count in a pass, image by image.

An update is a sum over its ranks, and a mask on what the up factor is given leaves some of them
out: by chance while an adapter is trained (dropout), or by the timestep wherever it is used
(T-LoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils.checkpoint import checkpoint

from dreamloom.core.device import generator_for, seed_for, send
from dreamloom.models.activation_hooks import apply_as
from dreamloom.models.base import AdapterSpec, DropoutSeeds
from dreamloom.models.lowrank import ScaledFactors

Forward: TypeAlias = Callable[[Tensor], Tensor]
"""A layer's forward pass."""


def mask_by_timestep(
    timesteps: Float[Tensor, " images"], train_timesteps: int, rank: int, least: int
) -> Float[Tensor, "images rank"]:
    """Say which ranks count at each image's timestep: 1 for the first ones, 0 for the others.

    At timestep t of T the first r(t) ranks do, with r(t) = ⌊(r − r_min) (T − t) / T⌋ + r_min: all
    of them in a clean picture, r_min in pure noise.

    Args:
        timesteps: From 0, a clean picture, to T; whole numbers or not.
        train_timesteps: T.
        rank: r, of the layer.
        least: r_min, 1 or more; where the layer has fewer ranks, all of them count.

    Source:
        Soboleva et al., T-LoRA (arXiv:2507.05964), with the exponent 1.
    """
    least = min(least, rank)
    times = timesteps.float().clamp(0, train_timesteps)
    # Products of small whole numbers are exact in float32, and so is a quotient that is whole.
    active = ((rank - least) * (train_timesteps - times) / train_timesteps).floor() + least
    return (torch.arange(rank, device=active.device) < active[:, None]).float()


@dataclass(frozen=True)
class Pass:
    """What is left out in one forward pass of the denoiser.

    Args:
        masks: For each layer a factor for each rank of each image, or of all images alike; None
            where all ranks count.
        seeds: Of dropout, or None.
    """

    masks: tuple[Float[Tensor, "_ rank"], ...] | None
    seeds: DropoutSeeds | None


class RankMasks:
    """The masks of a denoiser's adapted layers, made anew for each of its passes.

    Every draw is a function of its seed, its purpose and its layer, so it is the same in whatever
    batch and order, and when a pass is computed again.

    Args:
        denoiser: Whose passes; `remove` leaves it as it was.
        ranks: The rank of each layer by its name.
        spec: Says what is left out.
        train_timesteps: How many timesteps the base model has.
    """

    def __init__(
        self, denoiser: nn.Module, ranks: Mapping[str, int], spec: AdapterSpec, train_timesteps: int
    ) -> None:
        self._numbers = {name: number for number, name in enumerate(sorted(ranks))}
        self._ranks = [ranks[name] for name in self._numbers]
        self._spec, self._train_timesteps = spec, train_timesteps
        self._seeds: DropoutSeeds | None = None
        self._now: Pass | None = None
        self._hooks = [
            denoiser.register_forward_pre_hook(self._begin),
            denoiser.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Mask nothing any more."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def dropping(self, seeds: DropoutSeeds) -> Iterator[None]:
        """Let the passes of a block drop out what the spec says; elsewhere nothing does."""
        self._seeds = seeds
        try:
            yield
        finally:
            self._seeds = None

    def _begin(self, denoiser: nn.Module, inputs: tuple[Any, ...]) -> None:
        del denoiser
        images, timesteps = inputs[:2]
        parts = []
        least = self._spec.t_lora_min_rank
        if least is not None:
            times = torch.as_tensor(timesteps, device=images.device).reshape(-1)
            tables = {
                rank: mask_by_timestep(times, self._train_timesteps, rank, least)
                for rank in set(self._ranks)
            }
            parts.append(torch.cat([tables[rank] for rank in self._ranks], dim=1))
        if self._seeds is not None:
            parts += [send(one, images.device) for one in self._draw(self._seeds)]
        if not parts and self._seeds is None:
            return
        masks = None
        if parts:
            whole = parts[0]
            for one in parts[1:]:
                whole = whole * one
            masks = whole.split(self._ranks, dim=1)
        self._now = Pass(masks, self._seeds)

    def _end(self, denoiser: nn.Module, inputs: Any, outputs: Any) -> None:
        del denoiser, inputs, outputs
        self._now = None

    def _draw(self, seeds: DropoutSeeds) -> Iterator[Float[Tensor, "_ ranks"]]:
        """Draw what is left out as a whole: of each image some ranks, of all images some layers."""
        if self._spec.rank_dropout:
            count, left = sum(self._ranks), 1 - self._spec.rank_dropout
            generators = [generator_for(seed, "rank dropout") for seed in seeds.images]
            drawn = torch.stack([torch.rand(count, generator=one) for one in generators])
            yield (drawn < left) / left
        if self._spec.module_dropout:
            generator = generator_for(seeds.update, "module dropout")
            drawn = torch.rand(len(self._ranks), generator=generator)
            kept = (drawn >= self._spec.module_dropout).float()
            yield kept.repeat_interleave(torch.tensor(self._ranks))[None]

    def mask(self, name: str, narrow: Tensor) -> Tensor:
        """Leave out what does not count of what a layer's up factor is given.

        Args:
            name: The layer's.
            narrow: (images, …, rank), or (images, rank, height, width) of a convolution.
        """
        assert self._now is not None
        number = self._numbers[name]
        if self._now.masks is not None:
            mask = self._now.masks[number]
            if len(mask) not in (1, len(narrow)):
                raise ValueError(
                    f"{name} is given {len(narrow)} rows, and masks are of {len(mask)}"
                )
            narrow = narrow * shape_like(mask, narrow).to(narrow.dtype)
        if self._now.seeds is not None and self._spec.dropout:
            left = 1 - self._spec.dropout
            # Drawn in the order of its dimensions, in whatever order it lies in memory.
            kept = torch.empty(narrow.shape, dtype=narrow.dtype, device=narrow.device)
            for row, seed in zip(kept, self._now.seeds.images, strict=True):
                generator = Generator(narrow.device).manual_seed(seed_for(seed, f"dropout {name}"))
                row.bernoulli_(left, generator=generator)
            narrow = narrow * kept.div_(left)
        return narrow

    @property
    def are_set(self) -> bool:
        """Whether a pass is going on in which something is left out."""
        return self._now is not None

    def checkpoint(self, module: nn.Module, *inputs: Any) -> Any:
        """Recompute a part of the denoiser in the backward pass, with the masks of its own pass."""
        now = self._now

        def run(*given: Any) -> Any:
            before, self._now = self._now, now
            try:
                return module(*given)
            finally:
                self._now = before

        return checkpoint(run, *inputs, use_reentrant=False)


def shape_like(mask: Float[Tensor, "_ rank"], narrow: Tensor) -> Tensor:
    """Let a mask meet the dimension of the ranks: the second of four, and else the last."""
    if narrow.dim() == 4:
        return mask[:, :, None, None]
    return mask.view(len(mask), *(1,) * (narrow.dim() - 2), -1)


class MaskedForward:
    """The forward pass of a layer whose ranks are masked; where none are, its own fast one.

    What is computed is left to autograd: several nodes instead of one.

    Args:
        name: The layer's.
        factors: The layer.
        masks: What is left out.
        fast: How it computes with all ranks.
    """

    def __init__(self, name: str, factors: ScaledFactors, masks: RankMasks, fast: Forward) -> None:
        self._name, self._factors, self._masks, self._fast = name, factors, masks, fast

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer's output."""
        one, base = self._factors, self._factors.base
        if one.layer.disable_adapters or not self._masks.are_set:
            return self._fast(x)
        narrow = self._masks.mask(self._name, apply_as(base, x, one.down.to(x.dtype)) * one.scale)
        up = one.up.to(x.dtype)
        change = conv2d(narrow, up) if isinstance(base, nn.Conv2d) else linear(narrow, up)
        output: Tensor = base(x)
        return output + change
