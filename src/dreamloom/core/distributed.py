"""Several processes that train together, as ``accelerate launch`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed import ReduceOp


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        count: How many there are.
        index: Which of them this one is, from 0; the first alone writes files.
    """

    count: int = 1
    index: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and talks to the user."""
        return self.index == 0

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.count == 1 or not tensors:
            return
        # One message for all: adapters are hundreds of small tensors.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat, ReduceOp.SUM)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def any_says(self, said_here: bool, device: torch.device) -> bool:
        """Say whether any process says so: all of them get the same answer."""
        return self.any_say((said_here,), device)[0]

    def any_say(self, said_here: Sequence[bool], device: torch.device) -> list[bool]:
        """Say of several things at once whether any process says so, in one message."""
        if self.count == 1:
            return list(said_here)
        said = torch.tensor([float(one) for one in said_here], device=device)
        torch.distributed.all_reduce(said, ReduceOp.MAX)
        return [bool(one) for one in said.tolist()]

    def wait(self) -> None:
        """Wait until every process has come this far."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process go through a block before all others: they find its files."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


def join_processes() -> Processes:
    """Find out which of several processes this is; alone unless a launcher says otherwise."""
    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not torch.distributed.is_available() or not is_launched:
        return Processes()
    # Without a GPU accelerate must be told, or each process takes itself for the only one.
    state = PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.num_processes, state.process_index)
