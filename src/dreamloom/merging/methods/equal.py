"""The sum of updates made equally strong."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors
from dreamloom.merging.method import Context, LayerPart, MergeMethod
from dreamloom.merging.mixing import SCOPE, mix_updates


def choose_equal_energy(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers that make every update as strong as its weight says: wᵢ n / ‖ΔWᵢ‖.

    n is the mean of the norms, each counting by its weight.

    Args:
        products: Inner products of the updates.
        sizes: Their weights.
    """
    lengths = products.diagonal().sqrt()
    return sizes * (sizes * lengths).sum() / sizes.sum() / lengths


def add_equal(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add updates after giving all of them one norm, so that none drowns another.

    A style that was trained long may change layers ten times as much as a subject does. Here a
    weight alone says how strong an adapter is. Updates of one norm give the plain sum.

    Source:
        Our own; the γ of K-LoRA (Ouyang et al., arXiv:2502.18461) balances two adapters by the
        sums of their entries' sizes instead.
    """
    return mix_updates(parts, context, choose_equal_energy)


METHODS = (
    MergeMethod(
        name="equal",
        summary="The weighted sum of updates that were brought to one norm first.",
        formula="ΔW = Σ wᵢ (n/‖ΔWᵢ‖) ΔWᵢ, n = Σ |wᵢ| ‖ΔWᵢ‖/Σ |wⱼ|",
        source="Our own; compare γ of K-LoRA (arXiv:2502.18461)",
        merge=add_equal,
        options=(SCOPE,),
        whole=True,
    ),
)
