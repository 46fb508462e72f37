"""What each cell of two adapters' weights keeps of subject and style, measured within the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dreamloom.core.config.settings import EvaluateConfig
from dreamloom.core.events import OnProgress, no_progress
from dreamloom.core.manifests import ImageSet, PhotoSet
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.retention import MergeSets, evaluate_merge
from dreamloom.experiments.grid.axes import Axis
from dreamloom.experiments.grid.files import CellRetention, CellRole
from dreamloom.experiments.grid.planning import GridPlan, GridRequest
from dreamloom.pipeline.score_set import evaluation_options


@dataclass(frozen=True)
class Ends:
    """Which cells the others are measured against.

    Args:
        sets: The set of each role.
        weights: The weight of the subject's adapter alone, and of the style's.
    """

    sets: Mapping[CellRole, str]
    weights: tuple[float, float]


def find_ends(request: GridRequest, plan: GridPlan) -> Ends | str:
    """Find the cells that stand for the base model and for each adapter alone.

    The first adapter is the subject's, the second the style's, whichever axis weighs which. Alone
    stands for a weight of 1, or for the highest where 1 is not on the axis.

    Returns:
        The cells; or why there are none, as a clause.
    """
    if request.photos is None:
        return "no photos of the subject were given (--photos)"
    by_name = {axis.name: axis for axis in plan.axes}
    is_pair = len(request.adapters) == 2 and not plan.checkpoints
    if not is_pair or set(by_name) != {"weight:1", "weight:2"}:
        return "it takes two adapters, and their weights as the axes weight:1 and weight:2"
    for axis in by_name.values():
        if 0 not in axis.values:
            return f"the axis {axis.name} has no 0, so no cell leaves that adapter out"
        if not any(float(value) > 0 for value in axis.values):
            return f"the axis {axis.name} has no weight above 0, so no cell shows what it teaches"
    subject, style = by_name["weight:1"], by_name["weight:2"]
    alone = _strongest(subject), _strongest(style)

    def place(subject_weight: float, style_weight: float) -> str:
        given = {subject.name: subject_weight, style.name: style_weight}
        x, y = (axis.values.index(given[axis.name]) for axis in plan.axes)
        return next(cell.set for cell in plan.cells if (cell.x, cell.y) == (x, y))

    return Ends(
        {"base": place(0, 0), "subject": place(alone[0], 0), "style": place(0, alone[1])}, alone
    )


def _strongest(axis: Axis) -> float:
    return 1.0 if 1 in axis.values else max(map(float, axis.values))


def measure_cells(
    ends: Ends,
    sets: Mapping[str, ImageSet],
    photos: PhotoSet,
    style_pictures: PhotoSet | None,
    config: EvaluateConfig,
    encoders: Encoders,
    on_progress: OnProgress = no_progress,
) -> tuple[dict[str, CellRetention], str]:
    """Measure what every cell but the ends has kept.

    Args:
        ends: From `find_ends`.
        sets: All cells' pictures, by the set's name.
        photos: The subject's photos, prepared.
        style_pictures: Pictures in the style; None takes what the style's adapter alone drew.
        config: How to score.
        encoders: From `pick_encoders`.
        on_progress: Told after each cell.

    Returns:
        Retention by the set's name, and what the style was compared with.
    """
    base, subject, style = (sets[ends.sets[role]] for role in ("base", "subject", "style"))
    merged = {name: one for name, one in sets.items() if name not in ends.sets.values()}
    found: dict[str, CellRetention] = {}
    compared = ""
    for name, images in merged.items():
        kept = evaluate_merge(
            MergeSets(base=base, subject=subject, style=style, merged=images),
            photos,
            style_pictures,
            encoders,
            evaluation_options(config),
        )
        found[name] = CellRetention(subject=kept.identity, style=kept.style, both=kept.both)
        compared = kept.style_reference
        on_progress(len(found), len(merged))
    return found, compared
