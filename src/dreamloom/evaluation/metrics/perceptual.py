"""How far pictures of one prompt lie apart to the eye."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dreamloom.data.image_io import crop_centre, open_upright
from dreamloom.evaluation.encoders.base import PerceptualDistance


def measure_distances(
    distance: PerceptualDistance, paths: Sequence[Path], groups: Sequence[int]
) -> Float[np.ndarray, "n n"]:
    """Compare pictures within each group; pairs of different groups get 0 and are not read.

    Args:
        distance: Compares.
        paths: The pictures' files.
        groups: For each picture, the number of its group.
    """
    found = np.zeros((len(paths), len(paths)))
    for group in dict.fromkeys(groups):
        members = [place for place, one in enumerate(groups) if one == group]
        images = [crop_centre(open_upright(paths[place])) for place in members]
        found[np.ix_(members, members)] = distance.distances(images).double().numpy()
    return found
