"""How encoders compute: all their weights, in float32, without gradients, and silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dreamloom.core.run_folder import file_sha256
from dreamloom.evaluation.encoders.base import PixelJudge
from dreamloom.evaluation.encoders.preprocessing import Preprocessing
from dreamloom.evaluation.encoders.store import explaining

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


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a model weights that bear its names, all of them."""
    require_all([name for name in model.state_dict() if name not in weights])
    model.load_state_dict(weights)
    return model


def make_ready(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Put a model where it computes, for looking only."""
    return model.to(device).float().eval().requires_grad_(False)


def unit_rows(features: Tensor) -> Float[Tensor, "rows features"]:
    """Scale rows to length 1, in float32 on the CPU; a row of zeros stays."""
    return nn.functional.normalize(features.float(), dim=1).cpu()


def rename_block(
    weights: Mapping[str, Tensor],
    theirs: str,
    ours: str,
    parts: Mapping[str, str],
    together: str,
    attention: str,
) -> dict[str, Tensor]:
    """Give one layer of a transformer its names in transformers.

    Args:
        weights: Under their authors' names.
        theirs: How the authors' names of the layer begin.
        ours: How transformers' names of it begin.
        parts: Each part's name there and here, up to ``weight`` or ``bias``.
        together: Query, key and value in one; they come apart.
        attention: Where they go.
    """
    renamed = {}
    for kind in ("weight", "bias"):
        for name, new in parts.items():
            renamed[f"{ours}{new}{kind}"] = weights[f"{theirs}{name}{kind}"]
        for letter, given in zip("qkv", weights[f"{theirs}{together}{kind}"].chunk(3), strict=True):
            renamed[f"{ours}{attention}{letter}_proj.{kind}"] = given
    return renamed


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


class LoadedNetwork:
    """A network whose weights lie in a folder, read once, to look at pictures.

    Args:
        folder: Holds its files; each kind says which.
        name: How the key names it; None takes the folder's name and the hash of its weights.
        preprocessing: How pictures become pixels; None takes the published recipe.
        device: Where to compute; always in float32.

    Raises:
        EvaluationError: If a file is missing, damaged, or of another kind of model.
    """

    recipe: Preprocessing | None = None
    """The published one; None where the folder's own ``preprocessor_config.json`` tells it."""

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        with explaining(folder):
            self.preprocessing = preprocessing or self.recipe or Preprocessing.read(folder)
            self.load(folder)
        self.key = f"{name or name_by_weights(folder)}/{self.preprocessing.key}"

    def load(self, folder: Path) -> None:
        """Read the network."""
        raise NotImplementedError


class NetworkEncoder(LoadedNetwork):
    """A network that turns each picture into a vector; see `LoadedNetwork`."""

    may_miss = False

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        return self.embed_pixels(self.preprocessing(images))

    def embed_pixels(
        self, normalised: Float[Tensor, "images 3 side side"]
    ) -> Float[Tensor, "images features"]:
        """Turn what `preprocessing` makes of pictures into unit vectors.

        Nothing is checked here, so that the audit can show what wrongly prepared pixels do.
        Everybody else calls `embed`.
        """
        pixels = normalised.to(self.device)
        with steady(self.device):
            return unit_rows(self.look(pixels))

    def look(self, pixels: Tensor) -> Tensor:
        """Turn pixels into features of any length."""
        raise NotImplementedError


class PixelEncoder:
    """An encoder that takes pixels in [0, 1], as picturebook's judges do.

    Args:
        judge: Has a ``key``, and ``embed`` from pixels to unit vectors.
        preprocessing: How pictures become pixels.
    """

    may_miss = False

    def __init__(self, judge: PixelJudge, preprocessing: Preprocessing) -> None:
        self._judge, self._preprocessing = judge, preprocessing
        self.key = f"{judge.key}/{preprocessing.key}"

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        with steady(torch.device("cpu")):
            return unit_rows(self._judge.embed(self._preprocessing(images)))
