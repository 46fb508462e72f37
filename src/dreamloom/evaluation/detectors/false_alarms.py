"""How often each detector was wrong, on pictures of which it is known whether they are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dreamloom.evaluation.detectors.judges import DetectorName
from dreamloom.evaluation.detectors.landmarks import SourceKind
from dreamloom.evaluation.stats.intervals import Interval, wilson_interval


@dataclass(frozen=True)
class Tally:
    """How many of some pictures a detector flagged.

    Args:
        flagged: How many it flagged.
        n: How many it judged, 1 or more; those it abstained from are not among them.
        of: What they are, to stand behind the number.
    """

    flagged: int
    n: int
    of: str

    @property
    def rate(self) -> float:
        """The share that was flagged."""
        return self.flagged / self.n

    @property
    def interval(self) -> Interval | None:
        """Where the rate lies with 95 % confidence."""
        return wilson_interval(self.flagged, self.n)

    def tell(self) -> str:
        """Say it with its interval, because most of these numbers are small."""
        return f"{self.flagged} of {self.n} {self.of}{tell_interval(self.interval)}"


@dataclass(frozen=True)
class Trial:
    """What is known about a detector; None is not measured.

    Args:
        false_alarms: On pictures without its failure.
        found: On pictures that were given its failure on purpose.
    """

    false_alarms: Tally | None = None
    found: Tally | None = None


def tell_interval(interval: Interval | None) -> str:
    """Write an interval of a rate behind its number; nothing if there is none."""
    return "" if interval is None else f" ({interval[0]:.0%} to {interval[1]:.0%})"


_PEOPLE = "real photos of people"
MEASURED: Mapping[SourceKind, Mapping[DetectorName, Trial]] = {
    "photographs": {
        "eye_colours": Trial(
            Tally(0, 5, _PEOPLE), Tally(23, 24, "real photos with one iris recoloured")
        ),
        "eye_shape": Trial(
            Tally(0, 7, _PEOPLE), Tally(1, 41, "real photos with one iris enlarged or moved")
        ),
        "teeth": Trial(Tally(0, 3, _PEOPLE)),
        "extra_faces": Trial(
            Tally(1, 41, "real photos of people, objects and pets"),
            Tally(6, 9, "real photos set beside themselves"),
        ),
        "missing_face": Trial(
            Tally(0, 9, _PEOPLE), Tally(9, 9, "real photos with the face covered")
        ),
    },
    "drawings": {
        "eye_colours": Trial(
            Tally(1, 280, "drawings"), Tally(276, 276, "drawings with one iris recoloured")
        ),
        "eye_colour_of_photos": Trial(
            Tally(1, 165, "drawings of 60 persons"),
            Tally(167, 167, "drawings with both irises recoloured"),
        ),
    },
}
"""By source of landmarks and detector, from ``benchmarks/detector_false_alarms.py``; a detector
that is not listed is unvalidated. ``docs/detectors.md`` says what the pictures are."""
