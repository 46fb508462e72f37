"""Pictures and prompts to vectors: the pinned encoders, and how they are fed.

A score depends on its encoder, the encoder's revision and the preprocessing; an encoder's ``key``
names all three, and only scores of one key may be compared. Encoders see PIL pictures in 8-bit
RGB and nothing else, so that no picture can arrive at a wrong scale. Evaluations download nothing:
an encoder whose weights are not on this machine is `Missing`, with the reason, and no other takes
its place.

The names below are loaded on first use: listing models costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreamloom.evaluation.encoders.base import (
        EncoderKind,
        Encoders,
        Extractor,
        FaceExtractor,
        FaceReading,
        Familiarity,
        Missing,
        PerceptualDistance,
        PixelJudge,
        TextExtractor,
    )
    from dreamloom.evaluation.encoders.cache import Remembering, forget_pictures, hash_picture
    from dreamloom.evaluation.encoders.catalogue import CLIP_VIT_B_32, DINO_VIT_S_16, MODELS, Pinned
    from dreamloom.evaluation.encoders.clip import ClipEncoder
    from dreamloom.evaluation.encoders.copies import CopyEncoder
    from dreamloom.evaluation.encoders.faces import SFACE_THRESHOLD, DlibFaceEncoder, FaceEncoder
    from dreamloom.evaluation.encoders.fetching import fetch_model
    from dreamloom.evaluation.encoders.judges import PixelEncoder
    from dreamloom.evaluation.encoders.loading import load_encoders
    from dreamloom.evaluation.encoders.perceptual import LpipsDistance
    from dreamloom.evaluation.encoders.preprocessing import (
        CLIP_PREPROCESSING,
        DINO_PREPROCESSING,
        DINOV2_PREPROCESSING,
        Preprocessing,
    )
    from dreamloom.evaluation.encoders.store import list_models
    from dreamloom.evaluation.encoders.style import StyleEncoder
    from dreamloom.evaluation.encoders.vit import DinoEncoder, Dinov2Encoder

_ROOMS = {
    "base": (
        *("EncoderKind", "Encoders", "Extractor", "FaceExtractor", "FaceReading", "Familiarity"),
        *("Missing", "PerceptualDistance", "PixelJudge", "TextExtractor"),
    ),
    "cache": ("Remembering", "forget_pictures", "hash_picture"),
    "catalogue": ("CLIP_VIT_B_32", "DINO_VIT_S_16", "MODELS", "Pinned"),
    "clip": ("ClipEncoder",),
    "copies": ("CopyEncoder",),
    "faces": ("SFACE_THRESHOLD", "DlibFaceEncoder", "FaceEncoder"),
    "fetching": ("fetch_model",),
    "judges": ("PixelEncoder",),
    "loading": ("load_encoders",),
    "perceptual": ("LpipsDistance",),
    "preprocessing": (
        *("CLIP_PREPROCESSING", "DINO_PREPROCESSING", "DINOV2_PREPROCESSING", "Preprocessing"),
    ),
    "store": ("list_models",),
    "style": ("StyleEncoder",),
    "vit": ("DinoEncoder", "Dinov2Encoder"),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order of the rooms)
    "EncoderKind",
    "Encoders",
    "Extractor",
    "FaceExtractor",
    "FaceReading",
    "Familiarity",
    "Missing",
    "PerceptualDistance",
    "PixelJudge",
    "TextExtractor",
    "Remembering",
    "forget_pictures",
    "hash_picture",
    "CLIP_VIT_B_32",
    "DINO_VIT_S_16",
    "MODELS",
    "Pinned",
    "ClipEncoder",
    "CopyEncoder",
    "SFACE_THRESHOLD",
    "DlibFaceEncoder",
    "FaceEncoder",
    "fetch_model",
    "PixelEncoder",
    "load_encoders",
    "LpipsDistance",
    "CLIP_PREPROCESSING",
    "DINO_PREPROCESSING",
    "DINOV2_PREPROCESSING",
    "Preprocessing",
    "list_models",
    "StyleEncoder",
    "DinoEncoder",
    "Dinov2Encoder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dreamloom.evaluation.encoders' has no attribute {name!r}")
    return getattr(import_module(f"dreamloom.evaluation.encoders.{_HOMES[name]}"), name)
