"""The point with the least distance to all updates, which an odd one out cannot move far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.combine.factors import Factors
from dreamloom.combine.method import Context, Method, Part
from dreamloom.combine.mixing import SCOPE, STRENGTH, mix_updates

_ROUNDS = 1000
_STILL = 1e-10
# Nearer than this share of the largest update, the median stands on an update: distances come from
# squares, and so with half of float64's digits.
_ON = 1e-7


def choose_median(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers of the geometric median: argmin Σ aᵢ ‖x - ΔWᵢ‖.

    Each round weighs the updates by aᵢ over their distance. If the median has come to stand on
    one, it stays if that one pulls as hard as all others together, and moves on if not.

    Args:
        products: Inner products of the updates.
        sizes: How much each counts.

    Source:
        Weiszfeld, Tohoku Math. J. 43 (1937); where it stands on an update: Vardi and Zhang, The
        multivariate L1-median and associated data depth (PNAS 97, 2000).
    """
    shares = sizes / sizes.sum()
    median = shares
    scale = products.diagonal().max().sqrt()
    for _ in range(_ROUNDS):
        gaps = torch.eye(len(shares), dtype=products.dtype) - median
        distances = torch.einsum("ij,jk,ik->i", gaps, products, gaps).clamp(min=0).sqrt()
        off = distances > _ON * scale
        if not off.any():
            break
        pulls = torch.where(off, shares / distances.where(off, distances + 1), 0.0)
        target = pulls / pulls.sum()
        held = shares[~off].sum()
        if held > 0:
            way = target - median
            force = pulls.sum() * (way @ products @ way).clamp(min=0).sqrt()
            target = median + (1 - held / force).clamp(min=0) * way if force > 0 else median
        moved = target - median
        median = target
        if (moved @ products @ moved).clamp(min=0).sqrt() < _STILL * scale:
            break
    return median


def find_median(parts: Sequence[Part], context: Context) -> Factors:
    """Find the update with the least sum of distances to all updates.

    Of several trainings of one thing, one that failed pulls the average along; the median stays
    with the others. The weights say how much each counts. It takes three adapters or more: the
    median of two is the one that counts more.

    Source:
        Weiszfeld (1937), Vardi and Zhang (2000).
    """
    return mix_updates(parts, context, choose_median)


METHODS = (
    Method(
        name="median",
        summary="The point with the least distance to all updates: one that failed hardly counts.",
        formula="ΔW = argmin Σ |wᵢ| ‖ΔW - sign(wᵢ) ΔWᵢ‖",
        source="Weiszfeld (Tohoku Math. J. 43, 1937); Vardi and Zhang (PNAS 97, 2000)",
        merge=find_median,
        options=(SCOPE, STRENGTH),
        whole=True,
        least=3,
    ),
)
