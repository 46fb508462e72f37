"""What an encoder is: a picture to a vector, with a key that says which encoder it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dreamloom.evaluation.encoders.face_boxes import FaceBox, FacePoint
from dreamloom.evaluation.encoders.store import Missing

EncoderKind: TypeAlias = Literal["picturebook", "standard"]


@runtime_checkable
class Extractor(Protocol):
    """Something that looks at pictures.

    Ours also say by ``may_miss`` whether they can find nothing in a picture, whose row is then NaN
    throughout; one that does not say so finds something in every picture.
    """

    key: str
    """Encoder, revision and preprocessing: only scores of equal keys may be compared."""

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors on the CPU, in float32."""
        ...


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """Something that looks at pictures and reads prompts."""

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts features"]:
        """Turn prompts into unit vectors; what is too long is cut off at the end."""
        ...

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """List the texts that `embed_texts` cuts off."""
        ...


FaceStatus: TypeAlias = Literal["scored", "no_face", "too_small"]


@dataclass(frozen=True)
class FaceReading:
    """What was found of a face in one picture.

    Args:
        status: ``scored`` if the face has features; ``too_small`` if it was found, but has too few
            pixels to be told from another; ``no_face`` if there is none.
        count: Faces in the picture; the others are smaller than the one described here.
        box: Left, top, width and height of the face in the picture's pixels; may reach beyond it.
        landmarks: The picture's points of the two eyes (the one further left in the picture
            first), the tip of the nose and the two corners of the mouth, in pixels; None where
            the detector does not give them all.
        score: How sure the detector is; comparable within one detector only.
        features: The face as a unit vector. It is biometric data: it stays in memory.
    """

    status: FaceStatus
    count: int
    box: FaceBox | None = None
    landmarks: tuple[FacePoint, ...] | None = None
    score: float | None = None
    features: Float[Tensor, " features"] | None = None


@runtime_checkable
class FaceExtractor(Extractor, Protocol):
    """Something that finds the largest face of a picture and knows whose it is."""

    width: int
    """Features of a face."""
    may_miss: bool
    """True: there may be nobody in a picture."""

    def find(self, images: Sequence[Image.Image]) -> list[FaceReading]:
        """Find the largest face in each picture."""
        ...


@runtime_checkable
class PerceptualDistance(Protocol):
    """Something that says how different two pictures look."""

    key: str

    def distances(self, images: Sequence[Image.Image]) -> Float[Tensor, "images images"]:
        """Compare each picture with each: 0 for the same picture, symmetric, in float32."""
        ...


@runtime_checkable
class PixelJudge(Protocol):
    """What picturebook's identity encoder offers."""

    key: str

    def embed(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Turn pixels in [0, 1] into unit vectors."""
        ...


Familiarity: TypeAlias = Callable[[Sequence[Image.Image]], list[bool]]
"""Says for each picture whether it lies inside the world that the encoders know."""

_UNASKED = Missing("it was not asked for")


@dataclass(frozen=True)
class Encoders:
    """The encoders of one evaluation.

    Args:
        kind: ``picturebook`` for the embedded model's judges, ``standard`` for photographs.
        identity: Knows who is shown.
        clip: Knows what is shown, and reads prompts.
        dino: Knows how it looks in detail, as in the DreamBooth paper.
        dinov2: The same by a later and stronger encoder.
        style: Knows in which style it is drawn.
        copies: Knows a picture again after cropping, scaling and change of colours.
        perceptual: Says how different two pictures look.
        familiar: Says which pictures the encoders know; None if they know every kind.
        device: Where they compute.
    """

    kind: EncoderKind
    identity: Extractor | Missing
    clip: TextExtractor | Missing
    dino: Extractor | Missing
    dinov2: Extractor | Missing = _UNASKED
    style: Extractor | Missing = _UNASKED
    copies: Extractor | Missing = _UNASKED
    perceptual: PerceptualDistance | Missing = _UNASKED
    familiar: Familiarity | None = None
    device: str = "cpu"

    def named(self) -> dict[str, Extractor | Missing]:
        """The encoders that give vectors, by the names that measures use."""
        return {
            "identity": self.identity,
            "clip": self.clip,
            "dino": self.dino,
            "dinov2": self.dinov2,
            "style": self.style,
            "copies": self.copies,
        }

    def keys(self) -> dict[str, str]:
        """The key of each encoder, or why it is missing: what a result depends on."""
        return {
            name: f"missing: {encoder.reason}" if isinstance(encoder, Missing) else encoder.key
            for name, encoder in {**self.named(), "perceptual": self.perceptual}.items()
        }
