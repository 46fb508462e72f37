"""picturebook's own judges: encoders that lie inside DreamLoom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dreamloom.evaluation.encoders.base import PixelJudge
from dreamloom.evaluation.encoders.computing import steady, unit_rows
from dreamloom.evaluation.encoders.preprocessing import Preprocessing


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
