"""KnOTS and core space: coordinates in which the entries of LoRA updates are compared.

Entries are compared one by one, so it matters along which directions they are taken. In a layer's
own coordinates the result of such a method has full rank, and a LoRA can only keep a part of it.
In coordinates that span nothing but the updates, the result fits a LoRA as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors, balance
from dreamloom.merging.method import Merged, Option

# Directions shorter than this share of the longest are rounding errors of float32 factors.
_NOTHING = 3e-6
# Singular values nearer to each other than this share of the largest: rounding can turn their
# vectors into each other.
_SAME = 1e-4


@dataclass(frozen=True)
class Space:
    """Some updates in common coordinates, and the way back.

    Args:
        updates: What the updates are there, in the order given.
        left: The orthonormal directions of the outputs, if not the outputs themselves.
        right: Those of the inputs.
    """

    updates: tuple[Factors, ...]
    left: Float[Tensor, "outputs left"] | None = None
    right: Float[Tensor, "inputs right"] | None = None

    def lift(self, merged: Float[Tensor, "rows columns"]) -> Merged:
        """Bring a matrix in these coordinates back to the layer's: as factors, if it is thin."""
        if self.left is None:
            return merged
        up, down = self.left.to(merged.dtype), merged
        if self.right is not None:
            right = self.right.to(merged.dtype)
            if merged.shape[0] > merged.shape[1]:
                up, down = up @ merged, right.T
            else:
                down = merged @ right.T
        return balance(Factors(up, down))


def space_option(default: str) -> Option:
    """The option that chooses the coordinates."""
    return Option(
        "space",
        default,
        "dense: the layer's own entries, then cut to a rank; knots or core: aligned, nothing is "
        "cut off.",
        choices=("dense", "knots", "core"),
    )


def enter_space(updates: Sequence[Factors], kind: str) -> Space:
    """Write weighted updates in common coordinates, without multiplying them out.

    Every update is exactly what it was: the directions span all of them. ``dense`` leaves the
    layer's coordinates. ``knots`` turns the outputs to U of [ΔW1 … ΔWK] = U S [V1ᵀ … VKᵀ], where
    an update is S Vᵢᵀ = Uᵀ ΔWᵢ. ``core`` turns the inputs too, where it is Mᵢ = Uᵀ ΔWᵢ V.

    Args:
        updates: One or more of one shape, not all zero.
        kind: ``dense``, ``knots`` or ``core``.

    Source:
        KnOTS: Stoica et al., Model Merging with SVD to Tie the Knots (arXiv:2410.19735); the
        product Uᵀ ΔWᵢ stands for the SVD of a wide dense matrix. Core space: Panariello et al.,
        Accurate and Efficient Low-Rank Model Merging in Core Space (arXiv:2509.17786); its bases
        are singular vectors of the stacked factors, which turn when a factor is rewritten, ours
        are those of the stacked updates, which span the same.
    """
    doubles = [Factors(update.up.double(), update.down.double()) for update in updates]
    if kind == "dense":
        return Space(tuple(doubles))
    left = find_directions(doubles)
    if kind == "knots":
        return Space(tuple(Factors(left.T @ one.up, one.down) for one in doubles), left)
    right = find_directions([Factors(one.down.T, one.up.T) for one in doubles])
    turned = tuple(Factors(left.T @ one.up, one.down @ right) for one in doubles)
    return Space(turned, left, right)


def find_directions(updates: Sequence[Factors]) -> Float[Tensor, "outputs k"]:
    """Find orthonormal directions that span the outputs of some updates, the strongest first.

    These are the left singular vectors U of [ΔW1 … ΔWK]. With downᵢᵀ = Qᵢ Tᵢ it has the left
    singular vectors of the thin matrix [up1 T1ᵀ … upK TKᵀ], and those come from its own triangle,
    no larger than the ranks together. They depend on the updates alone: not on how these are
    split, nor on their order, nor on chance where singular values are equal.

    Args:
        updates: One or more of one number of outputs, not all zero, in float64.
    """
    thin = [
        update.up @ torch.linalg.qr(update.down.T.contiguous(), mode="r").R.T for update in updates
    ]
    turned, triangle = torch.linalg.qr(torch.cat(thin, dim=1))
    left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
    kept = values > values[0] * _NOTHING
    return _settle(turned @ left[:, kept], values[kept])


def _settle(
    directions: Float[Tensor, "outputs k"], values: Float[Tensor, " k"]
) -> Float[Tensor, "outputs k"]:
    """Choose one basis where singular vectors leave a choice: their signs, and equal values.

    Within vectors of equal values any rotation is as good. Those are taken that make a fixed
    diagonal matrix, with no symmetry, diagonal there too: they depend on the plane only.
    """
    directions = directions.clone()
    fixed = torch.arange(1, len(directions) + 1, dtype=directions.dtype).sqrt()[:, None]
    steps = (values[:-1] - values[1:] > _SAME * values[0]).nonzero().flatten() + 1
    for start, stop in pairwise([0, *steps.tolist(), len(values)]):
        if stop - start > 1:
            plane = directions[:, start:stop]
            _, turn = torch.linalg.eigh(plane.T @ (fixed * plane))
            directions[:, start:stop] = plane @ turn
    largest = directions.abs().argmax(dim=0, keepdim=True)
    return directions * directions.gather(0, largest).sign()
