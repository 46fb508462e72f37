"""Geometric median of LoRAs, which one failed training cannot move far."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.coefficients import SCOPE, STRENGTH, mix_updates
from dreamloom.merging.method import MergeMethod

_ROUNDS = 1000
_STILL = 1e-2  # of what counts as standing on an update
# Nearer than this share of the largest update, the median stands on an update: distances come from
# squares, and so with half of float64's digits.
_ON = 1e-7


def choose_median(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers of the geometric median: argmin Σ aᵢ ‖x - ΔWᵢ‖.

    Of several trainings of one thing, one that failed pulls the average along; the median stays
    with the others. It takes three adapters or more: of two it is the one that counts more.

    An update is the median if it holds more than all others together pull. Else rounds of averages
    come nearer to it, in which an update counts by aᵢ over its distance.

    Args:
        products: Inner products of the updates.
        sizes: How much each counts.

    Source:
        Weiszfeld, Tohoku Math. J. 43 (1937); what holds where it stands on an update: Vardi and
        Zhang, The multivariate L1-median and associated data depth (PNAS 97, 2000).
    """
    shares = sizes / sizes.sum()
    near = _ON * products.diagonal().max().sqrt()
    for update in torch.eye(len(shares), dtype=products.dtype).unbind():
        target, pull, held = _pull(update, products, shares, near)
        if held >= pull * _length(target - update, products):
            return update.clone()
    median = shares
    for _ in range(_ROUNDS):
        target, pull, held = _pull(median, products, shares, near)
        step = target - median
        force = pull * _length(step, products)
        if force > 0:
            # An update that it stands on by chance holds it back, but not for ever.
            step = step * (1 - held / force).clamp(min=0)
        median = median + step
        if _length(step, products) < _STILL * near:
            break
    return median


def _pull(
    median: Float[Tensor, " k"],
    products: Float[Tensor, "k k"],
    shares: Float[Tensor, " k"],
    near: Tensor,
) -> tuple[Float[Tensor, " k"], Tensor, Tensor]:
    """Where the updates pull a point to, how hard, and the shares of those that it stands on."""
    gaps = torch.eye(len(shares), dtype=products.dtype) - median
    distances = torch.einsum("ij,jk,ik->i", gaps, products, gaps).clamp(min=0).sqrt()
    away = distances > near
    pulls = torch.where(away, shares / distances.where(away, 1.0), 0.0)
    target = pulls / pulls.sum() if away.any() else median
    return target, pulls.sum(), shares[~away].sum()


def _length(mixture: Float[Tensor, " k"], products: Float[Tensor, "k k"]) -> Tensor:
    return (mixture @ products @ mixture).clamp(min=0).sqrt()


METHODS = (
    MergeMethod(
        name="median",
        summary="The point with the least distance to all updates: one that failed hardly counts.",
        formula="ΔW = argmin Σ |wᵢ| ‖ΔW - sign(wᵢ) ΔWᵢ‖",
        source="Weiszfeld (Tohoku Math. J. 43, 1937); Vardi and Zhang (PNAS 97, 2000)",
        merge=partial(mix_updates, choose=choose_median),
        options=(SCOPE, STRENGTH),
        whole=True,
        least=3,
    ),
)
