"""The detectors: each looks at one picture for one kind of failure, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from dreamloom.evaluation.detectors.colour import Lab
from dreamloom.evaluation.detectors.eyes import (
    AHEAD,
    Abstention,
    EyePixels,
    distance_from,
    iris_difference,
    leave_one_out,
    measure_shape,
    middle_colour,
    read_iris,
)
from dreamloom.evaluation.detectors.landmarks import Eye, Face, FaceLandmarks
from dreamloom.evaluation.detectors.teeth import measure_teeth

DetectorName: TypeAlias = Literal[
    "eye_colours", "eye_colour_of_photos", "eye_shape", "teeth", "extra_faces", "missing_face"
]

AT_A_GLANCE = 10.0
"""From this CIEDE2000 (lightness halved) on, two irises are called different. Chosen beforehand
as what is seen at a glance, not fitted to photos."""
MOST_ELONGATED, MOST_UNEQUAL, MOST_DIVERGENT, MOST_OVERHANG = 1.5, 1.25, 0.1, 0.25
"""Eyes beyond one of these are called malformed; see `eyes.EyeShape`."""
MOST_UNSTEADY = 0.75
"""So are eyes whose irises are found elsewhere, in radii, when the picture is mirrored."""
MOST_CROWDED, MOST_LOPSIDED = 0.25, 0.35
BYSTANDER = 0.5
"""Faces less wide than this, by the widest, are taken for people in the background."""
LEAST_FACE = 0.15
"""Where no face is wanted, so are faces less wide than this share of the picture's shorter side."""
FEWEST_PHOTOS = 3

_MOST_TURNED_DEGREES = (25.0, 30.0, 45.0)
_MOST_CLOSED = 0.4


class Wanted(NamedTuple):
    """What a picture's prompt asks for; None where nobody said."""

    style: Literal["photo", "art"] | None
    face: Literal["yes", "partial", "no"] | None
    may_change: frozenset[str] | None


PHOTO = Wanted("photo", "yes", frozenset())
"""What a photo of the subject is held to."""


@dataclass(frozen=True, eq=False)
class FaceView:
    """One picture with what was found in it and what was wanted.

    Args:
        pixels: Upright, sRGB.
        found: Its faces.
        wanted: What the prompt asks for.
        least_iris_px: From the source of the landmarks.
    """

    pixels: EyePixels
    found: FaceLandmarks
    wanted: Wanted
    least_iris_px: float

    @classmethod
    def at(
        cls, image: Image.Image, found: FaceLandmarks, wanted: Wanted, iris_px: float
    ) -> FaceView:
        """Look at an RGB picture."""
        return cls(np.asarray(image), found, wanted, iris_px)

    @cached_property
    def irises(self) -> tuple[Lab, Lab] | Abstention:
        """The colours of the main face's irises, or why they cannot be told."""
        eyes = usable_eyes(self)
        if isinstance(eyes, Abstention):
            return eyes
        first, second = (read_iris(self.pixels, eye) for eye in eyes)
        if isinstance(first, Abstention):
            return first
        return second if isinstance(second, Abstention) else (first, second)


@dataclass(frozen=True)
class Reference:
    """What the subject's photos say about its eyes.

    Args:
        colour: The middle of the photos' eye colours; None with why not, if it cannot be told.
        reason: Why there is no colour.
        threshold: A picture's eyes further away than this are flagged.
        pair_threshold: Eyes of one picture that differ more than this are flagged.
    """

    colour: Lab | None
    reason: str
    threshold: float
    pair_threshold: float


class Finding(NamedTuple):
    """What a detector found."""

    flagged: bool
    value: float
    """What was measured, in the detector's own unit."""


EyeVerdict: TypeAlias = Finding | Abstention


class Detector(NamedTuple):
    """A kind of failure and how it is looked for."""

    name: DetectorName
    label: str
    judge: Callable[[FaceView, Reference], EyeVerdict]
    experimental: bool = False


def learn_reference(views: Sequence[FaceView]) -> Reference:
    """Learn the subject's eye colour from its photos.

    The threshold is what leaving out each photo in turn would have needed, and no less than
    `AT_A_GLANCE`. Eyes that differ in the photos themselves may differ in pictures as much.

    Args:
        views: At the photos, wanted as `PHOTO`.
    """
    pairs = [view.irises for view in views]
    told = [pair for pair in pairs if not isinstance(pair, Abstention)]
    pair_threshold = max([AT_A_GLANCE, *(iris_difference(*pair) for pair in told)])
    if len(told) < FEWEST_PHOTOS:
        reason = f"the eye colour can be told in {len(told)} of {len(views)} photos, not in 3"
        return Reference(None, reason, AT_A_GLANCE, pair_threshold)
    apart = leave_one_out(told)
    if max(apart) > 2 * AT_A_GLANCE:
        return Reference(
            None, "the photos' own eye colours scatter too much", AT_A_GLANCE, pair_threshold
        )
    colour = middle_colour([iris for pair in told for iris in pair])
    return Reference(colour, "", max(AT_A_GLANCE, *apart), pair_threshold)


