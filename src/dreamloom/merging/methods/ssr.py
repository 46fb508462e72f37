"""SSR: subspace signal routing tells each adapter's inputs apart by what layers really see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.activation_inputs import (
    JOINT,
    JOINT_SHARE,
    PROMPTS,
    STEPS,
    UNSEEN,
    name_gram,
    take,
)
from dreamloom.merging.factors import Factors, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod, Option

# Directions of a factor with unit rows that are shorter than this are rounding errors.
_NOTHING = 1e-7


def route_signals(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Let each adapter answer its own prompts as if it were alone.

    With down = [down₁; down₂; …] a layer sees every input x as z = down · x, and each adapter reads
    its own rows of z. Where the others' prompts fill these rows too, it answers when it is not
    asked. So the update becomes up · R · down with the matrix R that turns z, on adapter k's
    prompts, into wₖ times its own rows and zeros elsewhere, as nearly as a matrix can; see
    `solve_routing`. Hₖ is the mean of z zᵀ over what the layer sees while the base wears adapter k
    at its weight and draws its prompts.

    All this happens in coordinates in which each adapter's down has orthonormal rows, so it does
    not matter how updates are split. A layer that one adapter alone changes takes its weighted
    update.

    Source:
        Dong et al., SSR-Merge (arXiv:2606.10617).

    Raises:
        ConfigError: If the layer was not listened to.
    """
    if len(parts) == 1:
        return stack([(part.factors, part.weight) for part in parts])
    bases = [find_orthonormal_rows(part.factors.down) for part in parts]
    counts = torch.tensor([len(turn) for turn, _ in bases])
    turn = torch.block_diag(*[turn for turn, _ in bases])

    def read(number: int) -> Tensor:
        turned: Tensor = turn @ take(context, name_gram(number)).to(turn) @ turn.T
        return turned

    joint = context.number("joint")
    routing = solve_routing(
        torch.stack([read(part.number) for part in parts]),
        torch.repeat_interleave(torch.arange(len(parts)), counts),
        torch.tensor([part.weight for part in parts], dtype=turn.dtype),
        joint * read(JOINT) if joint > 0 else None,
        ridge=context.number("ridge"),
        keeps_unseen=context.word("unseen") == "sum",
    )
    ups = [part.factors.up.double() @ back for part, (_, back) in zip(parts, bases, strict=True)]
    downs = [
        turn @ part.factors.down.double() for part, (turn, _) in zip(parts, bases, strict=True)
    ]
    dtype = parts[0].factors.up.dtype
    return Factors((torch.cat(ups, dim=1) @ routing).to(dtype), torch.cat(downs).to(dtype))


def solve_routing(
    grams: Float[Tensor, "parts rows rows"],
    owners: Tensor,
    weights: Float[Tensor, " parts"],
    joint: Float[Tensor, "rows rows"] | None = None,
    *,
    ridge: float,
    keeps_unseen: bool,
) -> Float[Tensor, "rows rows"]:
    """Find the matrix R that hands each adapter its own rows on its own prompts, and no others.

    It is the least squares solution of R z = wₖ Eₖ z over the inputs of every adapter k, and of
    R z = W z over those of prompts that ask for all of them:

        R = (Σ wₖ Eₖ Hₖ + η W H_joint + λ S) (Σ Hₖ + η H_joint + λ I)⁻¹

    Eₖ keeps the rows of adapter k, W holds each row's weight, and λ is ``ridge`` times the mean of
    the diagonal of what it is added to. In directions that no prompt fills, R is S: W adds the
    adapters up there, 0 drops them, as in the paper. As η grows, R becomes W, the plain sum.

    Args:
        grams: The mean of z zᵀ on each adapter's prompts.
        owners: Whose each row of z is: the adapter's place in ``grams``.
        weights: What each adapter's rows are multiplied by.
        joint: η H_joint.
        ridge: Above 0; small.
        keeps_unseen: Whether S is W, not 0.

    Source:
        SSR-Merge (arXiv:2606.10617), R = Q (G + λ I)⁻¹. Weights, the scale of λ, S = W and the
        joint term are ours.
    """
    of_rows = weights[owners]
    total = grams.sum(dim=0)
    own = owners == torch.arange(len(grams))[:, None]
    guide = ((weights[:, None] * own)[..., None] * grams).sum(dim=0)
    if joint is not None:
        total = total + joint
        guide = guide + of_rows[:, None] * joint
    rows = len(total)
    # Where nothing was seen at all, any scale will do.
    scale = ridge * (float(total.trace()) / rows or 1.0)
    total = total + scale * torch.eye(rows, dtype=total.dtype)
    if keeps_unseen:
        guide = guide + scale * torch.diag(of_rows)
    routing: Tensor = torch.linalg.solve(total, guide.T).T
    return routing


def find_orthonormal_rows(
    down: Float[Tensor, "rank inputs"],
) -> tuple[Float[Tensor, "kept rank"], Float[Tensor, "rank kept"]]:
    """Find what turns a factor's rows into orthonormal ones, and back.

    Returns:
        ``turn``, so that the rows of turn · down are orthonormal, and ``back``, so that
        back · turn · down is down again; both in float64. Repeated and zero rows leave fewer.
    """
    down = down.double()
    lengths = down.norm(dim=1)
    unit = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    squares, basis = torch.linalg.eigh((down @ down.T) * unit[:, None] * unit)
    kept = squares > _NOTHING**2 * len(down)
    roots, basis = squares[kept].sqrt(), basis[:, kept]
    return (basis / roots).T * unit, lengths[:, None] * basis * roots


METHODS = (
    MergeMethod(
        name="ssr",
        summary="Each adapter answers its own prompts alone: the others' signals are routed away.",
        formula="ΔW = up R down, R = (Σ wₖ Eₖ Hₖ + η W H_joint + λ S) (Σ Hₖ + η H_joint + λ I)⁻¹",
        source="Dong et al., Subspace Signal Routing for Training-Free LoRA Merging in Diffusion "
        "Models (arXiv:2606.10617); weights, the joint term and S are ours",
        merge=route_signals,
        needs="activations",
        options=(
            JOINT_SHARE,
            Option("ridge", 1e-3, "λ, as a share of the mean signal; above 0.", low=1e-9),
            UNSEEN,
            PROMPTS,
            STEPS,
        ),
    ),
)
