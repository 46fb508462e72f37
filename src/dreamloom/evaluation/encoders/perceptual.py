"""LPIPS: how different two pictures look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamloom.evaluation.encoders.computing import (
    WEIGHTS,
    LoadedNetwork,
    require_all,
    steady,
)
from dreamloom.evaluation.encoders.preprocessing import Preprocessing

# LPIPS takes pixels in [-1, 1] and then normalises them by these numbers; both steps in one.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LPIPS_PREPROCESSING = Preprocessing(
    256,
    256,
    ((1 + _SHIFT[0]) / 2, (1 + _SHIFT[1]) / 2, (1 + _SHIFT[2]) / 2),
    (_SCALE[0] / 2, _SCALE[1] / 2, _SCALE[2] / 2),
)
"""LPIPS compares pictures of one size only: the centred square, at 256 px."""

# AlexNet's convolutions: their name in the authors' file, stride, padding, and whether the
# pictures are halved before.
_LAYERS = (
    ("net.slice1.0", 4, 2, False),
    ("net.slice2.3", 1, 2, True),
    ("net.slice3.6", 1, 1, True),
    ("net.slice4.8", 1, 1, False),
    ("net.slice5.10", 1, 1, False),
)
_TINY = 1e-10


class LpipsDistance(LoadedNetwork):
    """LPIPS with AlexNet, version 0.1.

    Its folder holds model.safetensors: the network and the weights of its channels under the
    names of the authors' package.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", equation 1.
    """

    recipe = LPIPS_PREPROCESSING
    batch = 16
    """Pictures looked at together."""

    def load(self, folder: Path) -> None:
        """Read the network."""
        weights = load_file(folder / WEIGHTS)
        needed = [f"{layer}.{kind}" for layer, *_ in _LAYERS for kind in ("weight", "bias")]
        needed += [_channels(number) for number in range(len(_LAYERS))]
        require_all([one for one in needed if one not in weights])
        self._weights = {one: weights[one].float().to(self.device) for one in needed}

    def distances(self, images: Sequence[Image.Image]) -> Float[Tensor, "images images"]:
        """Compare each picture with each: 0 for the same picture; about 0.7 for unlike ones."""
        embeddings: list[list[Tensor]] = []
        for start in range(0, len(images), self.batch):
            pixels = self.preprocessing(images[start : start + self.batch]).to(self.device)
            with steady(self.device):
                layers = read_layers(pixels, self._weights)
            embeddings += [list(one) for one in zip(*layers, strict=True)]
        found = torch.zeros(len(images), len(images))
        for row, left in enumerate(embeddings):
            for column, right in enumerate(embeddings[:row]):
                found[row, column] = found[column, row] = self._compare(left, right)
        return found

    def _compare(self, left: list[Tensor], right: list[Tensor]) -> float:
        parts = [
            (self._weights[_channels(number)][0] * (ours - theirs).square()).sum(dim=0).mean()
            for number, (ours, theirs) in enumerate(zip(left, right, strict=True))
        ]
        return float(torch.stack(parts).sum())


def _channels(number: int) -> str:
    return f"lin{number}.model.1.weight"


def read_layers(
    pixels: Float[Tensor, "n 3 h w"], weights: Mapping[str, Tensor]
) -> list[Float[Tensor, "n channels height width"]]:
    """Give the features after each of AlexNet's layers, each place scaled to length 1."""
    found, layers = pixels, []
    for name, stride, padding, is_halved in _LAYERS:
        if is_halved:
            found = nn.functional.max_pool2d(found, 3, stride=2)
        found = nn.functional.conv2d(
            found, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding
        ).relu()
        layers.append(found / (found.norm(dim=1, keepdim=True) + _TINY))
    return layers
