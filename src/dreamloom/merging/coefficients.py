"""Merge coefficients: one number for each LoRA, chosen from the updates' inner products.

All results lie among Σ cᵢ ΔWᵢ, so a table of inner products ⟨ΔWᵢ, ΔWⱼ⟩ is all that need be known
of layers of any size, and nothing depends on how updates are split into factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors, gram, stack
from dreamloom.merging.method import Context, LayerPart, Option

Choose = Callable[[Float[Tensor, "k k"], Float[Tensor, " k"]], Float[Tensor, " k"]]
"""From inner products of updates, none of them zero, and how much each shall count (above 0), to
the numbers that they are added with; all in float64."""

SCOPE = Option(
    "scope",
    "layer",
    "layer: each layer is mixed by itself, model: all layers alike, as one long update.",
    choices=("layer", "model"),
)
STRENGTH = Option("strength", 1.0, "What the mixture is multiplied by.")


def mix_updates(parts: Sequence[LayerPart], context: Context, choose: Choose) -> Factors:
    """Add updates with numbers that are chosen from their inner products.

    The size of an adapter's weight is how much it counts; a negative one turns its update around.
    An update of zeros takes no part: a layer that only some adapters change is mixed from those.

    Args:
        parts: The updates of one layer.
        context: With an option ``scope`` and, if the method has one, ``strength``. If the scope is
            ``model``, ``whole`` is needed.
        choose: What makes the method.
    """
    weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
    if context.word("scope") == "layer":
        signs = weights.sign()
        products = gram([part.factors for part in parts]) * torch.outer(signs, signs)
        coefficients = (signs * _choose_alive(products, weights.abs(), choose)).tolist()
    elif context.whole is None:
        raise ValueError("inner products over all layers are needed, and there are none")
    else:
        sizes = torch.tensor(context.weights, dtype=torch.float64).abs()
        # An adapter of weight 0 has inner products of 0 and takes no part.
        scale = torch.where(sizes > 0, sizes, 1.0)
        chosen = _choose_alive(context.whole / torch.outer(scale, scale), sizes, choose) / scale
        coefficients = [float(chosen[part.number - 1]) * part.weight for part in parts]
    strength = context.number("strength") if "strength" in context.options else 1.0
    added = [
        (part.factors, strength * coefficient)
        for part, coefficient in zip(parts, coefficients, strict=True)
    ]
    return stack([(factors, number) for factors, number in added if number != 0] or added[:1])


def _choose_alive(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"], choose: Choose
) -> Float[Tensor, " k"]:
    alive = torch.nonzero(products.diagonal() > 0).flatten()
    coefficients = torch.zeros_like(sizes)
    if len(alive):
        coefficients[alive] = choose(products[alive[:, None], alive], sizes[alive])
    return coefficients


def cosines(products: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The cosines of the angles between updates, -1 to 1.

    Args:
        products: Their inner products; none of them is zero.
    """
    lengths = products.diagonal().sqrt()
    return (products / torch.outer(lengths, lengths)).clamp(-1, 1)
