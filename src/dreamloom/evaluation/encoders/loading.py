"""Load the encoders of an evaluation: by name, from pinned weights, or say why they are missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from dreamloom.evaluation.encoders.base import EncoderKind, Encoders
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
from dreamloom.evaluation.encoders.computing import PixelEncoder
from dreamloom.evaluation.encoders.copies import CopyEncoder
from dreamloom.evaluation.encoders.face_boxes import YunetDetector
from dreamloom.evaluation.encoders.faces import (
    DlibFaceEncoder,
    FaceEncoder,
    create_recogniser,
)
from dreamloom.evaluation.encoders.perceptual import LpipsDistance
from dreamloom.evaluation.encoders.preprocessing import CLIP_PREPROCESSING, Preprocessing
from dreamloom.evaluation.encoders.store import NO_OPENCV, Missing, find_kept
from dreamloom.evaluation.encoders.style import CsdEncoder
from dreamloom.evaluation.encoders.vit import DinoEncoder, Dinov2Encoder

Device: TypeAlias = torch.device | str
FaceModel: TypeAlias = Literal["sface", "dlib"]


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
    try:
        _READERS[model.name](folder, model.name)
    except ModuleNotFoundError:
        if not model.extra:
            raise


_READERS: dict[str, Callable[..., Any]] = {
    CLIP_VIT_B_32.name: partial(ClipEncoder, preprocessing=CLIP_PREPROCESSING),
    DINO_VIT_S_16.name: DinoEncoder,
    DINOV2_VIT_S_14.name: Dinov2Encoder,
    SSCD.name: CopyEncoder,
    CSD.name: CsdEncoder,
    LPIPS.name: LpipsDistance,
    YUNET.name: lambda folder, name: YunetDetector(folder / YUNET.files[0].name),
    SFACE.name: lambda folder, name: create_recogniser(folder / SFACE.files[0].name),
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
    def find(model: Pinned, remember: Callable[[Any], Any] = Remembering) -> Any:
        kept = find_kept(model)
        if isinstance(kept, Missing):
            return kept
        return remember(_READERS[model.name](kept.folder, kept.name, device=device))

    identity = _find_sface() if faces == "sface" else _find_dlib()
    return Encoders(
        kind="standard",
        identity=identity if isinstance(identity, Missing) else RememberingFaces(identity),
        clip=find(CLIP_VIT_B_32, RememberingReader),
        dino=find(DINO_VIT_S_16),
        dinov2=find(DINOV2_VIT_S_14),
        style=find(CSD),
        copies=find(SSCD),
        perceptual=find(LPIPS, lambda distance: distance),
        device=str(device),
    )


def _find_sface() -> FaceEncoder | Missing:
    detector, recogniser = find_kept(YUNET), find_kept(SFACE)
    if isinstance(detector, Missing) or isinstance(recogniser, Missing):
        absent = [one for one in (detector, recogniser) if isinstance(one, Missing)]
        return Missing("; ".join(one.reason for one in absent))
    try:
        return FaceEncoder(
            detector.folder / YUNET.files[0].name,
            recogniser.folder / SFACE.files[0].name,
            f"{recogniser.name}+{detector.name}",
        )
    except ModuleNotFoundError:
        return Missing(NO_OPENCV)


def _find_dlib() -> DlibFaceEncoder | Missing:
    kept = find_kept(DLIB)
    return kept if isinstance(kept, Missing) else DlibFaceEncoder(kept.folder, kept.name)
