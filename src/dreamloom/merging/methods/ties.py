"""TIES: trim small entries, elect a sign for each, and add up what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence

from dreamloom.merging.entries import (
    REDUCE,
    SCALE,
    density_option,
    election_option,
    keep_largest,
    merge_entries,
)
from dreamloom.merging.method import Context, LayerPart, Merged, MergeMethod, Option
from dreamloom.merging.spaces import space_option


def merge_ties(parts: Sequence[LayerPart], context: Context, space: str) -> Merged:
    """Trim, elect and merge, in some coordinates.

    The paper takes the mean of what agrees, which leaves about 1/K of K adapters that have little
    in common; a subject with a style wants the sum, so that is the default of ``reduce``.

    Source:
        TIES-Merging (Yadav et al., arXiv:2306.01708): trim, elect, merge; top-k within each
        layer.
    """
    density = context.number("density")
    return merge_entries(parts, context, space, lambda entries, _: keep_largest(entries, density))


def merge_by_sign(parts: Sequence[LayerPart], context: Context) -> Merged:
    """TIES in the coordinates that the user chose."""
    return merge_ties(parts, context, context.word("space"))


def merge_knots(parts: Sequence[LayerPart], context: Context) -> Merged:
    """TIES where the outputs are turned to the directions that the updates share.

    Source:
        KnOTS (Stoica et al., arXiv:2410.19735) with TIES; with weights, top-k within each
        layer.
    """
    return merge_ties(parts, context, "knots")


def merge_core(parts: Sequence[LayerPart], context: Context) -> Merged:
    """TIES where outputs and inputs are turned to the directions that the updates share.

    Source:
        Core Space (Panariello et al., arXiv:2509.17786) with TIES.
    """
    return merge_ties(parts, context, "core")


_TIES: tuple[Option, ...] = (
    density_option(0.5),
    election_option("weighted", may_skip=False),
    REDUCE,
    SCALE,
)

METHODS = (
    MergeMethod(
        name="ties",
        summary="Each adapter's largest entries; where signs differ, the heavier side alone.",
        formula="ΔW = λ Σ [sgn τ̂ᵢ = γ] τ̂ᵢ, τ̂ᵢ = top(wᵢ ΔWᵢ), γ = sgn Σ τ̂ᵢ",
        source="Yadav et al., TIES-Merging (arXiv:2306.01708): trim, elect, merge",
        merge=merge_by_sign,
        needs="entries",
        options=(*_TIES, space_option("dense")),
        keeps_one=False,
    ),
    MergeMethod(
        name="knots",
        summary="TIES in the output directions that the adapters share; nothing is cut off.",
        formula="ΔW = U TIES(S V₁ᵀ, …, S V_Kᵀ), U S [V₁ᵀ … V_Kᵀ] = [w₁ ΔW₁ … w_K ΔW_K]",
        source="Stoica et al., Model Merging with SVD to Tie the Knots (arXiv:2410.19735)",
        merge=merge_knots,
        options=_TIES,
        keeps_one=False,
    ),
    MergeMethod(
        name="core",
        summary="TIES in the output and input directions that the adapters share.",
        formula="ΔW = U TIES(M₁, …, M_K) Vᵀ, Mᵢ = Uᵀ wᵢ ΔWᵢ V",
        source="Panariello et al., Low-Rank Model Merging in Core Space (arXiv:2509.17786)",
        merge=merge_core,
        options=_TIES,
        keeps_one=False,
    ),
)
