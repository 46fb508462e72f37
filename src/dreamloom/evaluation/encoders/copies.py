"""SSCD: whether a picture is a copy of another one."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamloom.evaluation.encoders.computing import (
    WEIGHTS,
    NetworkEncoder,
    make_ready,
    require_all,
)
from dreamloom.evaluation.encoders.preprocessing import COPIES_PREPROCESSING

_STAGES = (3, 4, 6, 3)  # ResNet-50
_EXPANSION = 4
_POWER = 3.0
_SMALLEST = 1e-6
_PREFIX = "backbone."


class CopyEncoder(NetworkEncoder):
    """SSCD: pictures that are copies of each other lie close, also after cropping or recolouring.

    Its folder holds model.safetensors: the weights of the authors' "torchvision" file under their
    own names.

    Source: Pizzi et al. 2022, "A Self-Supervised Descriptor for Image Copy Detection". The
    network is a ResNet-50 (He et al. 2016, strides in the 3x3 layers) that ends in a generalised
    mean instead of a mean.
    """

    recipe = COPIES_PREPROCESSING

    def load(self, folder: Path) -> None:
        """Read the network."""
        weights = {
            name.removeprefix(_PREFIX): given for name, given in load_file(folder / WEIGHTS).items()
        }
        stem = weights["conv1.weight"].shape[0]
        with torch.random.fork_rng(devices=[]):  # its first weights are thrown away
            network = CopyNetwork(stem, weights["fc.weight"].shape[0])
        counters = "num_batches_tracked"
        needed = [one for one in network.state_dict() if not one.endswith(counters)]
        require_all([one for one in needed if one not in weights])
        network.load_state_dict({one: weights[one] for one in needed}, strict=False)
        self._network = make_ready(network, self.device)

    def look(self, pixels: Tensor) -> Tensor:
        """Turn pixels into the descriptor."""
        features: Tensor = self._network(pixels)
        return features


class CopyNetwork(nn.Module):
    """A ResNet-50 with a generalised mean at its end; its parts bear torchvision's names.

    Args:
        stem: Channels after the first layer, 64 in the published one.
        features: Width of the result.
    """

    def __init__(self, stem: int = 64, features: int = 512) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        width = stem
        for number, blocks in enumerate(_STAGES):
            middle = stem * 2**number
            stage = [_Block(width, middle, stride=1 if number == 0 else 2)]
            width = middle * _EXPANSION
            stage += [_Block(width, middle) for _ in range(blocks - 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(width, features)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n features"]:
        """Turn normalised pixels into features."""
        found = torch.relu(self.bn1(self.conv1(pixels)))
        found = nn.functional.max_pool2d(found, 3, stride=2, padding=1)
        for number in range(len(_STAGES)):
            found = self.get_submodule(f"layer{number + 1}")(found)
        result: Tensor = self.fc(generalised_mean(found))
        return result


class _Block(nn.Module):
    def __init__(self, width: int, middle: int, stride: int = 1) -> None:
        super().__init__()
        wide = middle * _EXPANSION
        self.conv1 = nn.Conv2d(width, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.downsample: nn.Module | None = None
        if stride > 1 or width != wide:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, wide, 1, stride=stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, given: Tensor) -> Tensor:
        found = torch.relu(self.bn1(self.conv1(given)))
        found = torch.relu(self.bn2(self.conv2(found)))
        found = self.bn3(self.conv3(found))
        return torch.relu(found + (self.downsample(given) if self.downsample else given))


def generalised_mean(
    features: Float[Tensor, "n channels h w"], power: float = _POWER
) -> Float[Tensor, "n channels"]:
    """Take the power mean of each channel over the picture; power 1 is the mean.

    Source: Radenović et al. 2018, "Fine-tuning CNN Image Retrieval with No Human Annotation",
    equation 3. What lies below 1e-6 counts as that, so that a root exists.
    """
    return features.clamp(min=_SMALLEST).pow(power).mean(dim=(2, 3)).pow(1 / power)
