"""Checkpoints: the state of an unfinished training (weights, optimizer, EMA) as safetensors."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dreamloom.core.errors import TrainingError
from dreamloom.core.run_folder import atomic_path

_MOST_FILES = 2
_CHECKED = ("updates_done", "inputs", "state")


@runtime_checkable
class Stateful(Protocol):
    """Something with a state of plain values and tensors: a running average, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Give the state."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Put a state back."""
        ...


class DamagedCheckpointError(TrainingError):
    """A checkpoint's file is not what was written."""


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on.

    Args:
        updates_done: How many updates the state has seen; 0 if there was no checkpoint.
        path: The file that it came from, or None.
        note: What the user should know, in one sentence, or an empty text.
        losses: The losses of those updates; none from a checkpoint that kept none.
    """

    updates_done: int
    path: Path | None = None
    note: str = ""
    losses: tuple[float, ...] = ()


class Checkpoints:
    """The newest two states of one training, in a folder of their own.

    Args:
        folder: Where the files lie; nothing else should.
        weights: What is trained, in a fixed order.
        optimizer: The optimizer over these weights, of any kind.
        inputs: Fingerprints of everything that the run depends on.
        others: Whatever else has a state, by name, such as ``average`` and ``scaler``.
    """

    def __init__(
        self,
        folder: Path,
        weights: Sequence[Parameter],
        optimizer: Optimizer,
        inputs: dict[str, str],
        others: Mapping[str, Stateful] | None = None,
    ) -> None:
        self.folder = folder
        self._weights = weights
        self._optimizer = optimizer
        self._inputs = inputs
        self._others = others or {}

    def save(self, updates_done: int, losses: Sequence[float] = ()) -> Path:
        """Write the state after ``updates_done`` updates, and drop all but the newest two.

        The losses of these updates lie beside it, so that a training that goes on can tell them.

        If it cannot be written, for example because the disk is full, the oldest makes room
        first; the newest earlier one stays whatever happens.

        Raises:
            TrainingError: If it cannot be written: says what can be gone on from.
            ValueError: If the weights are not those in training; see `write`.
        """
        # What a killed process left behind would fill the disk one day.
        for leftover in self.folder.glob(".writing-*"):
            leftover.unlink(missing_ok=True)
        path = self.folder / f"update-{updates_done:07}.safetensors"
        earlier = [one for one in self._files() if one != path]
        try:
            try:
                self.write(path, updates_done, losses)
            except (OSError, SafetensorError):
                if not earlier[1:]:
                    raise
                for old in earlier[1:]:
                    old.unlink(missing_ok=True)
                self.write(path, updates_done, losses)
        except (OSError, SafetensorError) as error:
            problem = (
                f"The checkpoint {path} after update {updates_done} cannot be written: {error}."
            )
            hint = "Make room on the disk and run the same command again"
            if not earlier:
                raise TrainingError(problem, f"{hint}; it begins anew.") from error
            raise TrainingError(
                f"{problem} The one before it, {earlier[0].name}, is whole; nothing up to there is "
                "lost.",
                f"{hint} to go on from there.",
            ) from error
        for old in earlier[_MOST_FILES - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def resume(self) -> Resumed:
        """Put the newest state back that can be read.

        Raises:
            TrainingError: If it was made from other inputs (the message names those that differ),
                or none of the files can be read.
        """
        damaged: list[DamagedCheckpointError] = []
        for path in self._files():
            try:
                done, losses = self.read(path)
            except DamagedCheckpointError as error:
                damaged.append(error)
                continue
            note = f"goes on after update {done}, from {path}"
            if damaged:
                note = f"{note}; the newer one is damaged: {damaged[0].problem}"
            return Resumed(done, path, note, losses)
        if damaged:
            raise damaged[0]
        return Resumed(0)

    def clear(self) -> None:
        """Remove all of them, once the training is finished."""
        for path in [*self._files(), *self.folder.glob(".writing-*")]:
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """The checkpoints there are, newest first."""
        return sorted(self.folder.glob("update-*.safetensors"), reverse=True)

    def write(self, path: Path, updates_done: int, losses: Sequence[float] = ()) -> None:
        """Write the state into a file; an earlier one is replaced only at the end.

        Tensors are safetensors, everything else is JSON in the file's metadata; a checksum over
        both tells damage that the format itself does not notice.

        Raises:
            OSError: If the file cannot be written.
            SafetensorError: The same.
            ValueError: If an optimizer that averages the weights shows its average now, or a state
                holds what is neither a tensor nor a plain value.
        """
        if any(group.get("train_mode") is False for group in self._optimizer.param_groups):
            raise ValueError("the weights are the optimizer's average now: save outside that block")
        tensors: dict[str, Tensor] = {}
        plain = {
            "weights": _flatten([weight.detach() for weight in self._weights], tensors),
            "optimizer": _flatten(self._optimizer.state_dict(), tensors),
            "others": {
                name: _flatten(other.state_dict(), tensors) for name, other in self._others.items()
            },
            "losses": list(losses),
        }
        metadata = {
            "updates_done": str(updates_done),
            "inputs": json.dumps(self._inputs),
            "state": json.dumps(plain),
        }
        metadata["checksum"] = _checksum(tensors, metadata)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def read(self, path: Path) -> tuple[int, tuple[float, ...]]:
        """Put a file's state back; return how many updates it has seen, and their losses.

        Nothing changes unless all fits.

        Raises:
            DamagedCheckpointError: If the file cannot be read or is not what was written.
            TrainingError: If it was made from other inputs (the message names those that differ)
                or holds another model's weights.
        """
        try:
            updates_done, made_from, saved = _read(path)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedCheckpointError(
                f"The checkpoint {path} cannot be read: {error}.",
                "Delete it to start from the beginning.",
            ) from error
        mine = self._inputs
        differing = sorted(k for k in {*made_from, *mine} if made_from.get(k) != mine.get(k))
        if differing:
            raise TrainingError(
                f"The checkpoint {path} was made with other {', '.join(differing)}.",
                "Use the same ones to go on, or name another --out to start anew.",
            )
        groups, saved_groups = self._optimizer.param_groups, saved["optimizer"]["param_groups"]
        if (
            [weight.shape for weight in self._weights] != [one.shape for one in saved["weights"]]
            or [len(one["params"]) for one in groups]
            != [len(one["params"]) for one in saved_groups]
            or saved["others"].keys() != self._others.keys()
        ):
            raise TrainingError(
                f"The checkpoint {path} holds other weights than this model trains.",
                "Delete it to start from the beginning.",
            )
        with torch.no_grad():
            for weight, value in zip(self._weights, saved["weights"], strict=True):
                weight.copy_(value)
        _load_optimizer(self._optimizer, saved["optimizer"])
        for name, other in self._others.items():
            other.load_state_dict(saved["others"][name])
        return updates_done, saved["losses"]


# ------------------------------------------------------------------ states as tensors and JSON


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn a state into JSON, with its tensors moved to ``tensors`` and named there.

    Lists, and numbers as names, are told apart from tuples and text, so that what comes back is
    what was there.
    """

    def flatten(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            # A copy: two names must not share memory, and training may go on meanwhile.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"mapping": [[flatten(k), flatten(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [flatten(one) for one in value]}
        if isinstance(value, list):
            return [flatten(one) for one in value]
        # Exactly these: a subclass, such as NumPy's float64, would come back as something else.
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ValueError(f"a checkpoint cannot hold a {type(value).__name__}")

    return flatten(value)


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_flatten`."""
    if isinstance(value, list):
        return [_restore(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "tuple":
        return tuple(_restore(one, tensors) for one in inside)
    if kind == "mapping":
        return {_restore(k, tensors): _restore(v, tensors) for k, v in inside}
    raise ValueError(f"{kind} is no kind of value")


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    total = zlib.crc32("".join(metadata[name] for name in _CHECKED).encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _read(path: Path) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Read a file: its updates, its inputs, and its state by ``weights``, ``optimizer``, ..."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    updates_done, inputs = int(metadata["updates_done"]), dict(json.loads(metadata["inputs"]))
    if _checksum(tensors, metadata) != metadata["checksum"]:
        raise ValueError("its contents do not match its checksum")
    plain = json.loads(metadata["state"])
    saved = {name: _restore(plain[name], tensors) for name in ("weights", "optimizer")}
    saved["others"] = {name: _restore(one, tensors) for name, one in plain["others"].items()}
    # Checkpoints of before have no losses.
    saved["losses"] = tuple(float(loss) for loss in plain.get("losses", ()))
    return updates_done, inputs, saved


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved)
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for weight, number in zip(group["params"], saved_group["params"], strict=True):
            state = optimizer.state.get(weight, {})
            for name, value in saved["state"].get(number, {}).items():
                # Torch casts states to their weight's type; some optimizers keep other types.
                if isinstance(value, Tensor) and state[name].dtype != value.dtype:
                    state[name] = value.to(state[name].device)
        for name, value in group.items():
            if isinstance(value, Tensor) and group["params"]:
                group[name] = value.to(group["params"][0].device)
