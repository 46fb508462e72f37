"""What scores look at: pictures, photos and the base model's pictures, as encoders saw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.core.manifests import Picture
from dreamloom.evaluation import copy_detection
from dreamloom.evaluation.encoders.base import Encoders, Extractor, PerceptualDistance
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.embed import Embeddings
from dreamloom.evaluation.metrics.measures import MEASURES, PIXELS, Measure, PictureRole


@dataclass(frozen=True)
class Evidence:
    """Everything that a score may look at.

    Args:
        pictures: The pictures, in the order in which they were looked at.
        prompts: For each picture, the text it is compared with; empty where it is unknown.
        roles: What each picture's prompt names.
        partners: For each picture, the place of its floor among the floor's pictures, or None.
        embeddings: What the encoders saw in the pictures.
        photos: What they saw in the photos.
        nearness: How closely each picture repeats each photo.
        copied: Whether each picture repeats a photo.
        below: What they saw in the floor's pictures; None without a floor.
        below_prompts: For each of the floor's pictures, the text it is compared with.
        below_roles: What each of the floor's prompts names; strangers, which stand behind the
            floor's own pictures, count as the class.
        below_units: The noise, or the stranger, behind each of the floor's pictures: pictures of
            one noise mostly show one person.
        encoders: The encoders.
        held_out: Of each photo, whether it was held out from training; nothing where nobody knows.
    """

    pictures: Sequence[Picture]
    prompts: Sequence[str]
    roles: Sequence[PictureRole]
    partners: Sequence[int | None]
    embeddings: Embeddings
    photos: Embeddings
    nearness: Float[Tensor, "images photos"]
    copied: Bool[np.ndarray, " images"]
    below: Embeddings | None
    below_prompts: Sequence[str]
    below_roles: Sequence[PictureRole]
    below_units: Sequence[str]
    encoders: Encoders
    held_out: Sequence[bool] = ()

    @cached_property
    def measures(self) -> list[Measure]:
        """The scores that there are with these encoders, measurable or not.

        Picturebook's world has few judges, and what it has no judge for is not a score of it; for
        photographs every score is listed, and those without an encoder say why.
        """
        if self.encoders.kind != "picturebook":
            return list(MEASURES)
        return [one for one in MEASURES if not isinstance(self.encoder_of(one), Missing)]

    def encoder_name(self, measure: Measure) -> str:
        """Name the encoder behind a score; picturebook's world may have another one for it."""
        is_drawn = self.encoders.kind == "picturebook" and measure.drawn_encoder
        return measure.drawn_encoder if is_drawn else measure.encoder

    def encoder_of(self, measure: Measure) -> Extractor | PerceptualDistance | Missing | None:
        """Give the encoder behind a score; None where the pixels themselves are looked at."""
        name = self.encoder_name(measure)
        if name == "perceptual":
            return self.encoders.perceptual
        return None if name == PIXELS else self.encoders.named()[name]

    def key(self, measure: Measure) -> str | None:
        """Name what a score was measured with, to the revision; None where it is missing."""
        encoder = self.encoder_of(measure)
        if encoder is None:
            return copy_detection.KEY
        return None if isinstance(encoder, Missing) else encoder.key

    @cached_property
    def texts(self) -> Float[Tensor, "prompts features"] | None:
        """Features of the different prompts; None where they are unknown."""
        known, clip = list(dict.fromkeys(self.prompts)), self.encoders.clip
        return None if isinstance(clip, Missing) or not all(known) else clip.embed_texts(known)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {prompt: place for place, prompt in enumerate(dict.fromkeys(self.prompts))}

    @property
    def own_text(self) -> list[int]:
        """For each picture, the row of its prompt among `texts`."""
        return [self._places[prompt] for prompt in self.prompts]

    @property
    def own_text_below(self) -> list[int]:
        """The same for the floor's pictures; one without a partner is never read."""
        return [self._places.get(prompt, 0) for prompt in self.below_prompts]

    @cached_property
    def cells(self) -> list[int]:
        """For each picture, the number of what it may be compared with for variety.

        That is what has its prompt and sampler.
        """
        cells = [
            (prompt, picture.scheduler, picture.steps)
            for prompt, picture in zip(self.prompts, self.pictures, strict=True)
        ]
        numbers = {cell: number for number, cell in enumerate(dict.fromkeys(cells))}
        return [numbers[cell] for cell in cells]

    @property
    def cells_below(self) -> list[int]:
        """The same for the floor's; what has no prompt of these is compared with nothing."""
        return [
            self._places.get(prompt, -1 - place) for place, prompt in enumerate(self.below_prompts)
        ]
