"""The mean of directions on a sphere, for any number of updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors
from dreamloom.merging.method import Context, LayerPart, MergeMethod
from dreamloom.merging.mixing import SCOPE, STRENGTH, cosines, mix_updates

_ROUNDS = 200
_STILL = 1e-13
# Two directions with a smaller sine are one, or opposite: between opposite ones there is no way
# that is shorter than the others.
_NO_WAY = 1e-7


def choose_mean_direction(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers of the Karcher mean: the direction that is nearest to all, by angles squared.

    The mean direction u is a mixture of the unit updates uᵢ. It moves by the shared average of the
    ways to them, u ← exp_u(Σ aᵢ log_u uᵢ), until it stays. It is unique if all lie within less
    than 90 degrees of one direction. Its length is the average length, Σ aᵢ ‖ΔWᵢ‖.

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


def average_on_sphere(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Average the directions of updates by angle, and their lengths by themselves.

    The weights say how much each counts in both averages, whatever they add up to. With two
    updates of one length it is `slerp`; it takes any number of them.

    Source:
        Karcher (1977), Buss and Fillmore (2001).
    """
    return mix_updates(parts, context, choose_mean_direction)


METHODS = (
    MergeMethod(
        name="karcher",
        summary="The mean of the updates' directions by angle, as long as they are on average.",
        formula="ΔW = (Σ aᵢ ‖ΔWᵢ‖) u, u = argmin Σ aᵢ angle(u, ΔWᵢ)², aᵢ = |wᵢ|/Σ|wⱼ|",
        source="Karcher (Comm. Pure Appl. Math. 30, 1977); Buss and Fillmore (ACM TOG 20, 2001)",
        merge=average_on_sphere,
        options=(SCOPE, STRENGTH),
        whole=True,
    ),
)
