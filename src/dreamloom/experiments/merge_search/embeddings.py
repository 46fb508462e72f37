"""Embeddings of drawn pictures in plain numbers: likeness to photos, style, prompt; copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dreamloom.core.errors import EvaluationError
from dreamloom.core.manifests import ImageSet, PhotoSet
from dreamloom.evaluation.copy_detection import correlate_layouts, find_copies
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.embed import Embeddings, embed_images
from dreamloom.evaluation.metrics.similarity import cosines
from dreamloom.evaluation.scoring import replace_subject


class MeasuredImage(BaseModel):
    """One picture's own numbers. What could not be told is None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: tuple[float, ...] | None
    """Likeness to each photo of the subject."""
    style: tuple[float, ...] | None
    """Likeness to each picture in the style; to the style's adapter's drawings as one mean."""
    prompt: float | None
    """Likeness to its own prompt."""
    others: float | None
    """Mean likeness to the other prompts that are drawn with it."""
    copy_photo: float
    """The highest correlation of its layout with any cut of any photo."""
    copy_style: float | None
    """The same with the pictures in the style."""
    content_style: float | None = None
    """Mean likeness to the pictures in the style by DINO, which sees what is shown more than how;
    None without that encoder, or without such pictures."""
    copies_photo: bool
    """Whether it repeats a photo, and so earns no credit for likeness."""
    copies_style: bool


@dataclass(frozen=True)
class References:
    """What pictures are compared with.

    Args:
        photos: The subject's photos, prepared.
        style: Pictures in the style, prepared; None takes what its adapter drew.
        drawn: What the style's adapter drew of the search's prompts; None where ``style`` is given.
        prompts: Lists of prompts that are drawn together: those of the search, those held out.
        phrase: The subject in prompts.
        class_noun: What stands for it where prompts are read.
    """

    photos: PhotoSet
    style: PhotoSet | None
    drawn: ImageSet | None
    prompts: tuple[tuple[str, ...], ...]
    phrase: str
    class_noun: str


class PictureJudge:
    """Looks at pictures; the references are looked at once.

    Raises:
        EvaluationError: If there is no encoder of identity or of style, or no photo shows a face.
    """

    def __init__(self, encoders: Encoders, references: References) -> None:
        self.encoders = encoders
        require_encoders(encoders)
        self._references = references
        self._photos = embed_images(references.photos.paths(), encoders, views=True)
        self._known = _select(self._photos, "identity")
        if len(self._known) == 0:
            raise EvaluationError(
                "No photo shows a face that can be measured.", "Add photos of the subject's face."
            )
        style = references.style or references.drawn
        assert style is not None
        self._style = embed_images(style.paths(), encoders, views=references.style is not None)
        self._texts: dict[str, Float[Tensor, " features"]] = {}
        if not isinstance(encoders.clip, Missing):
            prompts = list(dict.fromkeys(text for some in references.prompts for text in some))
            words = references.phrase, references.class_noun
            features = encoders.clip.embed_texts([replace_subject(t, *words) for t in prompts])
            self._texts = dict(zip(prompts, features, strict=True))

    def measured(self, images: ImageSet) -> list[MeasuredImage]:
        """Look at drawn pictures, in their order."""
        seen = embed_images(images.paths(), self.encoders)
        prompts = [picture.prompt for picture in images.pictures]
        identity = _compare(seen, "identity", self._known)
        style = self._compare_style(seen, prompts)
        photo = correlate_layouts(seen.layouts, self._photos.views)
        repeats_photo = find_copies(photo, _among(self._photos))
        repeats_style, style_copy = torch.zeros(len(prompts), dtype=torch.bool), None
        if self._style.views:
            style_copy = correlate_layouts(seen.layouts, self._style.views)
            repeats_style = find_copies(style_copy, _among(self._style))
        # How much of what the pictures in the style show has come along with it.
        shown: list[tuple[float, ...] | None] = [None] * len(prompts)
        if self._references.style is not None and "dino" in seen.features:
            shown = _compare(seen, "dino", _select(self._style, "dino"))
        measured_images = []
        for row, prompt in enumerate(prompts):
            own, others = self._read_picture(seen, row, prompt)
            measured_images.append(
                MeasuredImage(
                    identity=identity[row],
                    style=style[row],
                    prompt=own,
                    others=others,
                    copy_photo=float(photo[row].max()),
                    copy_style=None if style_copy is None else float(style_copy[row].max()),
                    content_style=mean_of(shown[row] or ()),
                    copies_photo=bool(repeats_photo[row]),
                    copies_style=bool(repeats_style[row]),
                )
            )
        return measured_images

    def _compare_style(
        self, seen: Embeddings, prompts: Sequence[str]
    ) -> list[tuple[float, ...] | None]:
        """Compare with pictures in the style, or with drawings of other prompts than its own.

        Who is compared with the style adapter's drawing of its own prompt and seed gains most by
        drawing the very same picture, and nobody wants that of a merge.
        """
        similar = _compare(seen, "style", self._style.features["style"])
        drawn = self._references.drawn
        if drawn is None:
            return similar
        texts = [picture.prompt for picture in drawn.pictures]
        means: list[tuple[float, ...] | None] = []
        for row, prompt in zip(similar, prompts, strict=True):
            apart = (
                [] if row is None else [v for v, t in zip(row, texts, strict=True) if t != prompt]
            )
            means.append((sum(apart) / len(apart),) if apart else None)
        return means

    def _read_picture(
        self, seen: Embeddings, row: int, prompt: str
    ) -> tuple[float | None, float | None]:
        """Say how well a picture fits its own prompt, and the others of its list."""
        if prompt not in self._texts or not _usable(seen, "clip")[row]:
            return None, None
        some = next(texts for texts in self._references.prompts if prompt in texts)
        others = [text for text in dict.fromkeys(some) if text != prompt]
        texts = torch.stack([self._texts[text] for text in (prompt, *others)])
        found = cosines(seen.features["clip"][row : row + 1], texts)[0].tolist()
        return found[0], sum(found[1:]) / len(others) if others else None


def require_encoders(encoders: Encoders) -> None:
    """Refuse to search without the encoders of identity and of style.

    Raises:
        EvaluationError: If one of them is not on this machine.
    """
    for name, what in (("identity", "who is shown"), ("style", "the style")):
        encoder = encoders.named()[name]
        if isinstance(encoder, Missing):
            raise EvaluationError(
                f"Nothing here can tell {what}: {encoder.reason}.",
                "'dreamloom models list' shows the encoders and how to get them.",
            )


def _usable(seen: Embeddings, name: str) -> list[bool]:
    features = seen.features[name]
    usable: list[bool] = (torch.isfinite(features).all(dim=1) & (features.norm(dim=1) > 0)).tolist()
    return usable


def _select(seen: Embeddings, name: str) -> Float[Tensor, "pictures features"]:
    return seen.features[name][torch.tensor(_usable(seen, name), dtype=torch.bool)]


def _compare(
    seen: Embeddings, name: str, references: Float[Tensor, "references features"]
) -> list[tuple[float, ...] | None]:
    """Compare each picture with each reference; None where nobody was found."""
    found = iter(cosines(_select(seen, name), references).tolist())
    return [tuple(next(found)) if usable else None for usable in _usable(seen, name)]


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of what was measured; None where nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _among(seen: Embeddings) -> Float[Tensor, "pictures pictures"]:
    return correlate_layouts(seen.layouts, seen.views)
