"""What the scores are: pure functions over features of pictures, photos and prompts."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def cosines(
    left: Float[Tensor, "left features"], right: Float[Tensor, "right features"]
) -> Float[Tensor, "left right"]:
    """Compare each row with each: the cosine of the angle between them, in double precision.

    Raises:
        ValueError: If a row is all zeros (it has no direction) or not finite.

    Example:
        >>> cosines(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        tensor([[0., 1.]], dtype=torch.float64)
    """
    return _unit(left) @ _unit(right).T


def subject_fidelity(
    *, generated: Float[Tensor, "images features"], photos: Float[Tensor, "photos features"]
) -> Float[Tensor, "images photos"]:
    """Score how much each picture looks like the subject in each photo.

    The cosine similarity of features; the score of a picture is the mean of its row. It rewards
    copies: read it beside variety, which a copy cannot raise, and beside the ceiling.

    Returns:
        One value per picture and photo, in [-1, 1]; 1 means the same direction. Compare it only
        with a floor and a ceiling from the same encoder, never with another encoder's.

    Raises:
        ValueError: If there is no picture or no photo, or a row is all zeros or not finite.

    Source:
        Ruiz et al., DreamBooth (arXiv:2208.12242), section 4.2, for DINO and CLIP-I.

    Example:
        >>> photos = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> subject_fidelity(generated=torch.tensor([[2.0, 0.0]]), photos=photos).mean(dim=1)
        tensor([0.5000], dtype=torch.float64)
    """
    if len(generated) == 0 or len(photos) == 0:
        raise ValueError(
            f"there must be pictures and photos, got {len(generated)} and {len(photos)}"
        )
    return cosines(generated, photos)


def photo_ceiling(photos: Float[Tensor, "photos features"]) -> Float[Tensor, " photos"]:
    """Score each photo against the others: as like the subject as the subject itself.

    A photo is never compared with itself; the self-pairs would lift the ceiling by (1 - c)/n.

    Returns:
        One value per photo, in [-1, 1]; their mean is the ceiling of `subject_fidelity`. Several
        photos of one moment make it too high.

    Raises:
        ValueError: If there are fewer than two photos, or a row is all zeros or not finite.

    Example:
        >>> photo_ceiling(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if len(photos) < 2:
        raise ValueError(f"a ceiling needs two photos or more, got {len(photos)}")
    similar = cosines(photos, photos)
    return (similar.sum(dim=1) - similar.diagonal()) / (len(photos) - 1)


def prompt_fidelity(
    *, generated: Float[Tensor, "images features"], prompts: Float[Tensor, "images features"]
) -> Float[Tensor, " images"]:
    """Score how much each picture shows what its own prompt says.

    The cosine similarity of a picture's CLIP features with its prompt's: not times 100, not
    cut off at 0.

    Returns:
        One value per picture, in [-1, 1]. Real encoders stay between about 0.15 (unrelated) and
        0.35 (a good match), so differences of 0.05 are large.

    Raises:
        ValueError: If there is no picture, or a row is all zeros or not finite.

    Source:
        Ruiz et al., DreamBooth (arXiv:2208.12242), section 4.2 (CLIP-T).

    Example:
        >>> prompt_fidelity(
        ...     generated=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        ...     prompts=torch.tensor([[5.0, 0.0], [0.0, 1.0]]),
        ... )
        tensor([1., 0.], dtype=torch.float64)
    """
    if len(generated) == 0:
        raise ValueError("there must be at least one picture")
    return (_unit(generated) * _unit(prompts)).sum(dim=1)


def differences(features: Float[Tensor, "images features"]) -> Float[Tensor, "images images"]:
    """Give 1 - cosine for every pair of pictures, in [0, 2]; 0 is the same direction.

    Their mean over different pictures of one prompt is the variety: copies of a photo lower it;
    noise raises it, so that more is not always better.

    Example:
        >>> differences(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))[0, 1].item()
        1.0
    """
    return 1.0 - cosines(features, features)


def drift(
    *, before: Float[Tensor, "images features"], after: Float[Tensor, "images features"]
) -> Float[Tensor, " images"]:
    """Score how far an adapter has moved each picture of the same prompt and seed.

    Returns:
        (1 - cosine) / 2 per picture, in [0, 1]: 0 where nothing changed.

    Raises:
        ValueError: If a row is all zeros or not finite.

    Source:
        The drift of PEFT's benchmark ``method_comparison/image-gen``: adapter off against on.

    Example:
        >>> off, on = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> drift(before=off, after=on)
        tensor([0.5000], dtype=torch.float64)
    """
    return (1.0 - (_unit(before) * _unit(after)).sum(dim=1)) / 2


def _unit(features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
    features = features.double()
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite, but some are not a number or infinite")
    lengths = features.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise ValueError("a row of features is all zeros, so it has no direction")
    unit: Tensor = features / lengths
    return unit


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
