"""How alike two pictures are."""

import math

import numpy as np
from PIL import Image


def psnr_db(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of one size; infinite if they are equal."""
    pixels = [np.asarray(image.convert("RGB"), dtype=np.float64) for image in (first, second)]
    error = float(np.mean((pixels[0] - pixels[1]) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
