"""AdamW over weights that lie side by side in memory: one long tensor instead of many short ones.

The factors of a LoRA are a thousand small tensors. On a processor, visiting each costs more than
changing it. The weights, their names and what a checkpoint keeps of them are as with torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

_MOMENTS = ("exp_avg", "exp_avg_sq")
# How torch's gradient scaler speaks to fused optimizers.
_SCALER_ATTRIBUTES = ("grad_scale", "found_inf")


class Neighbours:
    """Weights that lie side by side, with their gradients.

    Args:
        parts: The weights, in the order in which they lie. A gradient that one has is kept; where
            there is none it is 0.
    """

    def __init__(self, parts: Sequence[Parameter]) -> None:
        self.parts = tuple(parts)
        first, length = parts[0], sum(part.numel() for part in parts)
        whole = first if len(parts) == 1 else first.detach().as_strided((length,), (1,))
        self.whole = Parameter(whole.detach())
        self.gradient = torch.zeros_like(self.whole)
        self.whole.grad = self.gradient
        for part, piece in zip(parts, self.cut(self.gradient), strict=True):
            if part.grad is not None:
                piece.copy_(part.grad)
            part.grad = piece
        self._places = [part.data_ptr() for part in parts]
        self._gradients = [part.grad for part in parts]

    def cut(self, whole: Tensor) -> list[Tensor]:
        """Cut something of the whole's length into the parts' shapes."""
        if len(self.parts) == 1:
            return [whole]
        pieces = whole.split([part.numel() for part in self.parts])
        return [piece.view_as(part) for piece, part in zip(pieces, self.parts, strict=True)]

    def are_together(self) -> bool:
        """Say whether weights and gradients still lie where they did."""
        pairs = zip(self.parts, self._gradients, strict=True)
        return (
            all(part.grad is own for part, own in pairs)
            and [part.data_ptr() for part in self.parts] == self._places
        )


def find_neighbours(weights: Sequence[Parameter]) -> list[list[Parameter]]:
    """Put weights together that lie side by side; the others stay alone."""
    ordered = sorted(weights, key=lambda one: one.data_ptr())
    groups = [ordered[:1]] if ordered else []
    for before, after in pairwise(ordered):
        are_neighbours = (
            before.untyped_storage()._cdata == after.untyped_storage()._cdata
            and before.is_contiguous()
            and after.is_contiguous()
            and before.dtype == after.dtype
            and before.storage_offset() + before.numel() == after.storage_offset()
        )
        if are_neighbours:
            groups[-1].append(after)
        else:
            groups.append([after])
    return groups


class FlatAdamW(AdamW):
    """torch's fused AdamW, with weights that lie side by side changed as one.

    Groups, states and rates are those of the single weights, to read, to set and to save. Their
    gradients come to lie side by side, too, and are added up there. A weight without a gradient
    is taken to have one of 0.

    Args:
        groups: As torch's.
        settings: As torch's.
    """

    def __init__(self, groups: Any, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._flat: AdamW | None = None
        self._runs: list[list[Neighbours]] = []

    def gather_gradients(self) -> list[Tensor]:
        """Return the gradients of all weights in few tensors, which are those to be used."""
        self._flatten_if_needed()
        return [run.gradient for runs in self._runs for run in runs]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        if self._flat is None:
            super().zero_grad(set_to_none)
        for gradient in self.gather_gradients():
            gradient.zero_()

    @torch.no_grad()
    def _flatten_if_needed(self) -> AdamW:
        if self._flat is not None and all(
            run.are_together() for runs in self._runs for run in runs
        ):
            return self._flat
        self._runs = [
            [Neighbours(parts) for parts in find_neighbours(group["params"])]
            for group in self.param_groups
        ]
        groups = [
            {**group, "params": [run.whole for run in runs]}
            for group, runs in zip(self.param_groups, self._runs, strict=True)
        ]
        self._flat = AdamW(groups, fused=True)
        for run in (run for runs in self._runs for run in runs):
            if all(part in self.state for part in run.parts):
                states = [self.state[part] for part in run.parts]
                self._flat.state[run.whole] = {"step": states[0]["step"].clone()} | {
                    name: torch.cat([one[name].flatten() for one in states]).view_as(run.whole)
                    for name in _MOMENTS
                }
                self._share_states(run, self._flat)
        return self._flat

    def _share_states(self, run: Neighbours, flat: AdamW) -> None:
        """Let the parts' states be pieces of the whole's."""
        whole = flat.state[run.whole]
        cut = {name: run.cut(whole[name]) for name in _MOMENTS}
        for number, part in enumerate(run.parts):
            pieces = {name: cut[name][number] for name in _MOMENTS}
            self.state[part] = {"step": whole["step"], **pieces}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of the single weights."""
        super().load_state_dict(state_dict)
        self._flat = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change all weights.

        Raises:
            ValueError: If a closure is given.
        """
        if closure is not None:
            raise ValueError("compute the loss before the step: no closure is called here")
        flat = self._flatten_if_needed()
        for mine, its in zip(self.param_groups, flat.param_groups, strict=True):
            its.update({name: value for name, value in mine.items() if name != "params"})
        vars(flat).update(
            {name: vars(self)[name] for name in _SCALER_ATTRIBUTES if name in vars(self)}
        )
        try:
            flat.step()
        finally:
            for name in _SCALER_ATTRIBUTES:
                vars(flat).pop(name, None)
        for run in (run for runs in self._runs for run in runs):
            if run.parts[0] not in self.state:
                self._share_states(run, flat)
