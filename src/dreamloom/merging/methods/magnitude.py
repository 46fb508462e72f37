"""Magnitude pruning: the sum of each update's largest entries."""

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
from dreamloom.merging.method import Context, LayerPart, Merged, MergeMethod
from dreamloom.merging.spaces import space_option


def add_largest(parts: Sequence[LayerPart], context: Context) -> Merged:
    """Keep each weighted update's largest entries and add them up.

    Source:
        TIES-Merging (Yadav et al., arXiv:2306.01708), its first step, trim, alone.
    """
    density = context.number("density")
    return merge_entries(
        parts, context, context.word("space"), lambda entries, _: keep_largest(entries, density)
    )


METHODS = (
    MergeMethod(
        name="magnitude",
        summary="The sum of what is largest in each adapter; its small entries go.",
        formula="ΔW = λ Σ wᵢ top(ΔWᵢ)",
        source="Yadav et al., TIES-Merging (arXiv:2306.01708), its first step alone",
        merge=add_largest,
        needs="entries",
        options=(
            density_option(0.5),
            election_option("none"),
            REDUCE,
            SCALE,
            space_option("knots"),
        ),
        keeps_one=False,
    ),
)
