"""On the arc between two updates instead of the straight line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.factors import Factors
from dreamloom.merging.method import Context, LayerPart, MergeMethod
from dreamloom.merging.mixing import SCOPE, STRENGTH, cosines, mix_updates

# Nearer to 0 or 180 degrees than this (in 1 - |cos θ|) the arc is taken for the straight line. Next
# to 0 both are the same to ten digits; opposite updates have no arc, only rounding errors.
_STRAIGHT = 1e-10


def choose_on_arc(
    products: Float[Tensor, "k k"], sizes: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The numbers of a point on the arc between two updates: sin((1-t)θ)/sin θ, sin(tθ)/sin θ.

    Args:
        products: Inner products of one update or two.
        sizes: How much each counts; t = size₂ / (size₁ + size₂).

    Source:
        Shoemake, Animating Rotation with Quaternion Curves (SIGGRAPH 1985).
    """
    if len(sizes) == 1:
        return torch.ones_like(sizes)
    shares = sizes / sizes.sum()
    cosine = cosines(products)[0, 1]
    if 1 - cosine.abs() < _STRAIGHT:
        return shares
    angle = torch.acos(cosine)
    return torch.sin(shares * angle) / torch.sin(angle)


def slerp(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Go from one update to the other along the arc between them, which keeps their length.

    Weights w1 and w2 say how far: w2 / (w1 + w2) of the angle. Halfway between two updates of one
    length at right angles each counts 0.71, not 0.5. Only the ratio of the weights matters; how
    strong the result is says ``strength``. A negative weight goes towards the opposite update.

    Source:
        Shoemake (SIGGRAPH 1985). With weights and the angle between whole matrices it is what
        mergekit calls NuSLERP.
    """
    return mix_updates(parts, context, choose_on_arc)


METHODS = (
    MergeMethod(
        name="slerp",
        summary="A point on the arc between two updates, where a straight line would weaken both.",
        formula="ΔW = sin((1-t)θ)/sin θ ΔW₁ + sin(tθ)/sin θ ΔW₂, t = |w₂|/(|w₁|+|w₂|)",
        source="Shoemake, Animating Rotation with Quaternion Curves (SIGGRAPH 1985)",
        merge=slerp,
        options=(SCOPE, STRENGTH),
        whole=True,
        least=2,
        most=2,
    ),
)
