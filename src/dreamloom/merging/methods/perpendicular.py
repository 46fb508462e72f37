"""Gram-Schmidt on LoRAs: an update, and of each further one what is orthogonal to it."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.coefficients import SCOPE, mix_updates
from dreamloom.merging.method import MergeMethod

# An update within this share of those before it (squared) brings nothing that is not rounding.
_REPEATED = 1e-12


def choose_perpendicular(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers of a sum in which each update counts only at right angles to those before it.

    With two: w₁ ΔW₁ + w₂ (ΔW₂ - ⟨ΔW₁, ΔW₂⟩/‖ΔW₁‖² ΔW₁).
    What two adapters have in common, such as the style of the same camera, counts once instead of
    twice. The first one's share of the result is exactly its weight, so the order of adapters
    matters, and the most important one is named first.

    Args:
        products: Inner products of the updates.
        sizes: Their weights.

    Source:
        Gram and Schmidt; see Golub and Van Loan, Matrix Computations, section 5.2.
    """
    count = len(sizes)
    # Row by row, what each brings, as a mixture of all; and the lengths of that, squared.
    new = torch.eye(count, dtype=products.dtype)
    lengths = torch.zeros(count, dtype=products.dtype)
    for i in range(count):
        # Twice is enough: the second round takes away what rounding left in the first.
        for j in [*range(i)] * 2:
            if lengths[j] > 0:
                new[i] -= (new[i] @ products @ new[j]) / lengths[j] * new[j]
        left = new[i] @ products @ new[i]
        if left > _REPEATED * products[i, i]:
            lengths[i] = left
        else:
            new[i] = 0
    return sizes @ new


METHODS = (
    MergeMethod(
        name="perpendicular",
        summary="The first update whole, and of each further one what stands at right angles.",
        formula="ΔW = w₁ ΔW₁ + w₂ (ΔW₂ - ⟨ΔW₁,ΔW₂⟩/⟨ΔW₁,ΔW₁⟩ ΔW₁) + …",
        source="Gram-Schmidt; Golub and Van Loan, Matrix Computations, section 5.2",
        merge=partial(mix_updates, choose=choose_perpendicular),
        options=(SCOPE,),
        whole=True,
    ),
)
