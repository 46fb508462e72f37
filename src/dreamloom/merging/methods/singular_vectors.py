"""TSV-Merge and Iso-C: the SVD of LoRAs made orthogonal, or their sum made isotropic."""

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
# A direction below this share of the strongest is what rounding left of float32 factors that repeat
# each other; made as strong as the rest it would be noise.
_NOISE = 1e-5


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


def add_isotropic(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add weighted updates, and make all directions of the sum equally strong.

    No direction outshines another any more, which helped models merged from many tasks. Only the
    directions that the adapters span are made equal: over a whole layer's, most of the result would
    be noise. A style lives by its strong directions, so try it with care, and tune ``strength``.
    Where the result is cut to a rank, those stay that were the strongest.

    Source:
        Marczak et al., No Task Left Behind (arXiv:2502.04959), section 4, Iso-C; within the
        adapters' own directions as in Panariello et al., Core Space (arXiv:2509.17786).
    """
    total = stack([(part.factors, part.weight) for part in parts])
    spectrum = find_spectrum(total)
    values = spectrum.values
    count = int((values > _NOISE * values[:1]).sum())
    mean = (values[:count].sum() / max(count, 1)).sqrt()
    up = spectrum.left_vectors()[:, :count] * mean
    down = spectrum.right_vectors()[:count] * mean
    dtype = total.up.dtype
    return Factors(up.to(dtype), down.to(dtype)).scaled(context.number("strength"))


METHODS = (
    MergeMethod(
        name="iso",
        summary="The weighted sum with all its directions made equally strong.",
        formula="ΔW = σ̄ U Vᵀ, U diag(σ) Vᵀ = Σ wᵢ ΔWᵢ, σ̄ = mean of its σ",
        source="Marczak et al. (arXiv:2502.04959), section 4, Iso-C, in core space",
        merge=add_isotropic,
        options=(Option("strength", 1.0, "What the result is multiplied by."),),
        keeps_one=False,
        ordered=True,
    ),
    MergeMethod(
        name="tsv",
        summary="The sum of all singular vectors, made perpendicular so that none disturbs others.",
        formula="ΔW = Û(ÛᵀÛ)^(-1/2) Σ̂ (V̂ᵀV̂)^(-1/2) V̂ᵀ, Û = [U₁ … U_K], Σ̂ = diag(wᵢ Σᵢ)",
        source="Gargiulo et al., Task Singular Vectors (arXiv:2412.00081), TSV-Merge",
        merge=add_whitened,
        options=(Option("strength", 1.0, "What the result is multiplied by."),),
    ),
)
