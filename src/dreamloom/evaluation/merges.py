"""Scoring a merge beside its parts: what is left of the subject, and what of the style."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamloom.core.config.settings import EvaluateConfig
from dreamloom.core.device import measure_effort
from dreamloom.core.errors import EvaluationError
from dreamloom.core.events import Observer, StageDone, StageSkipped, StageStarted, silent
from dreamloom.core.manifests import ImageSet, PhotoSet
from dreamloom.core.run_folder import Record, RunFolder, fingerprint
from dreamloom.evaluation.encoders.base import Encoders, Missing
from dreamloom.evaluation.metrics.embed import embed_images
from dreamloom.evaluation.metrics.retention import (
    Retention,
    choose_cells,
    combine_retention,
    measure_retention,
)
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.stats import intervals as statistics

STAGE = "retention"


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
    config: EvaluateConfig,
    encoders: Encoders,
) -> Retention:
    """Say how much of the subject and of the style a merge has kept.

    Args:
        sets: The four sets; only what all of them have drawn is compared.
        photos: The subject's photos, prepared.
        style_pictures: Pictures in the style; None takes what the style's adapter drew.
        config: How many resamples, for which confidence.
        encoders: From `pick_encoders`. The style is told by CSD, and in picturebook's world by its
            own judge.

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
    identity = _retain("identity", encoders, (merged, base, subject), known, prompts, config)
    styled = _retain(
        "style",
        encoders,
        (merged, subject, style),
        wanted,
        prompts,
        config,
        are_drawn=style_pictures is None,
    )
    origin = "in the style" if style_pictures else "that the style's adapter drew"
    return Retention(
        identity=identity,
        style=styled,
        both=combine_retention(identity, styled),
        style_reference=f"{len(next(iter(wanted.values()), ()))} pictures {origin}",
    )


def evaluate_merge_run(
    run: RunFolder,
    sets: MergeSets,
    photos: PhotoSet,
    style_pictures: PhotoSet | None,
    config: EvaluateConfig,
    encoders: Encoders,
    observe: Observer = silent,
) -> Retention:
    """Say what a merge has kept, and keep the answer as the run's record ``retention-<name>``.

    Nothing is done again if the pictures, photos, encoders and settings are as they were.
    """
    stage = f"{STAGE}-{sets.merged.folder.name}"
    inputs = {
        **{images.folder.name: images.fingerprint for images in sets.all()},
        "photos": photos.fingerprint,
        "in the style": style_pictures.fingerprint if style_pictures else "none",
        "encoders": fingerprint(encoders.keys()),
        "settings": fingerprint(config),
    }
    if record := run.finished(stage, inputs):
        observe(StageSkipped(stage, "already scored"))
        return Retention.model_validate(record.results)
    observe(StageStarted(stage, "what the merge has kept"))
    with measure_effort() as effort:
        found = evaluate_merge(sets, photos, style_pictures, config, encoders)
    run.write_record(
        Record(
            stage=stage,
            inputs=inputs,
            settings={"evaluate": config.model_dump()},
            outputs={},
            results=found.model_dump(mode="json"),
            base=sets.merged.base,
            runtime=f"{encoders.device} fp32",
            seconds=effort.seconds,
            peak_mib=effort.peak_mib,
        )
    )
    observe(StageDone(stage, effort.seconds))
    return found


def _retain(
    name: str,
    encoders: Encoders,
    sides: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
    references: dict[str, Tensor],
    prompts: list[str],
    config: EvaluateConfig,
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
        resamples=config.resamples,
        confidence=config.confidence,
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
