"""Scorecards by the names that users give them: a file, or a set of a run."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from dreamloom.core.errors import EvaluationError
from dreamloom.core.run_folder import RunFolder
from dreamloom.evaluation.metrics.scorecard import Scorecard

_HOW = "Name a file that 'dreamloom evaluate --json' wrote, or RUN:SET, a run and a set of it."


def find_scorecard(where: str) -> Scorecard:
    """Read the scorecard that a user names.

    Args:
        where: A file with one scorecard, a run's ``scores.json`` or a run's folder if it has one
            set, or ``RUN:SET``.

    Raises:
        EvaluationError: If there is no such file, run or set, or it is damaged.
    """
    place = Path(where)
    if place.exists():
        return _pick(place, None)
    run, colon, name = where.rpartition(":")
    if colon and run and Path(run).exists():
        return _pick(Path(run), name)
    raise EvaluationError(f"There is no scores file and no run {run if colon else where}.", _HOW)


def _pick(place: Path, name: str | None) -> Scorecard:
    file = RunFolder(place).scores if place.is_dir() else place
    if not file.is_file():
        raise EvaluationError(f"{place} has no scores.", "Evaluate its pictures first.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file} cannot be read as JSON.", _HOW) from error
    sets = found if isinstance(found, dict) else {}
    if name is not None or "scores" not in sets:
        if name is None and len(sets) == 1:
            name = next(iter(sets))
        if name not in sets:
            problem = f"has no set {name}" if name else "is no scorecard, and not of one set alone"
            known = f"Its sets are {', '.join(sets)}: name one as RUN:SET." if sets else _HOW
            raise EvaluationError(f"{file} {problem}.", known)
        found = sets[name]
    try:
        return Scorecard.model_validate(found)
    except ValidationError as error:
        raise EvaluationError(
            f"{file} holds no scores as this version writes them.", "Evaluate the pictures again."
        ) from error
