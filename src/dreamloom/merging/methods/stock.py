"""Model Stock: an average that trusts the LoRAs as far as they agree."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.coefficients import SCOPE, STRENGTH, cosines, mix_updates
from dreamloom.merging.method import MergeMethod


def choose_by_agreement(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers of model stock: t · average, t = K cos θ / (1 + (K-1) cos θ), from 0 to 1.

    cos θ is the mean cosine over all pairs. One update alone agrees with itself. It is meant for
    trainings of the same thing, such as three seeds of one subject: what they share stays, what
    each made up fades towards the base model, the zero of updates. Of unrelated adapters, which
    stand at right angles, almost nothing is left.

    Where updates point apart, cos θ counts as 0, and the base model is what is left. The formula
    is derived for updates a + eᵢ with errors eᵢ of one length σ, at right angles to a and to each
    other, so that cos θ = ‖a‖² / (‖a‖² + σ²) is never negative. Below 0 it would turn the average
    around, up to any length: t = -2 for two at cos θ = -1/2, and -∞ for K at -1 / (K-1).

    Args:
        products: Inner products of the updates.
        sizes: How much each counts in the average.

    Source:
        Jang et al., Model Stock (arXiv:2403.19522), the ratio for N models, between any two of
        which the angle is the same; the mean over pairs stands for it, as in mergekit. That cos θ
        is not below 0 is our own; mergekit takes the formula there, too.
    """
    count = len(sizes)
    shares = sizes / sizes.sum()
    if count == 1:
        return shares
    pairs = torch.triu_indices(count, count, offset=1)
    agreement = cosines(products)[pairs[0], pairs[1]].mean().clamp(min=0)
    return shares * count * agreement / (1 + (count - 1) * agreement)


METHODS = (
    MergeMethod(
        name="stock",
        summary="The average of trainings of one thing, shortened where they disagree.",
        formula="ΔW = t Σ aᵢ ΔWᵢ, t = K c/(1 + (K-1) c), c = max(0, cos θ), aᵢ = wᵢ/Σ|wⱼ|",
        source="Jang et al., Model Stock (arXiv:2403.19522)",
        merge=partial(mix_updates, choose=choose_by_agreement),
        options=(SCOPE, STRENGTH),
        whole=True,
    ),
)
