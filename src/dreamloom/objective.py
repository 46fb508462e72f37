"""What training minimises."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class LossParts:
    """The loss and what it is made of; ``prior`` is None where there was no class image."""

    total: Float[Tensor, ""]
    subject: Float[Tensor, ""]
    prior: Float[Tensor, ""] | None


def dreambooth_loss(
    prediction: Float[Tensor, "images channels height width"],
    target: Float[Tensor, "images channels height width"],
    is_prior: Bool[Tensor, " images"],
    *,
    prior_weight: float = 1.0,
    timestep_weights: Float[Tensor, " images"] | None = None,
) -> LossParts:
    """Weigh how well the model redraws the subject against how well it remembers the class.

    Photos and class images share one batch; ``is_prior`` says which is which, so neither their
    order nor their proportion matters: each term is a mean over its own images.

    Args:
        prediction: What the model predicted, in latents.
        target: What it should have predicted.
        is_prior: True for class images, False for photos of the subject.
        prior_weight: Weight of the class term (the paper's lambda), 0 or more.
        timestep_weights: One factor per image for both terms; None weighs all alike.

    Returns:
        The total and its two terms, in float32.

    Raises:
        ValueError: If ``prior_weight`` is negative or the batch holds no photo of the subject.

    Source:
        Ruiz et al., DreamBooth (arXiv:2208.12242), section 3.3; here on a LoRA, and without the
        paper's own weights of the timesteps.

    Example:
        >>> import torch
        >>> target = torch.zeros(2, 4, 8, 8)
        >>> guess = torch.stack([torch.full((4, 8, 8), 1.0), torch.full((4, 8, 8), 2.0)])
        >>> loss = dreambooth_loss(guess, target, torch.tensor([False, True]), prior_weight=0.5)
        >>> loss.subject.item(), loss.prior.item(), loss.total.item()
        (1.0, 4.0, 3.0)
    """
    if prior_weight < 0:
        raise ValueError(f"prior_weight must be 0 or more, got {prior_weight}")
    if bool(is_prior.all()):
        raise ValueError("the batch holds class images only: there is no subject to learn")
    per_image = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    if timestep_weights is not None:
        per_image = per_image * timestep_weights
    subject = per_image[~is_prior].mean()
    if not bool(is_prior.any()):
        return LossParts(total=subject, subject=subject, prior=None)
    prior = per_image[is_prior].mean()
    return LossParts(total=subject + prior_weight * prior, subject=subject, prior=prior)


def min_snr_weights(
    snr: Float[Tensor, " images"], gamma: float, *, velocity: bool = False
) -> Float[Tensor, " images"]:
    """Weigh timesteps so that easy, nearly clean ones do not crowd out the others.

    Args:
        snr: Signal-to-noise ratio of each image's timestep, above 0.
        gamma: Where the ratio is clipped; 5 in the paper.
        velocity: True if the model predicts velocity instead of noise.

    Returns:
        min(snr, gamma) / snr for noise; the denominator is snr + 1 for velocity.

    Raises:
        ValueError: If ``gamma`` is not above 0.

    Source:
        Hang et al. (arXiv:2303.09556), section 3.4.

    Example:
        >>> import torch
        >>> min_snr_weights(torch.tensor([0.5, 10.0]), gamma=5.0)
        tensor([1.0000, 0.5000])
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    return snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
