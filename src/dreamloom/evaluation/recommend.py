"""Which adapter of a training to take: most like the subject, and still following its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreamloom.evaluation.stats.means import harmonic_mean


@dataclass(frozen=True)
class CheckpointCandidate:
    """An adapter from within a training, and what was measured of it."""

    update: int
    identity_lift: float | None
    clip_t: float | None
    clip_t_floor: float | None
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """Which adapter to take, and why."""

    update: int
    why: str


_CLOSE = 0.02
"""Merits that differ by less are taken for equal: a look has few pictures."""


def recommend_checkpoint(candidates: Sequence[CheckpointCandidate]) -> Recommendation | None:
    """Choose the adapter that is most like the subject and still follows its prompts.

    Merit is the harmonic mean of the identity's lift and of the share of the untaught model's
    CLIP-T that is left, both between 0 and 1, so that neither can make up for the loss of the
    other. Of nearly equal ones the earliest is taken: it has forgotten least. One with an alarm
    is taken only if every one has some.

    Returns:
        None if nothing was measured that could tell them apart.
    """
    measured = [(candidate, _merit(candidate)) for candidate in candidates]
    known = [(candidate, merit) for candidate, merit in measured if merit is not None]
    quiet = [(candidate, merit) for candidate, merit in known if not candidate.alarms]
    if not known:
        return None
    best = max(merit for _, merit in quiet or known)
    chosen, merit = next((c, m) for c, m in quiet or known if m >= best - _CLOSE)
    told = [f"identity lift {chosen.identity_lift:.2f}"]
    if chosen.clip_t is not None and chosen.clip_t_floor is not None:
        told.append(f"CLIP-T {chosen.clip_t:.3f} (untaught {chosen.clip_t_floor:.3f})")
    why = f"{', '.join(told)}; merit {merit:.2f}, the best is {best:.2f}"
    if not quiet:
        why += "; every look raised an alarm"
    return Recommendation(chosen.update, why)


def _merit(candidate: CheckpointCandidate) -> float | None:
    if candidate.identity_lift is None:
        return None
    shares = [candidate.identity_lift]
    if candidate.clip_t is not None and candidate.clip_t_floor and candidate.clip_t_floor > 0:
        shares.append(candidate.clip_t / candidate.clip_t_floor)
    return harmonic_mean(shares)
