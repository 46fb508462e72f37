"""Count the memory of tensors while they live: real ones, or fake ones that hold nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK_BYTES = 512
"""CUDA's allocator hands out memory in blocks of this size."""


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while it is on, and the most at once.

    Each storage counts once, however many views there are of it, from the operation that made it
    until it is freed. What a kernel needs for itself and gives back at once is not seen, nor is
    what the allocator cannot hand out again because it is in pieces.

    Example:
        >>> import torch
        >>> with MemoryCounter() as counter:
        ...     kept = torch.zeros(1024)
        ...     _ = kept + 1 + 1
        >>> counter.held_bytes, counter.peak_bytes
        (4096, 12288)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held_bytes = 0
        self.peak_bytes = 0
        # Bytes by storage; 0 for those that lie elsewhere for the time being.
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let the operation run and count what it made."""
        made = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        return made

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before, or that come back to the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # torch has no public name of a storage that costs no memory to ask for.
            key = storage._cdata
            if key not in self._known:
                weakref.finalize(storage, self._free, key)
            elif self._known[key]:
                continue
            size = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
            self._known[key] = size
            self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def put_away(self, tensors: Iterable[Tensor]) -> None:
        """Stop counting tensors that live on, but no longer on the device."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self.held_bytes -= self._known.get(key, 0)
            if key in self._known:
                self._known[key] = 0

    def begin_phase(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.held_bytes

    def _free(self, key: int) -> None:
        self.held_bytes -= self._known.pop(key, 0)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """List the parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]
