"""What a merge keeps of its parts: the subject of one adapter, the style of the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.metrics.similarity import subject_fidelity
from dreamloom.evaluation.stats import intervals as statistics
from dreamloom.evaluation.stats.intervals import Draws


class Retention(BaseModel):
    """How much of each part a merge has kept: 0 for nothing, 1 for what the part alone does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: Score
    """From the base model (0) to the subject's adapter alone (1)."""
    style: Score
    """From the subject's adapter alone (0) to the style's adapter alone (1)."""
    both: float | None = None
    """Their harmonic mean, each cut to between 0 and 1: neither makes up for the other."""
    style_reference: str
    """What the style is measured against."""


def measure_retention(
    *,
    merged: Float[Tensor, "cells features"],
    none: Float[Tensor, "cells features"],
    full: Float[Tensor, "cells features"],
    references: Float[Tensor, "references features"],
    draws: Draws,
    key: str,
    comparable: Bool[Tensor, "cells references"] | None = None,
) -> Score:
    """Place the merge's pictures between those without the part and those of the part alone.

    Args:
        merged: Features of the merge's pictures.
        none: Of the pictures without the part, of the same prompts and seeds.
        full: Of the pictures of the part alone, likewise.
        references: Of the subject's photos, or of pictures in the style.
        draws: From `statistics.draw`, for these cells and references; without references where
            ``comparable`` is given.
        key: Names the encoder.
        comparable: Which cells are compared with which references, at least one in each row; None
            for all. Pictures of the part alone that are references themselves must not be compared
            with their own prompt's: the part would be credited for drawing the very same picture.

    Returns:
        The ratio (merged − none) / (full − none) of mean similarities to the references; above 1
        where the merge shows more of the part than the part alone.

    Source:
        The retention of ZipLoRA's and K-LoRA's comparisons, as a share of what each part can do.
    """
    kept, below, above = (
        statistics.sample_mean(_compare(side, references, comparable), draws)
        for side in (merged, none, full)
    )
    found = statistics.lift(kept, below, above, draws.independent, draws.confidence)
    if found.value is None:
        # The words of a lift speak of floor and ceiling.
        reason = "the part alone does not differ clearly from the pictures without it"
        return Score(n=len(merged), key=key, note=f"not measured: {reason}")
    return Score(value=found.value, n=len(merged), interval=found.interval, key=key)


def _compare(
    side: Float[Tensor, "cells features"],
    references: Float[Tensor, "references features"],
    comparable: Bool[Tensor, "cells references"] | None,
) -> Float[np.ndarray, "cells references"] | Float[np.ndarray, " cells"]:
    """Compare with each reference; with the comparable ones as one mean, where only some are."""
    similar = subject_fidelity(generated=side, photos=references)
    if comparable is None:
        return similar.numpy()
    return ((similar * comparable).sum(dim=1) / comparable.sum(dim=1)).numpy()


def combine_retention(identity: Score, style: Score) -> float | None:
    """Give the harmonic mean of two retentions; None where one is not measured.

    Example:
        >>> combine_retention(Score(value=0.5), Score(value=1.5))
        0.6666666666666666
        >>> combine_retention(Score(value=-0.1), Score(value=0.9))
        0.0
    """
    if identity.value is None or style.value is None:
        return None
    first, second = (min(1.0, max(0.0, value)) for value in (identity.value, style.value))
    return 2 * first * second / (first + second) if first + second else 0.0


def choose_cells(places: Sequence[Sequence[tuple[str, int, str, int]]]) -> list[list[int]]:
    """Find what all sets have drawn, and where each of them has it.

    Args:
        places: For each set, what each picture was drawn from: prompt, seed, scheduler, steps.

    Returns:
        For each set, the numbers of the pictures of the common cells, in one order.
    """
    known = [{cell: number for number, cell in enumerate(cells)} for cells in places]
    common = [cell for cell in known[0] if all(cell in others for others in known[1:])]
    return [[own[cell] for cell in common] for own in known]
