"""Scoring a merge beside its parts: what is left of the subject, and what of the style."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamloom.core.errors import EvaluationError
from dreamloom.core.manifests import ImageSet, PhotoSet
from dreamloom.evaluation.encoders.base import Encoders, Missing
from dreamloom.evaluation.metrics.embed import embed_images
from dreamloom.evaluation.metrics.retention import (
    Retention,
    choose_cells,
    combine_retention,
    measure_retention,
)
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.scoring import EvaluationOptions
from dreamloom.evaluation.stats import intervals as statistics


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
        [(p.prompt, p.seed, p.scheduler, p.steps) for p in images.pictures] for images in sets.all()
    ]
    chosen = choose_cells(cells)
    if not chosen[0]:
        raise EvaluationError(
            "The four sets have no picture of the same prompt, seed, scheduler and steps.",
            "Draw the same prompts with the base model, each part alone, and the merge.",
        )
    base, subject, style, merged = (
        embed_images([images.paths()[row] for row in rows], encoders).features
        for images, rows in zip(sets.all(), chosen, strict=True)
    )
    prompts = [cells[0][row][0] for row in chosen[0]]
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
    origin = "in the style" if style_pictures else "that the style's adapter drew"
    return Retention(
        identity=identity,
        style=styled,
        both=combine_retention(identity, styled),
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
    draws = statistics.draw(
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
