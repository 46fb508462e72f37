"""SLERP of two LoRAs and the Karcher mean of any number: averages along the arc."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.coefficients import SCOPE, STRENGTH, cosines, mix_updates
from dreamloom.merging.method import MergeMethod

# Nearer to 0 or 180 degrees than this (in 1 - |cos θ|) the arc is taken for the straight line. Next
# to 0 both are the same to ten digits; opposite updates have no arc, only rounding errors.
_STRAIGHT = 1e-10
_ROUNDS = 200
_STILL = 1e-13
# Two directions with a smaller sine are one, or opposite: between opposite ones there is no way
# that is shorter than the others.
_NO_WAY = 1e-7


def choose_on_arc(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers of a point on the arc between two updates: sin((1-t)θ)/sin θ, sin(tθ)/sin θ.

    An arc keeps the length that a straight line loses: halfway between two updates of one length at
    right angles each counts 0.71, not 0.5. Only the ratio of the weights matters; how strong the
    result is says ``strength``. A negative weight goes towards the opposite update.

    Args:
        products: Inner products of one update or two.
        sizes: How much each counts; t = size₂ / (size₁ + size₂).

    Source:
        Shoemake, Animating Rotation with Quaternion Curves (SIGGRAPH 1985).
        With weights and the angle between whole matrices it is what mergekit calls NuSLERP.
    """
    if len(sizes) == 1:
        return torch.ones_like(sizes)
    shares = sizes / sizes.sum()
    cosine = cosines(products)[0, 1]
    if 1 - cosine.abs() < _STRAIGHT:
        return shares
    angle = torch.acos(cosine)
    return torch.sin(shares * angle) / torch.sin(angle)


def choose_mean_direction(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers of the Karcher mean: the direction that is nearest to all, by angles squared.

    The mean direction u is a mixture of the unit updates uᵢ. It moves by the shared average of the
    ways to them, u ← exp_u(Σ aᵢ log_u uᵢ), until it stays. It is unique if all lie within less
    than 90 degrees of one direction. Its length is the average length, Σ aᵢ ‖ΔWᵢ‖. With
    two updates of one length it is SLERP.

    Args:
        products: Inner products of the updates.
        sizes: How much each counts.

    Source:
        Karcher, Riemannian center of mass and mollifier smoothing (Comm. Pure Appl. Math. 30,
        1977); the steps on a sphere: Buss and Fillmore, Spherical averages (ACM TOG 20, 2001),
        algorithm A1.
    """
    shares = sizes / sizes.sum()
    lengths = products.diagonal().sqrt()
    table = cosines(products)
    mean = _to_unit(shares, table)
    for _ in range(_ROUNDS):
        towards = (table @ mean).clamp(-1, 1)
        sines = (1 - towards.square()).sqrt()
        away = sines > _NO_WAY
        pulls = torch.where(away, shares * torch.acos(towards) / sines.where(away, sines + 1), 0.0)
        step = pulls - (pulls * towards).sum() * mean
        distance = (step @ table @ step).clamp(min=0).sqrt()
        if distance < _STILL:
            break
        mean = _to_unit(torch.cos(distance) * mean + torch.sin(distance) / distance * step, table)
    return mean * (shares * lengths).sum() / lengths


def _to_unit(mixture: Float[Tensor, " k"], table: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
    length = (mixture @ table @ mixture).clamp(min=0).sqrt()
    if length < _NO_WAY:
        # They cancel each other out, so every direction is as good a beginning.
        mixture = torch.zeros_like(mixture)
        mixture[0] = length = torch.ones((), dtype=table.dtype)
    return mixture / length


METHODS = (
    MergeMethod(
        name="slerp",
        summary="A point on the arc between two updates, where a straight line would weaken both.",
        formula="ΔW = sin((1-t)θ)/sin θ ΔW₁ + sin(tθ)/sin θ ΔW₂, t = |w₂|/(|w₁|+|w₂|)",
        source="Shoemake, Animating Rotation with Quaternion Curves (SIGGRAPH 1985)",
        merge=partial(mix_updates, choose=choose_on_arc),
        options=(SCOPE, STRENGTH),
        whole=True,
        least=2,
        most=2,
    ),
    MergeMethod(
        name="karcher",
        summary="The mean of the updates' directions by angle, as long as they are on average.",
        formula="ΔW = (Σ aᵢ ‖ΔWᵢ‖) u, u = argmin Σ aᵢ angle(u, ΔWᵢ)², aᵢ = |wᵢ|/Σ|wⱼ|",
        source="Karcher (Comm. Pure Appl. Math. 30, 1977); Buss and Fillmore (ACM TOG 20, 2001)",
        merge=partial(mix_updates, choose=choose_mean_direction),
        options=(SCOPE, STRENGTH),
        whole=True,
    ),
)
