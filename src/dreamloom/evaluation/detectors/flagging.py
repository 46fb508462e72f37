"""Detectors over a set of pictures: how many were flagged, and how many could not be judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dreamloom.data.image_io import open_upright
from dreamloom.evaluation.detectors.eyes import Abstention
from dreamloom.evaluation.detectors.false_alarms import MEASURED, Trial, tell_interval
from dreamloom.evaluation.detectors.judges import (
    DETECTORS,
    PHOTO,
    Detector,
    DetectorName,
    EyeVerdict,
    FaceView,
    Finding,
    Wanted,
    learn_reference,
)
from dreamloom.evaluation.detectors.landmarks import FaceSource
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.stats.intervals import Interval, wilson_interval


class Shown(NamedTuple):
    """A picture to be looked at, and what its prompt asks for."""

    file: str
    """Its name, by which it is listed; no two share one."""
    path: Path
    wanted: Wanted


@dataclass(frozen=True)
class Flagging:
    """What one detector found in a set of pictures.

    Args:
        detector: Its name.
        label: Its name as a reader meets it.
        n: How many pictures there were.
        abstained: How many could not be judged, by reason; they are neither good nor bad.
        flagged: The files that were flagged, in the pictures' order.
        values: What was measured, by file, of all that were judged.
        trial: How often the detector itself is wrong, as far as that is known.
        experimental: Whether it is an experiment, which nothing should be concluded from.
        missing: Why nothing was measured at all; empty if something was.
    """

    detector: DetectorName
    label: str
    n: int
    abstained: Mapping[str, int]
    flagged: tuple[str, ...]
    values: Mapping[str, float]
    trial: Trial
    experimental: bool = False
    missing: str = ""

    @property
    def judged(self) -> int:
        """How many pictures could be judged."""
        return len(self.values)

    @property
    def rate(self) -> float | None:
        """The share of the judged pictures that was flagged; None if none could be judged."""
        return len(self.flagged) / self.judged if self.judged else None

    @property
    def interval(self) -> Interval | None:
        """Where the rate lies with 95 % confidence; None if none could be judged."""
        return wilson_interval(len(self.flagged), self.judged)

    def tell(self) -> str:
        """Say it in one line, never without the detector's own false alarms."""
        if self.missing:
            return f"not measured: {self.missing}"
        parts = [f"{len(self.flagged)} of {self.judged} flagged{tell_interval(self.interval)}"]
        alarms, found = self.trial.false_alarms, self.trial.found
        parts.append(f"false alarms: {alarms.tell()}" if alarms else "unvalidated")
        if found:
            parts.append(f"finds {found.tell()}")
        if self.abstained:
            reasons = ", ".join(f"{count} because {why}" for why, count in self.abstained.items())
            parts.append(f"not judged: {reasons}")
        return ("experimental; " if self.experimental else "") + "; ".join(parts)


def flag_pictures(
    pictures: Sequence[Shown],
    photos: Sequence[Path],
    source: FaceSource | Missing,
    *,
    of_person: bool = True,
    experimental: bool = False,
    observe: Callable[[int, int], None] | None = None,
) -> tuple[Flagging, ...]:
    """Look for every kind of failure in a set of pictures.

    A picture that a detector cannot judge counts as abstained, with the reason; a rate is over the
    pictures that could be judged. What is flagged is to be looked at, not to be thrown away: see
    each detector's false alarms.

    Args:
        pictures: The pictures; their files are read once each.
        photos: Photos of the subject, for its eye colour.
        source: Who finds faces; if it is missing, nothing is measured.
        of_person: Whether the subject is a person; of other subjects only extra faces are looked
            for.
        experimental: Whether to look for what detectors are not known to find, too.
        observe: Told how many pictures are done, of how many.

    Returns:
        One result for each detector that was asked, in the order of `DETECTORS`.

    Raises:
        PhotoError: If a file cannot be read.
    """
    asked = [one for one in DETECTORS if experimental or not one.experimental]
    if isinstance(source, Missing):
        return tuple(_miss(detector, len(pictures), source.reason) for detector in asked)
    cannot = dict(source.cannot)
    if not of_person:
        people = [one.name for one in DETECTORS if one.name != "extra_faces"]
        cannot |= dict.fromkeys(people, "the subject is no person")
    usable = [detector for detector in asked if detector.name not in cannot]
    verdicts: dict[DetectorName, dict[str, EyeVerdict]] = {one.name: {} for one in usable}
    needs_photos = of_person and any(one.name.startswith("eye_colour") for one in usable)
    reference = learn_reference(
        list(_look_at([Shown(path.name, path, PHOTO) for path in photos], source))
        if needs_photos
        else []
    )
    for done, (shown, view) in enumerate(
        zip(pictures, _look_at(pictures, source), strict=True), start=1
    ):
        for detector in usable:
            verdicts[detector.name][shown.file] = detector.judge(view, reference)
        if observe is not None:
            observe(done, len(pictures))
    return tuple(
        _miss(detector, len(pictures), cannot[detector.name])
        if detector.name in cannot
        else _sum_up(detector, verdicts[detector.name], MEASURED.get(source.kind, {}))
        for detector in asked
    )


def _look_at(pictures: Sequence[Shown], source: FaceSource) -> Iterator[FaceView]:
    for shown in pictures:
        image = open_upright(shown.path)
        yield FaceView.at(image, source.find(image), shown.wanted, source.least_iris_px)


def _miss(detector: Detector, n: int, reason: str) -> Flagging:
    return Flagging(
        *(detector.name, detector.label, n, {}, (), {}, Trial()), detector.experimental, reason
    )


def _sum_up(
    detector: Detector,
    verdicts: Mapping[str, EyeVerdict],
    measured: Mapping[DetectorName, Trial],
) -> Flagging:
    reasons = Counter(one.reason for one in verdicts.values() if isinstance(one, Abstention))
    findings = {file: one for file, one in verdicts.items() if isinstance(one, Finding)}
    return Flagging(
        detector=detector.name,
        label=detector.label,
        n=len(verdicts),
        abstained=dict(reasons.most_common()),
        flagged=tuple(file for file, one in findings.items() if one.flagged),
        values={file: one.value for file, one in findings.items()},
        trial=measured.get(detector.name, Trial()),
        experimental=detector.experimental,
    )
