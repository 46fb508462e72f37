"""The design of the search for settings: which are tried together, and what their effects are.

One setting changed at a time says nothing about the others' sake, and spends every run on one
question. Here each run changes half of the settings, and each setting's effect is the difference
of two halves of all runs, in which every other setting is high as often as low.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dreamloom.evaluation.stats.tests import student_quantile

_FIRST_ROW = (1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1)
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Factor:
    """A setting that is tried at two values.

    Args:
        name: What it is called in the table.
        low: What ``--set`` is given for the lower value.
        high: For the higher one.
    """

    name: str
    low: tuple[str, ...]
    high: tuple[str, ...]


@dataclass(frozen=True)
class Effect:
    """What a factor does to a measure.

    Args:
        value: The mean where it is high, less that where it is low.
        margin: Half of the interval that holds the effect with 95 % confidence.
    """

    value: float
    margin: float

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.value) > self.margin


def make_design() -> Int[np.ndarray, "24 11"]:
    """Make a design for 11 factors: 12 runs and their mirror image; −1 is low.

    In 12 runs a factor's effect is mixed with the common effects of two others; with the mirror
    image beside it, it is not.

    Source:
        Plackett and Burman, The Design of Optimum Multifactorial Experiments (Biometrika 33, 1946);
        the mirror image: Box and Wilson, J. R. Stat. Soc. B 13 (1951).

    Example:
        >>> design = make_design()
        >>> bool((design.T @ design == 24 * np.eye(11)).all())
        True
    """
    rows = [np.roll(_FIRST_ROW, shift) for shift in range(len(_FIRST_ROW))]
    design = np.array([*rows, np.full(len(_FIRST_ROW), -1)])
    return np.concatenate([design, -design])


def settings_of(row: Sequence[int], factors: Sequence[Factor]) -> tuple[str, ...]:
    """List what ``--set`` is given for one run of the design."""
    return tuple(
        one
        for level, factor in zip(row, factors, strict=False)
        for one in (factor.high if level > 0 else factor.low)
    )


def estimate_effects(
    design: Int[np.ndarray, "runs columns"],
    values: Float[np.ndarray, "runs persons"],
    names: Sequence[str],
) -> Mapping[str, Effect]:
    """Estimate each factor's effect on a measure, by least squares over runs and persons.

    Persons differ, and each has a mean of its own. What factors and persons do not explain is the
    error, whatever it comes from: chance, and settings that act together.

    Args:
        design: Levels, −1 and 1, of each run; columns beyond the names are not asked about.
        values: The measure, for each run and person; not a number where it did not teach that one.
        names: Those of the first columns.

    Raises:
        ValueError: If the runs are too few for the factors.
    """
    run, person = np.nonzero(~np.isnan(values))
    levels = design[run, : len(names)] / 2
    model = np.concatenate([levels, np.eye(values.shape[1])[person]], axis=1)
    freedom = len(model) - int(np.linalg.matrix_rank(model))
    if freedom < 1:
        raise ValueError(f"{len(run)} trainings say nothing about {len(names)} factors")
    flat = values[run, person]
    found = np.linalg.lstsq(model, flat, rcond=None)[0]
    variance = float(((flat - model @ found) ** 2).sum() / freedom)
    spread = np.sqrt(variance * np.diag(np.linalg.pinv(model.T @ model)))
    quantile = student_quantile(0.5 + _CONFIDENCE / 2, freedom)
    return {
        name: Effect(float(found[place]), float(quantile * spread[place]))
        for place, name in enumerate(names)
    }
