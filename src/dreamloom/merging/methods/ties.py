"""TIES, also in KnOTS and core space; magnitude pruning; Model Breadcrumbs: trims by magnitude."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.elementwise import (
    REDUCE,
    SCALE,
    Entries,
    Trim,
    density_option,
    drop_zeros,
    election_option,
    merge_entries,
    open_entries,
)
from dreamloom.merging.magnitudes import find_magnitudes, find_magnitudes_of_each
from dreamloom.merging.method import Context, MergeMethod, Option, ReadLayers, Value
from dreamloom.merging.spaces import space_option


def keep_largest(entries: Entries, context: Context, rng: torch.Generator) -> Trim:
    """Keep the share of entries of largest magnitude; equal magnitudes stay or go together.

    The share is that of the layer or, with the option ``threshold``, that of the whole model:
    there a layer keeps more where its update is strong, and may keep nothing where it is weak.

    TIES of the paper takes the mean of what agrees, which leaves about 1/K of K adapters that have
    little in common; a subject with a style wants the sum, so that is the default of ``reduce``.

    Source:
        TIES-Merging (Yadav et al., arXiv:2306.01708): trim, the top k % of a task vector, which is
        all of the model's entries in a row. It is the whole of magnitude pruning. Top k % within
        each layer is what mergekit and peft made of it.
    """
    del rng  # nothing is left to chance
    density = context.number("density")
    if density >= 1:
        return lambda block: block
    if context.word("threshold") == "model":
        least = context.thresholds[entries.number]
    else:
        (least,) = find_magnitudes(entries.blocks, [_count_kept(density, entries.count)])
    return lambda block: block.where(block.abs() >= least, 0)


def find_model_thresholds(
    read_layers: ReadLayers, options: Mapping[str, Value], space: str = ""
) -> dict[int, float]:
    """Find the least magnitude that each adapter keeps, if it has one threshold for all layers.

    Layers that an adapter does not change are not counted, nor are those that it changes by zeros:
    what it keeps does not depend on which layers the others change. Blocks of entries come one
    after the other, so no layer is held as a whole.

    Args:
        read_layers: Gives all layers that are merged.
        options: Of `keep_largest`.
        space: As in `merge_entries`.

    Returns:
        Nothing where each layer has a threshold of its own, or everything is kept.

    Source:
        TIES-Merging (Yadav et al., arXiv:2306.01708), trim.
    """
    density = float(options["density"])
    if options["threshold"] != "model" or density >= 1:
        return {}

    def read() -> Iterator[tuple[int, Float[Tensor, "rows columns"]]]:
        for alive in filter(None, map(drop_zeros, read_layers())):
            _, tables = open_entries(alive, space or str(options["space"]))
            for table in tables:
                for block in table.blocks():
                    yield table.number, block

    found = find_magnitudes_of_each(read, lambda count: [_count_kept(density, count)])
    return {number: least for number, (least,) in found.items()}


def _count_kept(density: float, count: int) -> int:
    return max(1, round(density * count))


def keep_middle(entries: Entries, context: Context, rng: torch.Generator) -> Trim:
    """Drop the share of the largest entries, then the smallest ones until a share is left.

    If less than the outliers is to go, fewer outliers go: the share that is left counts. Equal
    magnitudes stay or go together.

    Source:
        Model Breadcrumbs (Davari and Belilovsky, arXiv:2312.06795), masks by layer.
    """
    del rng  # nothing is left to chance
    kept = _count_kept(context.number("density"), entries.count)
    outliers = round(context.number("outliers") * entries.count)
    above = min(outliers, entries.count - kept)
    most, least = find_magnitudes(entries.blocks, [above + 1, above + kept])
    return lambda block: block.where((block.abs() >= least) & (block.abs() <= most), 0)


_THRESHOLD = Option(
    "threshold",
    "layer",
    "layer: each layer keeps its share of entries; model: one threshold for all layers of an "
    "adapter, so strong layers keep more.",
    choices=("layer", "model"),
)

_TIES: tuple[Option, ...] = (
    density_option(0.5),
    _THRESHOLD,
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
        merge=partial(merge_entries, make_trim=keep_largest),
        find_thresholds=find_model_thresholds,
        needs="entries",
        options=(*_TIES, space_option("dense")),
        keeps_one=False,
    ),
    MergeMethod(
        name="knots",
        summary="TIES in the output directions that the adapters share; nothing is cut off.",
        formula="ΔW = U TIES(S V₁ᵀ, …, S V_Kᵀ), U S [V₁ᵀ … V_Kᵀ] = [w₁ ΔW₁ … w_K ΔW_K]",
        source="Stoica et al., Model Merging with SVD to Tie the Knots (arXiv:2410.19735)",
        merge=partial(merge_entries, make_trim=keep_largest, space="knots"),
        find_thresholds=partial(find_model_thresholds, space="knots"),
        options=_TIES,
        keeps_one=False,
    ),
    MergeMethod(
        name="core",
        summary="TIES in the output and input directions that the adapters share.",
        formula="ΔW = U TIES(M₁, …, M_K) Vᵀ, Mᵢ = Uᵀ wᵢ ΔWᵢ V",
        source="Panariello et al., Low-Rank Model Merging in Core Space (arXiv:2509.17786)",
        merge=partial(merge_entries, make_trim=keep_largest, space="core"),
        find_thresholds=partial(find_model_thresholds, space="core"),
        options=_TIES,
        keeps_one=False,
    ),
    MergeMethod(
        name="magnitude",
        summary="The sum of what is largest in each adapter; its small entries go.",
        formula="ΔW = λ Σ wᵢ top(ΔWᵢ)",
        source="Yadav et al., TIES-Merging (arXiv:2306.01708), its first step alone",
        merge=partial(merge_entries, make_trim=keep_largest),
        find_thresholds=find_model_thresholds,
        needs="entries",
        options=(
            density_option(0.5),
            _THRESHOLD,
            election_option("none"),
            REDUCE,
            SCALE,
            space_option("knots"),
        ),
        keeps_one=False,
    ),
    MergeMethod(
        name="breadcrumbs",
        summary="The sum of what is neither largest nor smallest in each adapter.",
        formula="ΔW = λ Σ wᵢ middle(ΔWᵢ)",
        source="Davari and Belilovsky, Model Breadcrumbs (arXiv:2312.06795)",
        merge=partial(merge_entries, make_trim=keep_middle),
        needs="entries",
        options=(
            density_option(0.9),
            Option(
                "outliers", 0.01, "The share of the largest entries that go.", low=0.0, high=0.5
            ),
            election_option("none"),
            REDUCE,
            SCALE,
            space_option("knots"),
        ),
        keeps_one=False,
    ),
)