def usable_face(view: FaceView) -> Face | Abstention:
    """Give the main face of what should be a photo that shows one, or say why there is none."""
    reason = _no_whole_face_wanted(view.wanted)
    if not reason and not view.found.faces:
        reason = "no face was found"
    if reason:
        return Abstention(reason)
    face = view.found.faces[0]
    if face.turn_degrees is None:
        return Abstention("it is not known how the head is turned")
    turns = zip(face.turn_degrees, _MOST_TURNED_DEGREES, strict=True)
    return (
        Abstention("the head is turned away") if any(abs(t) > most for t, most in turns) else face
    )


def _no_whole_face_wanted(wanted: Wanted) -> str:
    """Say why a picture need not show a whole face as photos do; empty if it must."""
    if wanted.style is None or wanted.face is None:
        return "it is not known what the prompt asks for"
    if wanted.style != "photo":
        return "the prompt asks for art"
    return "" if wanted.face == "yes" else "the prompt asks for no whole face"


def usable_eyes(view: FaceView) -> tuple[Eye, Eye] | Abstention:
    """Give the main face's eyes where they can be judged, or say why they cannot."""
    face = usable_face(view)
    if isinstance(face, Abstention):
        return face
    if face.eyes is None:
        return Abstention("no eyes were found")
    reason = ""
    changes = view.wanted.may_change
    if changes is None:
        reason = "it is not known what the prompt may change"
    elif forbidding := [change for change in ("eyes", "glasses") if change in changes]:
        reason = f"the prompt may change {forbidding[0]}"
    elif any((eye.blink or 0.0) >= _MOST_CLOSED for eye in face.eyes):
        reason = "an eye is closed"
    elif min(2 * eye.radius_px for eye in face.eyes) < view.least_iris_px:
        reason = f"an iris is less than {view.least_iris_px:.0f} px wide"
    return Abstention(reason) if reason else face.eyes


def judge_eye_colours(view: FaceView, reference: Reference) -> EyeVerdict:
    """Flag eyes of two colours; the value is their difference."""
    if isinstance(view.irises, Abstention):
        return view.irises
    difference = iris_difference(*view.irises)
    return Finding(difference > reference.pair_threshold, difference)


def judge_eye_colour_of_photos(view: FaceView, reference: Reference) -> EyeVerdict:
    """Flag eyes of another colour than the photos'; the value is the difference."""
    if reference.colour is None:
        return Abstention(reference.reason)
    if isinstance(view.irises, Abstention):
        return view.irises
    # The eye that is further off decides: the seed's complaint was one green eye.
    difference = distance_from(reference.colour, view.irises)
    return Finding(difference > reference.threshold, difference)


def judge_eye_shape(view: FaceView, _: Reference) -> EyeVerdict:
    """Flag malformed eyes; the value is the worst measure by its limit, so 1 is the limit."""
    eyes = usable_eyes(view)
    if isinstance(eyes, Abstention):
        return eyes
    shape = measure_shape(*eyes)
    excess = max(
        (shape.elongation - 1) / (MOST_ELONGATED - 1),
        (shape.size_ratio - 1) / (MOST_UNEQUAL - 1),
        abs(shape.divergence - AHEAD) / MOST_DIVERGENT,
        shape.overhang / MOST_OVERHANG,
        (view.found.faces[0].unsteadiness or 0.0) / MOST_UNSTEADY,
    )
    return Finding(excess > 1, excess)


def judge_teeth(view: FaceView, _: Reference) -> EyeVerdict:
    """Flag teeth in three rows or on one side; the value is the worse measure by its limit."""
    face = usable_face(view)
    if isinstance(face, Abstention):
        return face
    if face.mouth is None:
        return Abstention("no mouth was found")
    teeth = measure_teeth(view.pixels, face.mouth)
    if isinstance(teeth, Abstention):
        return teeth
    excess = max(teeth.crowded / MOST_CROWDED, teeth.lopsided / MOST_LOPSIDED)
    return Finding(excess > 1, excess)


def judge_extra_faces(view: FaceView, _: Reference) -> EyeVerdict:
    """Flag more faces than wanted, bystanders aside; the value is how many there are."""
    if view.wanted.style is None or view.wanted.face is None:
        return Abstention("it is not known what the prompt asks for")
    if view.wanted.style != "photo":
        return Abstention("the prompt asks for art")
    faces = view.found.faces
    least_px = LEAST_FACE * min(view.found.size_px)
    if view.wanted.face != "no":
        least_px = BYSTANDER * max((face.width_px for face in faces), default=0.0)
    near = [face for face in faces if face.width_px >= least_px]
    return Finding(len(near) > (view.wanted.face != "no"), float(len(near)))


def judge_missing_face(view: FaceView, _: Reference) -> EyeVerdict:
    """Flag a picture that shows no face though it should; the value is how many there are."""
    reason = _no_whole_face_wanted(view.wanted)
    if reason:
        return Abstention(reason)
    return Finding(not view.found.faces, float(len(view.found.faces)))


DETECTORS = (
    Detector("eye_colours", "Eyes of two colours", judge_eye_colours),
    Detector("eye_colour_of_photos", "Eyes not of the photos' colour", judge_eye_colour_of_photos),
    Detector("eye_shape", "Malformed eyes", judge_eye_shape, experimental=True),
    Detector("teeth", "Malformed teeth", judge_teeth, experimental=True),
    Detector("extra_faces", "Extra faces", judge_extra_faces),
    Detector("missing_face", "Missing face", judge_missing_face),
)
"""In the order in which they are shown."""
