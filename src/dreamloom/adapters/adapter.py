"""An adapter: for each layer that it changes, two thin factors whose product is the change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """The update of one layer, ΔW = up · down, with every scale already folded in.

    For a linear layer ``down`` is (rank, inputs) and ``up`` (outputs, rank). For a convolution
    ``down`` is (rank, inputs, kernel height, kernel width) and ``up`` (outputs, rank, 1, 1).

    Source:
        Hu et al., LoRA (arXiv:2106.09685), Eq. 3; convolutions as in the LyCORIS paper
        (arXiv:2309.14859), section 3.1.
    """

    down: Float[Tensor, "rank ..."]
    up: Float[Tensor, "outputs rank *one_by_one"]

    def __post_init__(self) -> None:
        if self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"the factors' ranks differ: up has {self.up.shape[1]}, down {self.down.shape[0]}"
            )

    @property
    def rank(self) -> int:
        """The number of directions that the update may use."""
        return self.down.shape[0]

    def update(self) -> Float[Tensor, "outputs ..."]:
        """Multiply out the change of the layer's weight, in the weight's own shape."""
        flat = self.up.flatten(1).double() @ self.down.flatten(1).double()
        return flat.view(self.up.shape[0], *self.down.shape[1:]).float()


@dataclass(frozen=True)
class Adapter:
    """A LoRA: the updates by layer, and the story of how they were made.

    Args:
        layers: Updates by the layer's name in the model, such as
            ``unet.mid_block.attentions.0.proj_in``.
        metadata: Text by name; written into the file's header.
    """

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer's update."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold."""
        return sum(layer.down.numel() + layer.up.numel() for layer in self.layers.values())

    def with_metadata(self, **entries: str) -> Adapter:
        """The same updates with entries added to, or replaced in, the story."""
        return Adapter(self.layers, {**self.metadata, **entries})

    def norm(self) -> float:
        """The Frobenius norm over all updates, from the small Gram matrices: no dense matrix."""
        total = 0.0
        for layer in self.layers.values():
            up, down = layer.up.flatten(1).double(), layer.down.flatten(1).double()
            total += float(torch.sum((up.T @ up) * (down @ down.T)))
        # Rounding may leave a zero update just below 0.
        return math.sqrt(max(total, 0.0))
