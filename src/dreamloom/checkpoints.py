"""The state of an unfinished training: weights and optimizer moments, as safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from dreamloom.errors import TrainingError
from dreamloom.rundir import atomic_path

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    path: Path,
    weights: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, str],
    updates_done: int,
) -> None:
    """Write the state after ``updates_done`` updates; an earlier file is replaced only at the end.

    Args:
        path: The checkpoint's file.
        weights: What is trained, in a fixed order.
        optimizer: The AdamW over these weights.
        inputs: Fingerprints of everything that the run depends on.
        updates_done: How many updates the state has seen.
    """
    tensors: dict[str, Tensor] = {}
    for number, weight in enumerate(weights):
        tensors[f"{number}.weight"] = weight.detach().cpu().contiguous()
        for name in _MOMENTS:
            if weight in optimizer.state:
                tensors[f"{number}.{name}"] = optimizer.state[weight][name].cpu().contiguous()
    story = {"updates_done": str(updates_done), "inputs": json.dumps(inputs)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=story)


def load_checkpoint(
    path: Path,
    weights: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, str],
) -> int:
    """Put a state back; return how many updates it has seen.

    Raises:
        TrainingError: If the file is damaged, or was made from other inputs: the message names
            those that differ.
    """
    try:
        with safe_open(path, framework="pt") as file:
            story = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        made_from = dict(json.loads(story["inputs"]))
        updates_done = int(story["updates_done"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"The checkpoint {path} cannot be read: {error}.",
            "Delete it to start from the beginning.",
        ) from error
    differing = sorted(k for k in {*made_from, *inputs} if made_from.get(k) != inputs.get(k))
    if differing:
        raise TrainingError(
            f"The checkpoint {path} was made with other {', '.join(differing)}.",
            "Use the same ones to go on, or name another --out to start anew.",
        )
    _refuse_other_shapes(path, weights, tensors)
    for number, weight in enumerate(weights):
        with torch.no_grad():
            weight.copy_(tensors[f"{number}.weight"])
        optimizer.state.pop(weight, None)
        if f"{number}.step" in tensors:
            optimizer.state[weight] = {
                name: tensors[f"{number}.{name}"].to(weight.device) for name in _MOMENTS
            }
    return updates_done


def _refuse_other_shapes(
    path: Path, weights: Sequence[Parameter], tensors: dict[str, Tensor]
) -> None:
    expected = {f"{number}.weight": weight.shape for number, weight in enumerate(weights)}
    found = {key: tensor.shape for key, tensor in tensors.items() if key.endswith(".weight")}
    if found != expected:
        raise TrainingError(
            f"The checkpoint {path} holds other weights than this model trains.",
            "Delete it to start from the beginning.",
        )
