"""TSV-Merge: singular vectors of all updates, made orthogonal before they are added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors, balance, find_spectrum, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod, Option

# Mixtures of vectors that are shorter than this (squared, of the longest) are not lengthened fully:
# two adapters that share a direction would make noise of it.
_FLOOR = 1e-6


def whiten(vectors: Float[Tensor, "side r"]) -> tuple[Float[Tensor, "side r"], float]:
    """The orthonormal vectors that are nearest to some unit vectors: X (XᵀX)^(-1/2).

    Args:
        vectors: Columns of length 1, in float64.

    Returns:
        The vectors, and the condition number of XᵀX: 1 if they were perpendicular, infinite if
        they repeat a direction. Below the floor (10⁶ times less than the largest eigenvalue) a
        direction is lengthened by the floor's root at most, and stays shorter than 1.

    Source:
        Orthogonal Procrustes problem: Schönemann, Psychometrika 31 (1966), whose P Qᵀ with
        X = P D Qᵀ is the same.
    """
    values, turn = torch.linalg.eigh(vectors.T @ vectors)
    largest = values.max()
    root = (turn / values.clamp(min=_FLOOR * largest).sqrt()) @ turn.T
    condition = float(largest / values.min()) if values.min() > 0 else float("inf")
    return vectors @ root, condition


def add_whitened(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add the updates' singular triplets after making their vectors perpendicular.

    Each update keeps the strengths of its directions, and directions that several share are pushed
    apart until none disturbs another. A weight multiplies its adapter's strengths. Where nothing is
    shared it is the plain sum; of one adapter named twice at weight 1 it is that adapter.

    Source:
        Gargiulo et al., Task Singular Vectors (arXiv:2412.00081), TSV-Merge; every direction of a
        LoRA is kept, for it has few.
    """
    triplets = [(part, find_spectrum(part.factors)) for part in parts]
    triplets = [(part, spectrum) for part, spectrum in triplets if len(spectrum.values)]
    if not triplets:
        return stack([(part.factors, part.weight) for part in parts])
    left = torch.cat([spectrum.left_vectors() for _, spectrum in triplets], dim=1)
    right = torch.cat([spectrum.right_vectors() for _, spectrum in triplets], dim=0)
    values = torch.cat([part.weight * spectrum.values for part, spectrum in triplets])
    left, of_left = whiten(left)
    right, of_right = whiten(right.T)
    context.notes["condition"] = max(of_left, of_right)
    dtype = triplets[0][0].factors.up.dtype
    up = left * values * context.number("strength")
    return balance(Factors(up.to(dtype), right.T.to(dtype)))


METHODS = (
    MergeMethod(
        name="tsv",
        summary="The sum of all singular vectors, made perpendicular so that none disturbs others.",
        formula="ΔW = Û(ÛᵀÛ)^(-1/2) Σ̂ (V̂ᵀV̂)^(-1/2) V̂ᵀ, Û = [U₁ … U_K], Σ̂ = diag(wᵢ Σᵢ)",
        source="Gargiulo et al., Task Singular Vectors (arXiv:2412.00081), TSV-Merge",
        merge=add_whitened,
        options=(Option("strength", 1.0, "What the result is multiplied by."),),
    ),
)
