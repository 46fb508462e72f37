"""Norm matching: LoRAs made equally strong before they are added, or their sum afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.coefficients import SCOPE, mix_updates
from dreamloom.merging.factors import Factors
from dreamloom.merging.method import Context, LayerPart, MergeMethod, Option

# A sum that is shorter than this share of its parts is what rounding left of parts that cancel.
_CANCELLED = 1e-6


def choose_equal_energy(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers that make every update as strong as its weight says: wᵢ n / ‖ΔWᵢ‖.

    n is the mean of the norms, each counting by its weight. A style that was trained long may
    change layers ten times as much as a subject does; here a weight alone says how strong an
    adapter is, so that none drowns another. Updates of one norm give the plain sum.

    Args:
        products: Inner products of the updates.
        sizes: Their weights.

    Source:
        Our own; the γ of K-LoRA (Ouyang et al., arXiv:2502.18461) balances two adapters by the
        sums of their entries' sizes instead.
    """
    lengths = products.diagonal().sqrt()
    return sizes * (sizes * lengths).sum() / sizes.sum() / lengths


def match_norm(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"], size: str
) -> Float[Tensor, " k"]:
    """The numbers of a weighted sum with a norm that is known beforehand.

    Args:
        products: Inner products of the updates.
        sizes: Their weights.
        size: ``largest``: that of the largest weighted update; ``mean``: the mean of their norms;
            ``added``: their norms added up, which no sum exceeds.
    """
    lengths = sizes * products.diagonal().sqrt()
    whole = (sizes @ products @ sizes).clamp(min=0).sqrt()
    if whole < _CANCELLED * lengths.sum():
        return sizes
    wanted = {"largest": lengths.max(), "mean": lengths.mean(), "added": lengths.sum()}[size]
    return sizes * wanted / whole


def add_matched(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add weighted updates, and scale the sum to the norm of its parts.

    Several adapters at full weight are often too strong together and burn the picture. Here the sum
    changes a layer no more than its strongest part does alone. The weights keep their meaning:
    twice as large, the result is, too.

    Source:
        The weighted sum of Ilharco et al. (arXiv:2212.04089), section 2, times one number. That
        norms are matched is our own.
    """
    size = context.word("size")
    return mix_updates(parts, context, lambda products, sizes: match_norm(products, sizes, size))


METHODS = (
    MergeMethod(
        name="equal",
        summary="The weighted sum of updates that were brought to one norm first.",
        formula="ΔW = Σ wᵢ (n/‖ΔWᵢ‖) ΔWᵢ, n = Σ |wᵢ| ‖ΔWᵢ‖/Σ |wⱼ|",
        source="Our own; compare γ of K-LoRA (arXiv:2502.18461)",
        merge=partial(mix_updates, choose=choose_equal_energy),
        options=(SCOPE,),
        whole=True,
    ),
    MergeMethod(
        name="matched",
        summary="The weighted sum, scaled to the norm of its parts, so that stacks do not burn.",
        formula="ΔW = n S/‖S‖, S = Σ wᵢ ΔWᵢ, n = max ‖wᵢ ΔWᵢ‖ (or their mean, or their sum)",
        source="Ilharco et al. (arXiv:2212.04089), section 2, times one number of our own",
        merge=add_matched,
        options=(
            Option(
                "size",
                "largest",
                "The norm wanted: of the largest part, the parts' mean, or all added.",
                choices=("largest", "mean", "added"),
            ),
            SCOPE,
        ),
        whole=True,
    ),
)
