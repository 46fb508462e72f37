"""How alike two pictures are."""

import math

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image


def psnr_db(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of one size; infinite if they are equal."""
    return psnr_of_arrays(*(np.asarray(image.convert("RGB")) for image in (first, second)), 255.0)


def psnr_of_arrays(first: ArrayLike, second: ArrayLike, peak: float = 1.0) -> float:
    """The same of numbers from 0 to ``peak``."""
    error = float(np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)
