"""How a picture becomes an encoder's input: the published recipes, to the last pixel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dreamloom.data.tensors import to_tensor

# Real encoders normalise to about -2.1 to 2.7. A picture in 0 to 255 would come out at some 480.
_LARGEST_NORMALISED = 3.0


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an encoder's input.

    Shorter side to ``resize_px`` (PIL bicubic, which smooths as it shrinks), centre crop to
    ``crop_px``, to [0, 1], then (value - mean) / deviation for each channel. The longer side is
    rounded down, and an odd margin is one pixel wider on the right and at the bottom, as the
    published preprocessors have it.

    Raises:
        ValueError: If the numbers would send 8-bit pictures beyond what encoders are trained on.
    """

    resize_px: int
    crop_px: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not 1 <= self.crop_px <= self.resize_px:
            raise ValueError(
                f"a crop must be 1 px to the resized side, got {self.crop_px} of {self.resize_px}"
            )
        ends = [
            (end - mean) / deviation if deviation > 0 else float("inf")
            for mean, deviation in zip(self.mean, self.deviation, strict=True)
            for end in (0.0, 1.0)
        ]
        if max(map(abs, ends)) > _LARGEST_NORMALISED:
            raise ValueError(
                f"mean {self.mean} and deviation {self.deviation} send pictures beyond "
                f"{_LARGEST_NORMALISED:g}: they are not meant for pixels in [0, 1]"
            )
        if max(self.deviation) > 1:
            raise ValueError(
                f"a deviation of {max(self.deviation)} would leave hardly any contrast: "
                f"it is not meant for pixels in [0, 1]"
            )

    @property
    def key(self) -> str:
        """A short name of the whole recipe."""
        numbers = hashlib.sha256(repr((self.mean, self.deviation)).encode()).hexdigest()[:8]
        return f"bicubic-{self.resize_px}-crop-{self.crop_px}-norm-{numbers}"

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "images 3 side side"]:
        """Prepare pictures.

        Raises:
            ValueError: If there is none, or one is not RGB.
        """
        require_rgb(images)
        pixels = to_tensor([self._frame(image) for image in images])
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        normalised = (pixels - mean[:, None, None]) / deviation[:, None, None]
        largest = float(normalised.abs().max())
        assert largest <= _LARGEST_NORMALISED + 1e-4, f"pictures reach the encoder at {largest}"
        return normalised

    def _frame(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        width, height = (self.resize_px * side // shorter for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop_px) // 2, (height - self.crop_px) // 2
        return image.crop((left, top, left + self.crop_px, top + self.crop_px))

    @classmethod
    def read(cls, folder: Path) -> Preprocessing:
        """Read an encoder's own ``preprocessor_config.json``.

        Raises:
            ValueError: If a key is absent or does not describe a resize and a square crop.
        """
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        try:
            resize_px = _side(settings["size"])
            crop_px = _side(settings.get("crop_size", resize_px))
            (r, g, b), (dr, dg, db) = (
                [float(number) for number in settings[name]] for name in ("image_mean", "image_std")
            )
            return cls(resize_px, crop_px, (r, g, b), (dr, dg, db))
        except KeyError as error:
            raise ValueError(f"{folder}/preprocessor_config.json has no {error}") from None


def require_rgb(images: Sequence[Image.Image]) -> None:
    """Check that pictures are 8-bit RGB: no other scale can then reach an encoder.

    Raises:
        ValueError: If one is not.
    """
    unfit = {image.mode for image in images} - {"RGB"}
    if unfit:
        raise ValueError(f"pictures must be 8-bit RGB, got {', '.join(sorted(unfit))}")


def _side(size: int | Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    sides = set(size.values())
    if len(sides) != 1:
        raise ValueError(f"a size must be one number for both sides, got {dict(size)}")
    return sides.pop()


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)

CLIP_PREPROCESSING = Preprocessing(
    224,
    224,
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
DINO_PREPROCESSING = Preprocessing(256, 224, _IMAGENET_MEAN, _IMAGENET_DEVIATION)
DINOV2_PREPROCESSING = DINO_PREPROCESSING
"""The recipe of DINOv2's own ``preprocessor_config.json`` is DINO's."""
COPIES_PREPROCESSING = Preprocessing(288, 288, _IMAGENET_MEAN, _IMAGENET_DEVIATION)
"""SSCD's authors scale the shorter side to 288; the centred square makes pictures comparable."""
