"""Where a picture's faces are: eyes, irises, lids and mouths, from whoever finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float
from PIL import Image

Points: TypeAlias = Float[np.ndarray, "_ 2"]
"""Positions in the picture: x to the right and y down, in pixels from its top left corner."""

SourceKind: TypeAlias = Literal["photographs", "drawings"]


@dataclass(frozen=True, eq=False)
class Eye:
    """One eye.

    Args:
        centre: The middle of the iris.
        rim: Points on the iris's edge, in order around it, four or more; the right- and leftmost
            and the upper- and lowermost are among them.
        lids: The closed contour of the eye's opening, in order around it.
        blink: How far it is closed, 0 to 1; None if that is not known.
    """

    centre: Float[np.ndarray, " 2"]
    rim: Points
    lids: Points
    blink: float | None = None

    @property
    def radius_px(self) -> float:
        """The iris's radius: the mean distance of its rim from its centre."""
        return float(np.linalg.norm(self.rim - self.centre, axis=1).mean())


@dataclass(frozen=True, eq=False)
class Face:
    """One face; what a source cannot tell is None.

    Args:
        box: Left, top, right and bottom, in pixels.
        eyes: The eye further left in the picture, then the other.
        mouth: The closed contour of the lips' inner edge, in order around it.
        turn_degrees: How far the head is turned aside (yaw), raised (pitch) and tilted (roll);
            0 is a passport photo.
        unsteadiness: How far the irises' centres move when the picture is mirrored, in irises'
            radii: what a source is unsure of, it places elsewhere.
    """

    box: tuple[float, float, float, float]
    eyes: tuple[Eye, Eye] | None = None
    mouth: Points | None = None
    turn_degrees: tuple[float, float, float] | None = None
    unsteadiness: float | None = None

    @property
    def width_px(self) -> float:
        """The width of its box."""
        return self.box[2] - self.box[0]


@dataclass(frozen=True)
class FaceLandmarks:
    """What a source found in one picture.

    Args:
        size_px: The picture's height and width.
        faces: The faces, the widest first; empty if none was found.
    """

    size_px: tuple[int, int]
    faces: tuple[Face, ...]


@runtime_checkable
class FaceSource(Protocol):
    """Something that finds faces in pictures."""

    key: str
    """Which finder, with its version: only findings of equal keys may be compared."""
    kind: SourceKind
    least_iris_px: float
    """Irises of a smaller diameter tell nothing about their colour or shape."""
    cannot: Mapping[str, str]
    """Detectors that make no sense with it, by name, each with the reason."""

    def find(self, image: Image.Image) -> FaceLandmarks:
        """Find the faces of an upright RGB picture."""
        ...


def order_faces(faces: list[Face]) -> tuple[Face, ...]:
    """Put the widest face first; of equally wide ones the one further left."""
    return tuple(sorted(faces, key=lambda face: (-face.width_px, face.box[0])))
