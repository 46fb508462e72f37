"""Pictures as tensors: what models and encoders are fed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def to_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "images 3 height width"]:
    """Stack RGB pictures of one size as numbers in [0, 1].

    Raises:
        ValueError: If there is none, a picture is not RGB, or the sizes differ.
    """
    if not images:
        raise ValueError("there must be at least one picture")
    modes, sizes = {image.mode for image in images}, {image.size for image in images}
    if modes != {"RGB"} or len(sizes) != 1:
        raise ValueError(f"pictures must be RGB and of one size, got {modes} and {sizes}")
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255.0
