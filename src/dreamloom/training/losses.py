"""Losses: errors per image, weights of timesteps (min-SNR), DreamBooth's two terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.core.device import send
from dreamloom.models.base import Prediction, Weighting

LossKind = Literal["l2", "l1", "huber", "smooth_l1"]
"""How one number's error counts; see `image_errors`."""

HuberSchedule = Literal["constant", "exponential", "snr"]
"""How Huber's delta follows the noise; see `huber_deltas`."""

# SDXL's schedule does not go below; where others do, the noisy input is all but the noise, there is
# nothing to learn, and 1 / √SNR has no bound.
_LEAST_SNR = 1e-3


@dataclass(frozen=True)
class LossParts:
    """The loss and what it is made of; ``prior`` is None where there was no class image."""

    total: Float[Tensor, ""]
    subject: Float[Tensor, ""]
    prior: Float[Tensor, ""] | None

    @property
    def terms(self) -> list[Tensor]:
        """The total, the subject's and, where there is one, the prior's."""
        return [self.total, self.subject, *([] if self.prior is None else [self.prior])]


# ------------------------------------------------------------------ errors


def image_errors(
    prediction: Float[Tensor, "images channels height width"],
    target: Float[Tensor, "images channels height width"],
    kind: LossKind = "l2",
    *,
    deltas: Float[Tensor, " images"] | None = None,
    place_weights: Float[Tensor, "images height width"] | None = None,
) -> Float[Tensor, " images"]:
    """Measure how far each image's prediction is from its target, in float32.

    With e the error of one number and d its image's delta, each number counts

    - ``l2``: e²,
    - ``l1``: |e|,
    - ``huber``: 2d (√(e² + d²) − d), which is e² where |e| is well below d and 2d|e| well above,
    - ``smooth_l1``: √(e² + d²) − d, which is |e| where |e| is well above d.

    Args:
        prediction: What the model predicted, in latents.
        target: What it should have predicted.
        kind: Which error counts.
        deltas: For ``huber`` and ``smooth_l1``: where each image's errors turn from squares to
            absolute values, above 0.
        place_weights: How much each place counts, 0 or more; see `subject_weights`.

    Returns:
        The mean over the numbers of each image. With weights w it is Σ w e / Σ w over the places,
        so neither their scale nor the area of a mask changes the error's scale; an image whose
        weights are all 0 counts as if they were all 1.

    Raises:
        ValueError: If ``deltas`` is missing where it is needed.

    Source:
        The pseudo-Huber loss of Khrapov et al. (arXiv:2403.16728), for each number on its own and
        times 2, so that it tends to ``l2`` as d grows; divided by 2d it is ``smooth_l1``, which
        tends to ``l1`` as d falls to 0.
    """
    error = prediction.float() - target.float()
    if kind == "l2":
        counted = error.square()
    elif kind == "l1":
        counted = error.abs()
    else:
        if deltas is None:
            raise ValueError(f"the loss {kind} needs a delta for each image")
        delta = deltas.float()[:, None, None, None]
        square = error.square()
        # √(e² + d²) − d without the difference of two nearly equal numbers.
        counted = square / ((square + delta.square()).sqrt() + delta)
        if kind == "huber":
            counted = 2 * delta * counted
    if place_weights is None:
        return counted.mean(dim=(1, 2, 3))
    weights = place_weights.float()
    sums = weights.sum(dim=(1, 2))
    weights = torch.where((sums > 0)[:, None, None], weights, torch.ones_like(weights))
    return (counted.mean(dim=1) * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))


def subject_weights(
    masks: Float[Tensor, "images height width"], background: float
) -> Float[Tensor, "images height width"]:
    """Let the places of the subject count 1 and the others ``background``.

    Args:
        masks: In the latents' size: 1 on the subject, 0 beside it, between them at its edge; all 1
            for an image without a mask.
        background: What a place outside the mask counts, from 0 to 1; 1 undoes the mask.

    Raises:
        ValueError: If ``background`` is not between 0 and 1.
    """
    if not 0 <= background <= 1:
        raise ValueError(f"background must be from 0 to 1, got {background}")
    return background + (1 - background) * masks


