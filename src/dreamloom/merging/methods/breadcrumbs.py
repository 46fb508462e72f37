"""Model Breadcrumbs: neither the largest entries nor the smallest ones."""

from __future__ import annotations

from collections.abc import Sequence

from dreamloom.merging.entries import (
    REDUCE,
    SCALE,
    Entries,
    Trim,
    density_option,
    election_option,
    find_magnitudes,
    merge_entries,
)
from dreamloom.merging.method import Context, LayerPart, Merged, MergeMethod, Option
from dreamloom.merging.spaces import space_option


def keep_middle(entries: Entries, density: float, outliers: float) -> Trim:
    """Drop the largest entries, then the smallest ones until a share is left.

    If less than the outliers is to go, fewer outliers go: the share that is left counts. Equal
    magnitudes stay or go together.

    Args:
        entries: Of one weighted update.
        density: The share that stays, above 0, up to 1.
        outliers: The share of the largest that go, from 0.

    Source:
        Model Breadcrumbs (Davari and Belilovsky, arXiv:2312.06795), masks by layer.
    """
    kept = max(1, round(density * entries.count))
    above = min(round(outliers * entries.count), entries.count - kept)
    most, least = find_magnitudes(entries.blocks, [above + 1, above + kept])
    return lambda block: block.where((block.abs() >= least) & (block.abs() <= most), 0)


def merge_breadcrumbs(parts: Sequence[LayerPart], context: Context) -> Merged:
    """Keep the middle of each weighted update and add up.

    Source:
        Model Breadcrumbs (Davari and Belilovsky, arXiv:2312.06795).
    """
    density, outliers = context.number("density"), context.number("outliers")
    return merge_entries(
        parts,
        context,
        context.word("space"),
        lambda entries, _: keep_middle(entries, density, outliers),
    )


METHODS = (
    MergeMethod(
        name="breadcrumbs",
        summary="The sum of what is neither largest nor smallest in each adapter.",
        formula="ΔW = λ Σ wᵢ middle(ΔWᵢ)",
        source="Davari and Belilovsky, Model Breadcrumbs (arXiv:2312.06795)",
        merge=merge_breadcrumbs,
        needs="entries",
        options=(
            density_option(0.9),
            Option(
                "outliers",
                0.01,
                "The share of the largest entries that go.",
                low=0.0,
                high=0.5,
            ),
            election_option("none"),
            REDUCE,
            SCALE,
            space_option("knots"),
        ),
        keeps_one=False,
    ),
)
