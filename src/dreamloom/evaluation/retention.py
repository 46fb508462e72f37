"""What a merge keeps of its parts: the subject of one adapter, the style of the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dreamloom.core.errors import EvaluationError
from dreamloom.core.manifests import ImageSet, PhotoSet
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.embed import embed_images
from dreamloom.evaluation.metrics.per_image import Array
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.metrics.similarity import subject_fidelity
from dreamloom.evaluation.scoring import EvaluationOptions
from dreamloom.evaluation.stats import intervals
from dreamloom.evaluation.stats.intervals import Draws
from dreamloom.evaluation.stats.means import harmonic_mean


class Retention(BaseModel):
    """How much of each part a merge has kept: 0 for nothing, 1 for what the part alone does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: Score
    """From the base model (0) to the subject's adapter alone (1)."""
    style: Score
    """From the subject's adapter alone (0) to the style's adapter alone (1)."""
    both: float | None = None
    """Their harmonic mean, each cut to between 0 and 1: neither makes up for the other."""
    style_reference: str
    """What the style is measured against."""


@dataclass(frozen=True)
class MergeSets:
    """The same prompts and seeds, drawn in four ways.

    Args:
        base: By the base model alone.
        subject: With the subject's adapter.
        style: With the style's adapter.
        merged: With both, merged.
    """

    base: ImageSet
    subject: ImageSet
    style: ImageSet
    merged: ImageSet

    def all(self) -> tuple[ImageSet, ImageSet, ImageSet, ImageSet]:
        """The sets in the order in which they are told."""
        return self.base, self.subject, self.style, self.merged


def evaluate_merge(
    sets: MergeSets,
    photos: PhotoSet,
    style_pictures: PhotoSet | None,
    encoders: Encoders,
    options: EvaluationOptions,
) -> Retention:
    """Say how much of the subject and of the style a merge has kept.

    Args:
        sets: The four sets; only what all of them have drawn is compared.
        photos: The subject's photos, prepared.
        style_pictures: Pictures in the style; None takes what the style's adapter drew.
        encoders: From `pick_encoders`. The style is told by CSD, and in picturebook's world by its
            own judge.
        options: How many resamples, for which confidence.

    Raises:
        EvaluationError: If the sets have no prompt and seed in common.
    """
    cells = [
        {(p.prompt, p.seed, p.scheduler, p.steps): path for p, path in drawn}
        for images in sets.all()
        for drawn in [zip(images.pictures, images.paths(), strict=True)]
    ]
    common = [cell for cell in cells[0] if all(cell in others for others in cells[1:])]
    if not common:
        raise EvaluationError(
            "The four sets have no picture of the same prompt, seed, scheduler and steps.",
            "Draw the same prompts with the base model, each part alone, and the merge.",
        )
    base, subject, style, merged = (
        embed_images([paths[cell] for cell in common], encoders).features for paths in cells
    )
    prompts = [cell[0] for cell in common]
    known = embed_images(photos.paths(), encoders).features
    wanted = embed_images(style_pictures.paths(), encoders).features if style_pictures else style
    identity = _retain("identity", encoders, (merged, base, subject), known, prompts, options)
    styled = _retain(
        "style",
        encoders,
        (merged, subject, style),
        wanted,
        prompts,
        options,
        are_drawn=style_pictures is None,
    )
    shares = [one.value for one in (identity, styled) if one.value is not None]
    origin = "in the style" if style_pictures else "that the style's adapter drew"
    return Retention(
        identity=identity,
        style=styled,
        both=harmonic_mean(shares) if len(shares) == 2 else None,
        style_reference=f"{len(next(iter(wanted.values()), ()))} pictures {origin}",
    )


def _retain(
    name: str,
    encoders: Encoders,
    sides: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
    references: dict[str, Tensor],
    prompts: list[str],
    options: EvaluationOptions,
    are_drawn: bool = False,
) -> Score:
    """Score one retention; references drawn from the prompts are compared with others' only."""
    encoder = encoders.named()[name]
    if isinstance(encoder, Missing):
        return Score(note=f"not measured: {encoder.reason}")
    merged, none, full = (side[name] for side in sides)
    if any(bool(side.isnan().any()) for side in (merged, none, full, references[name])):
        return Score(key=encoder.key, note="not measured: in some pictures nobody was found")
    comparable = None
    if are_drawn:
        if len(set(prompts)) < 2:
            reason = "the style's adapter has drawn one prompt only; give pictures in the style"
            return Score(key=encoder.key, note=f"not measured: {reason}")
        comparable = torch.tensor([[own != other for other in prompts] for own in prompts])
    draws = intervals.draw(
        prompts,
        0 if are_drawn else len(references[name]),
        resamples=options.resamples,
        confidence=options.confidence,
    )
    return measure_retention(
        merged=merged,
        none=none,
        full=full,
        references=references[name],
        draws=draws,
        key=encoder.key,
        comparable=comparable,
    )


def measure_retention(
    *,
    merged: Float[Tensor, "cells features"],
    none: Float[Tensor, "cells features"],
    full: Float[Tensor, "cells features"],
    references: Float[Tensor, "references features"],
    draws: Draws,
    key: str,
    comparable: Bool[Tensor, "cells references"] | None = None,
) -> Score:
    """Place the merge's pictures between those without the part and those of the part alone.

    Args:
        merged: Features of the merge's pictures.
        none: Of the pictures without the part, of the same prompts and seeds.
        full: Of the pictures of the part alone, likewise.
        references: Of the subject's photos, or of pictures in the style.
        draws: From `intervals.draw`, for these cells and references; without references where
            ``comparable`` is given.
        key: Names the encoder.
        comparable: Which cells are compared with which references, at least one in each row; None
            for all. Pictures of the part alone that are references themselves must not be compared
            with their own prompt's: the part would be credited for drawing the very same picture.

    Returns:
        The ratio (merged − none) / (full − none) of mean similarities to the references; above 1
        where the merge shows more of the part than the part alone.

    Source:
        The retention of ZipLoRA's and K-LoRA's comparisons, as a share of what each part can do.
    """
    sides = []
    for side in (merged, none, full):
        similar = subject_fidelity(generated=side, photos=references)
        if comparable is not None:
            similar = (similar * comparable).sum(dim=1) / comparable.sum(dim=1)
        sides.append(similar.numpy())
    no_room = "the part alone does not differ clearly from the pictures without it"
    return score_retention(*sides, draws=draws, key=key, no_room=no_room)


def score_retention(
    kept: Array, none: Array, full: Array, *, draws: Draws, key: str | None, no_room: str
) -> Score:
    """Place values on the way from those of nothing kept (0) to those of everything kept (1).

    Args:
        kept: A row for each picture; one value, or a column for each reference.
        none: The same for pictures of the same prompts and seeds without the part.
        full: And for those of the part alone.
        draws: From `intervals.draw`, for these rows and columns.
        key: Names the encoder.
        no_room: What to say where there is no way to go; the words of a lift speak of floor and
            ceiling.
    """
    own, low, high = (intervals.sample_mean(side, draws) for side in (kept, none, full))
    found = intervals.lift(own, low, high, draws.independent, draws.confidence)
    note = "" if found.value is not None else f"not measured: {no_room}"
    return Score(value=found.value, n=len(kept), interval=found.interval, key=key, note=note)