def huber_deltas(
    schedule: HuberSchedule,
    delta: float,
    noise_shares: Float[Tensor, " images"],
    snr: Float[Tensor, " images"],
) -> Float[Tensor, " images"]:
    """Choose where each image's errors turn from squares to absolute values.

    The two schedules fall from 1 for a clean image to ``delta`` for pure noise, so that details
    are learned by squares while an odd photo cannot pull much where the noise hides it.

    Args:
        schedule: ``constant``: ``delta`` itself. ``exponential``: delta^(t / T). ``snr``:
            (1 − delta) / (1 + σ)² + delta, with σ = 1 / √SNR.
        delta: Above 0; at most 1 for the schedules.
        noise_shares: Each timestep as a share t / T of all, from 0 (clean) to 1.
        snr: Signal-to-noise ratio of each image's timestep, 0 or more.

    Raises:
        ValueError: If ``delta`` is out of range.

    Source:
        ``exponential``: Khrapov et al. (arXiv:2403.16728), with the value at the last timestep as
        the parameter. ``snr``: not in the paper; as in kohya-ss/sd-scripts, pull request 1228.
    """
    if delta <= 0 or (schedule != "constant" and delta > 1):
        limit = "above 0" if schedule == "constant" else f"above 0 and up to 1 for {schedule}"
        raise ValueError(f"delta must be {limit}, got {delta}")
    if schedule == "constant":
        return torch.full_like(snr, delta)
    if schedule == "exponential":
        return torch.full_like(snr, delta) ** noise_shares
    root = snr.sqrt()
    return (1 - delta) * (root / (1 + root)).square() + delta


# ------------------------------------------------------------------ weights of timesteps


