"""Recognising the subject: thresholds, and whether it is nearer than anybody else."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

FEWEST_IMPOSTORS = 20
"""Pictures of others without which no threshold is set: their largest would be luck."""

FALSE_MATCHES = 0.01
"""Share of others that may pass for the subject at the threshold."""


def calibrate_threshold(impostors: Float[np.ndarray, " pictures"]) -> float:
    """Set the similarity from which a picture passes for the subject.

    Args:
        impostors: Similarities to the photos of pictures that show others: the base model's.

    Returns:
        The least similarity that at most one in a hundred impostors exceeds. With fewer than a
        hundred that is the largest of them, and the true share of false matches is uncertain.

    Raises:
        ValueError: If there are fewer than `FEWEST_IMPOSTORS`.

    Example:
        >>> calibrate_threshold(np.linspace(0, 1, 101))
        0.99
    """
    if len(impostors) < FEWEST_IMPOSTORS:
        raise ValueError(
            f"a threshold needs {FEWEST_IMPOSTORS} pictures of others, got {len(impostors)}"
        )
    return float(np.quantile(impostors, 1 - FALSE_MATCHES, method="higher"))


def is_nearest(
    similar: Float[Tensor, "images photos"], to_others: Float[Tensor, "images others"]
) -> Bool[Tensor, " images"]:
    """Say of each picture whether a photo of the subject is nearer than every picture of others.

    Args:
        similar: Similarities to the photos.
        to_others: Similarities to pictures of others; -inf for pairs that do not count.

    Raises:
        ValueError: If there are no photos or no others.

    Example:
        >>> is_nearest(torch.tensor([[0.2, 0.9], [0.1, 0.2]]), torch.tensor([[0.8], [0.8]]))
        tensor([ True, False])
    """
    if similar.shape[1] == 0 or to_others.shape[1] == 0:
        raise ValueError("there must be photos and pictures of others")
    return similar.amax(dim=1) > to_others.amax(dim=1)


def is_own_prompt_best(
    fits: Float[Tensor, "images prompts"], own: Tensor
) -> Bool[Tensor, " images"]:
    """Say of each picture whether no other prompt fits it better than its own.

    Args:
        fits: Similarity of each picture with each different prompt of the set.
        own: The column of each picture's own prompt.

    Raises:
        ValueError: If there are fewer than two prompts to choose from.

    Example:
        >>> is_own_prompt_best(torch.tensor([[0.3, 0.2], [0.3, 0.2]]), torch.tensor([0, 1]))
        tensor([ True, False])
    """
    if fits.shape[1] < 2:
        raise ValueError("there must be two different prompts or more to choose from")
    return fits.gather(1, own[:, None])[:, 0] >= fits.amax(dim=1)
