"""How encoders compute: all their weights, in float32, without gradients, and silently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamloom.core.errors import EvaluationError
from dreamloom.core.run_folder import file_sha256

WEIGHTS = "model.safetensors"


def name_by_weights(folder: Path, weights: str = WEIGHTS) -> str:
    """Name an encoder by its folder and the hash of its weights."""
    return f"{folder.name}@{file_sha256(folder / weights)[:12]}"


def load_pretrained(kind: Any, folder: Path, device: torch.device | str, **options: Any) -> Any:
    """Load a transformers model's weights, all of them: a layer at random would score in silence.

    Raises:
        ValueError: If some of the model's weights are absent or of another shape.
    """
    with _quiet():
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    require_all([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    assert isinstance(model, nn.Module)
    return make_ready(model, device)


def require_all(absent: list[str]) -> None:
    """Refuse weights that lack some of the model's.

    Raises:
        ValueError: If there is one.
    """
    if absent:
        first = sorted(absent)[0]
        raise ValueError(f"{WEIGHTS} lacks {len(absent)} of the model's weights: {first} …")


def make_ready(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Put a model where it computes, for looking only."""
    return model.to(device).float().eval().requires_grad_(False)


def unit_rows(features: Tensor) -> Float[Tensor, "rows features"]:
    """Scale rows to length 1, in float32 on the CPU; a row of zeros stays."""
    return nn.functional.normalize(features.float(), dim=1).cpu()


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while an encoder is read into words for the user."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise EvaluationError(
            f"The encoder in {folder} cannot be read: {error}.",
            "Fetch it again, or name another one.",
        ) from error


@contextmanager
def steady(device: torch.device) -> Iterator[None]:
    """Compute in float32 without gradients, whatever precision the caller draws in."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bar off the screen: library code never prints."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