def timestep_weights(
    weighting: Weighting,
    snr: Float[Tensor, " images"],
    prediction: Prediction = "noise",
    *,
    gamma: float = 5.0,
    p2_k: float = 1.0,
    p2_gamma: float = 1.0,
) -> Float[Tensor, " images"]:
    """Weigh timesteps against each other.

    Each scheme is one weight w(SNR) of the squared error of the noise:

    - ``min_snr``: min(SNR, gamma) / SNR,
    - ``soft_min_snr``: gamma / (SNR + gamma), the same without the corner,
    - ``debiased``: 1 / √SNR (as if SNR were 1e-3 where it is less, so that 0 is no division by 0),
    - ``p2``: 1 / (k + SNR)^gamma₂.

    A model that predicts something else has another error for one and the same guess: with x̂ − x
    the error of the picture that the guess amounts to, that of the noise is √SNR times it, that
    of the velocity √(SNR + 1) times, that of a flow (noise minus picture, on straight lines)
    1 + √SNR times. So w is multiplied by SNR / (SNR + 1) for velocity, SNR / (1 + √SNR)² for flow
    and SNR for the picture, and a scheme means the same for all of them.

    Args:
        weighting: Which scheme; ``none`` weighs the model's own error alike everywhere.
        snr: Signal-to-noise ratio of each image's timestep, 0 or more and finite. At 0 all is
            finite; for anything but noise, every scheme then weighs 0, because no guess of the
            picture can be right there.
        prediction: What the model predicts.
        gamma: Where ``min_snr`` and ``soft_min_snr`` bend; above 0. The papers take 5 and 4.
        p2_k: ``p2``'s k, above 0.
        p2_gamma: ``p2``'s exponent, 0 or more; the paper takes 0.5 and 1.

    Raises:
        ValueError: If ``gamma``, ``p2_k`` or ``p2_gamma`` is out of range.

    Source:
        Hang et al. (arXiv:2303.09556), section 3.4; soft: Crowson et al. (arXiv:2401.11605);
        debiased: Yu et al. (arXiv:2310.08442); P2: Choi et al. (arXiv:2204.00227). Only the first
        tells velocity; there the others follow by the conversion above.

    Example:
        >>> import torch
        >>> timestep_weights("min_snr", torch.tensor([0.5, 10.0]), gamma=5.0)
        tensor([1.0000, 0.5000])
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    if p2_k <= 0 or p2_gamma < 0:
        raise ValueError(f"p2_k must be above 0 and p2_gamma 0 or more, got {p2_k} and {p2_gamma}")
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting == "min_snr":
        weights = (gamma / snr).clamp(max=1)
    elif weighting == "soft_min_snr":
        weights = gamma / (snr + gamma)
    elif weighting == "debiased":
        weights = snr.clamp(min=_LEAST_SNR).rsqrt()
    else:
        weights = (p2_k + snr) ** -p2_gamma
    if prediction == "velocity":
        return weights * snr / (snr + 1)
    if prediction == "flow":
        return weights * snr / (1 + snr.sqrt()).square()
    return weights * snr if prediction == "picture" else weights


# ------------------------------------------------------------------ the two terms


def combine_errors(
    errors: Float[Tensor, " images"],
    is_prior: Bool[Tensor, " images"],
    *,
    prior_weight: float = 1.0,
    weights: Float[Tensor, " images"] | None = None,
    photos_in_all: int | None = None,
    priors_in_all: int | None = None,
) -> LossParts:
    """Weigh how well the model redraws the subject against how well it remembers the class.

    ``is_prior`` says which image is which, so neither their order nor their proportion matters:
    each term is a mean over its own images.

    Where one update is spread over several processes or over several passes of one, each calls
    this with its own images and with the numbers of all: it then gets its share of the two means.
    The shares add up to the loss of the whole, and so do their gradients. (What averages
    gradients over processes, as torch's DistributedDataParallel does, must be given the share
    times their number.)

    Args:
        errors: The error of each image; see `image_errors`.
        is_prior: True for class images, False for photos of the subject; best on the CPU, where
            they are counted.
        prior_weight: Weight of the class term (the paper's lambda), 0 or more.
        weights: One factor per image for both terms; None weighs all alike.
        photos_in_all: Photos in the whole update; None means those given here.
        priors_in_all: Class images in the whole update; None means those given here.

    Returns:
        The total and its two terms, in float32. A share without photos has a subject term of 0.

    Raises:
        ValueError: If ``prior_weight`` is negative, there is no photo in the whole update, or the
            whole holds fewer images than given here.

    Source:
        Ruiz et al., DreamBooth (arXiv:2208.12242), section 3.3; here on an adapter, and with
        weights of the timesteps of one's choice.

    Example:
        >>> import torch
        >>> loss = combine_errors(
        ...     torch.tensor([1.0, 4.0]), torch.tensor([False, True]), prior_weight=0.5
        ... )
        >>> loss.subject.item(), loss.prior.item(), loss.total.item()
        (1.0, 4.0, 3.0)
    """
    if prior_weight < 0:
        raise ValueError(f"prior_weight must be 0 or more, got {prior_weight}")
    priors_here = int(is_prior.sum())
    photos_here = len(is_prior) - priors_here
    photos = photos_here if photos_in_all is None else photos_in_all
    priors = priors_here if priors_in_all is None else priors_in_all
    if photos < photos_here or priors < priors_here:
        raise ValueError(
            f"the whole update has {photos} photos and {priors} class images, "
            f"but {photos_here} and {priors_here} are given here"
        )
    if not photos:
        raise ValueError("the batch holds class images only: there is no subject to learn")
    weighed = errors.float() if weights is None else errors.float() * weights
    # Whoever picks rows by a mask on a GPU waits for their number; a choice of values does not.
    from_prior, nothing = send(is_prior, errors.device), torch.zeros_like(weighed)
    subject = torch.where(from_prior, nothing, weighed).sum() / photos
    if not priors:
        return LossParts(total=subject, subject=subject, prior=None)
    prior = torch.where(from_prior, weighed, nothing).sum() / priors
    return LossParts(total=subject + prior_weight * prior, subject=subject, prior=prior)
