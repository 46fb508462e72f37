"""Load the encoders of an evaluation: by name, from pinned weights, or say why they are missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from dreamloom.evaluation.encoders.base import (
    EncoderKind,
    Encoders,
    Extractor,
    FaceExtractor,
    Missing,
)
from dreamloom.evaluation.encoders.cache import Remembering, RememberingFaces, RememberingReader
from dreamloom.evaluation.encoders.catalogue import (
    CLIP_VIT_B_32,
    CSD,
    DINO_VIT_S_16,
    DINOV2_VIT_S_14,
    DLIB,
    LPIPS,
    SFACE,
    SSCD,
    YUNET,
    Pinned,
)
from dreamloom.evaluation.encoders.clip import ClipEncoder
from dreamloom.evaluation.encoders.copies import CopyEncoder
from dreamloom.evaluation.encoders.faces import (
    DlibFaceEncoder,
    FaceEncoder,
    create_detector,
    create_recogniser,
)
from dreamloom.evaluation.encoders.judges import PixelEncoder
from dreamloom.evaluation.encoders.perceptual import LpipsDistance
from dreamloom.evaluation.encoders.preprocessing import CLIP_PREPROCESSING, Preprocessing
from dreamloom.evaluation.encoders.store import Absent, find_kept
from dreamloom.evaluation.encoders.style import CsdEncoder
from dreamloom.evaluation.encoders.vit import DinoEncoder, Dinov2Encoder

Device: TypeAlias = torch.device | str
FaceModel: TypeAlias = Literal["sface", "dlib"]
_Made = TypeVar("_Made")


def load_encoders(
    kind: EncoderKind, device: Device = "cpu", faces: FaceModel = "sface"
) -> Encoders:
    """Load the encoders of one kind; those whose weights are not here are `Missing`.

    Each picture is looked at once in a process, whatever sets it appears in.

    Args:
        kind: ``picturebook`` for the embedded model's judges, ``standard`` for photographs.
        device: Where to compute; faces are found on the processor.
        faces: The face model of ``standard``.
    """
    return _picturebook(device) if kind == "picturebook" else _standard(device, faces)


def try_reading(model: Pinned, folder: Path) -> None:
    """Read a model once, as an evaluation would, to find what is wrong with it.

    A face model can only be tried where OpenCV is installed; elsewhere its hash must do.

    Raises:
        EvaluationError: If it cannot be read.
    """
    if model.extra:
        try:
            _READERS[model.name](folder, model.name, "cpu")
        except ModuleNotFoundError:
            return
    else:
        _READERS[model.name](folder, model.name, "cpu")


def _read_clip(folder: Path, name: str, device: Device) -> ClipEncoder:
    return ClipEncoder(folder, name, CLIP_PREPROCESSING, device)


def _read_dino(folder: Path, name: str, device: Device) -> DinoEncoder:
    return DinoEncoder(folder, name, device=device)


def _read_dinov2(folder: Path, name: str, device: Device) -> Dinov2Encoder:
    return Dinov2Encoder(folder, name, device=device)


def _read_copies(folder: Path, name: str, device: Device) -> CopyEncoder:
    return CopyEncoder(folder, name, device=device)


def _read_style(folder: Path, name: str, device: Device) -> CsdEncoder:
    return CsdEncoder(folder, name, device=device)


def _read_perceptual(folder: Path, name: str, device: Device) -> LpipsDistance:
    return LpipsDistance(folder, name, device=device)


_READERS: dict[str, Callable[[Path, str, Device], Any]] = {
    CLIP_VIT_B_32.name: _read_clip,
    DINO_VIT_S_16.name: _read_dino,
    DINOV2_VIT_S_14.name: _read_dinov2,
    SSCD.name: _read_copies,
    CSD.name: _read_style,
    LPIPS.name: _read_perceptual,
    YUNET.name: lambda folder, name, device: create_detector(folder / YUNET.files[0].name),
    SFACE.name: lambda folder, name, device: create_recogniser(folder / SFACE.files[0].name),
}


def _picturebook(device: Device) -> Encoders:
    from dreamloom.picturebook import judges

    others: dict[str, Any] = {
        name: Missing(f"picturebook's judges have no {what}")
        for name, what in (
            ("dino", "DINO"),
            ("dinov2", "DINOv2"),
            ("copies", "encoder of copies"),
            ("perceptual", "perceptual distance"),
        )
    }
    try:
        clip = ClipEncoder(judges.clip_folder(), judges.clip_key(), device=device)
        reader = judges.load_attribute_reader()
        look = Preprocessing(judges.PICTURE_PX, judges.PICTURE_PX, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        identity = PixelEncoder(judges.load_identity_encoder(), look)
        style = PixelEncoder(judges.load_style_encoder(), look)
    except FileNotFoundError:
        absent = Missing("picturebook's judges are not installed; install DreamLoom again")
        return Encoders("picturebook", identity=absent, clip=absent, style=absent, **others)
    return Encoders(
        kind="picturebook",
        identity=Remembering(identity),
        clip=RememberingReader(clip),
        style=Remembering(style),
        **others,
        familiar=lambda images: reader.is_familiar(look(images)),
        device=str(device),
    )


def _standard(device: Device, faces: FaceModel) -> Encoders:
    clip = _find(CLIP_VIT_B_32, _read_clip, device)
    return Encoders(
        kind="standard",
        identity=_remember_faces(_find_sface() if faces == "sface" else _find_dlib()),
        clip=clip if isinstance(clip, Missing) else RememberingReader(clip),
        dino=_remember(_find(DINO_VIT_S_16, _read_dino, device)),
        dinov2=_remember(_find(DINOV2_VIT_S_14, _read_dinov2, device)),
        style=_remember(_find(CSD, _read_style, device)),
        copies=_remember(_find(SSCD, _read_copies, device)),
        perceptual=_find(LPIPS, _read_perceptual, device),
        device=str(device),
    )


def _find(
    model: Pinned, read: Callable[[Path, str, Device], _Made], device: Device
) -> _Made | Missing:
    kept = find_kept(model)
    if isinstance(kept, Absent):
        return Missing(kept.reason)
    return read(kept.folder, kept.name, device)


def _find_sface() -> FaceEncoder | Missing:
    detector, recogniser = find_kept(YUNET), find_kept(SFACE)
    if isinstance(detector, Absent) or isinstance(recogniser, Absent):
        absent = [one for one in (detector, recogniser) if isinstance(one, Absent)]
        return Missing("; ".join(one.reason for one in absent))
    try:
        return FaceEncoder(
            detector.folder / YUNET.files[0].name,
            recogniser.folder / SFACE.files[0].name,
            f"{recogniser.name}+{detector.name}",
        )
    except ModuleNotFoundError:
        return Missing(
            "OpenCV is not installed; install it with 'pip install \"dreamloom[faces]\"'"
        )


def _find_dlib() -> DlibFaceEncoder | Missing:
    kept = find_kept(DLIB)
    if isinstance(kept, Absent):
        return Missing(kept.reason)
    return DlibFaceEncoder(kept.folder, kept.name)


def _remember(encoder: Extractor | Missing) -> Extractor | Missing:
    return encoder if isinstance(encoder, Missing) else Remembering(encoder)


def _remember_faces(encoder: FaceExtractor | Missing) -> Extractor | Missing:
    return encoder if isinstance(encoder, Missing) else RememberingFaces(encoder)
