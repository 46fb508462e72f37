"""Validation samples while a training runs: pictures from fixed seeds, scores, the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import TrainingError
from dreamloom.core.events import Observer, Progress, ValidationSampled
from dreamloom.core.manifests import ImageSet, Picture, read_image_set, write_manifest
from dreamloom.core.run_folder import RunFolder, atomic_folder, write_json
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.recommend import (
    CheckpointCandidate,
    Recommendation,
    recommend_checkpoint,
)
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import Model, Sampler, Shot

ScoreImages: TypeAlias = Callable[[ImageSet, ImageSet | None], Scorecard]
"""Scores pictures of the subject, beside the untrained model's pictures of the same seeds."""

_SCORES = "scores.json"
_ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class ValidationSampler:
    """Draws, keeps and scores validation samples.

    Args:
        run: Whose samples they are.
        model: The model with the adapter attached.
        config: Resolved settings.
        sign: Writes into an adapter how it was made.
        judge: Scores pictures; None only draws.
        observe: Told of progress and of each validation.
    """

    run: RunFolder
    model: Model
    config: LoomConfig
    sign: Callable[[Adapter], Adapter]
    judge: ScoreImages | None
    observe: Observer

    def is_due(self, updates_done: int) -> bool:
        """Say whether to validate after so many updates: now and then, first and last."""
        every = self.config.validation.every
        return every is not None and (
            updates_done % every == 0 or updates_done == self.config.train.steps
        )

    def run_validation(self, updates_done: int) -> None:
        """Draw the watched prompts as the model is now; a validation that was finished is kept."""
        folder = self._folder(updates_done)
        if (folder / _SCORES).is_file():
            return
        with atomic_folder(folder) as fresh:
            images = self._draw(fresh, updates_done)
            if updates_done:
                adapter = self.sign(self.model.read_adapter())
                write_adapter(fresh / _ADAPTER, adapter, format=self.config.adapter.format)
            scorecard = None
            if self.judge is not None:
                untrained = self._folder(0)
                has_floor = updates_done and untrained.is_dir()
                scorecard = self.judge(images, read_image_set(untrained) if has_floor else None)
            write_json(fresh / _SCORES, scorecard)
        self._forget_old()
        scores = {} if scorecard is None else scorecard.scores
        values = {name: one.value for name, one in scores.items() if one.value is not None}
        self.observe(ValidationSampled(updates_done, str(folder), values))

    def _forget_old(self) -> None:
        """Keep as many validations as asked for, beside the untrained model's and the best."""
        keep = self.config.validation.keep
        if keep is None:
            return
        best = self.recommend()
        kept = {0, best.update if best else 0}
        for folder in sorted(self.run.validation_samples.glob("[0-9]*"))[:-keep]:
            if int(folder.name) not in kept:
                # Renamed first, so that none is ever there by half.
                gone = folder.with_name(f".forgotten-{folder.name}")
                folder.rename(gone)
                shutil.rmtree(gone)

    def find_reason_to_stop(self, updates_done: int) -> str:
        """Say why a training should end after a validation, by its patience; empty if it shouldn't.

        That is where so many validations in a row brought no adapter that would be recommended
        instead. It depends on what was found up to there alone, so that a training that goes on
        from a checkpoint ends where it would have ended.

        Raises:
            TrainingError: If the validation has no score to go by.
        """
        settings = self.config.validation
        if settings.patience is None or settings.every is None or not updates_done:
            return ""
        best = self.recommend(updates_done)
        if best is None:
            raise TrainingError(
                f"validation.patience = {settings.patience} goes by the scores, and the validation "
                f"after update {updates_done} has none: {self._say_why_unscored(updates_done)}.",
                "Mend that and run the same command again, or train with validation.patience=none "
                "into another --out.",
            )
        waited = (updates_done - best.update) // settings.every
        if waited < settings.patience:
            return ""
        count = "1 validation" if waited == 1 else f"{waited} validations in a row"
        return f"{count} brought no better adapter than that after update {best.update}"

    def _say_why_unscored(self, updates_done: int) -> str:
        card = json.loads((self._folder(updates_done) / _SCORES).read_text(encoding="utf-8"))
        identity = Scorecard.model_validate(card).scores.get("identity") if card else None
        if identity is None:
            return "nothing judged its pictures"
        return identity.reason or "there is no lift of identity"

    def recommend(self, last: int | None = None) -> Recommendation | None:
        """Say which of the adapters that were kept is best; None where nothing was scored.

        Args:
            last: The update after which none is looked at; None looks at all.
        """
        candidates = []
        for folder in sorted(self.run.validation_samples.glob("[0-9]*")):
            if not (folder / _ADAPTER).is_file() or (last is not None and int(folder.name) > last):
                continue
            known = json.loads((folder / _SCORES).read_text(encoding="utf-8"))
            if known is None:
                continue  # nobody judged it
            scorecard = Scorecard.model_validate(known)
            identity, clip_t = (scorecard.scores.get(name) for name in ("identity", "clip_t"))
            candidates.append(
                CheckpointCandidate(
                    update=int(folder.name),
                    identity_lift=identity.lift if identity else None,
                    clip_t=clip_t.value if clip_t else None,
                    clip_t_floor=clip_t.floor if clip_t else None,
                    alarms=scorecard.alarms,
                )
            )
        return recommend_checkpoint(candidates)

    def adapter_of(self, update: int) -> Path:
        """Where the adapter of a validation lies."""
        return self._folder(update) / _ADAPTER

    def _folder(self, updates_done: int) -> Path:
        return self.run.validation_samples / f"{updates_done:06d}"

    def _draw(self, folder: Path, updates_done: int) -> ImageSet:
        settings, subject = self.config.validation, self.config.subject
        sampler = Sampler("ddim", settings.steps, float(self.config.generate.guidance))
        prompts = [text.replace("{subject}", subject.phrase) for text in settings.prompts]
        pictures = [
            Picture(
                file=f"{number:04d}.png",
                prompt=prompt,
                category="",
                seed=number % settings.images,
                scheduler=sampler.scheduler,
                steps=sampler.steps,
                guidance=sampler.guidance,
            )
            for number, prompt in enumerate(
                prompt for prompt in prompts for _ in range(settings.images)
            )
        ]
        drawn = self.model.sample(
            [Shot(picture.prompt, picture.seed) for picture in pictures],
            sampler,
            on_picture=lambda done, total: self.observe(
                Progress("train", f"looking after update {updates_done}", done, total)
            ),
        )
        for picture, image in zip(pictures, drawn, strict=True):
            image.save(folder / picture.file)
        images = ImageSet(
            folder=folder,
            base=self.model.identity.as_dict(),
            adapters=(),
            subject=subject.phrase,
            class_noun=subject.class_noun,
            resolution_px=self.model.advice.resolution_px,
            pictures=tuple(pictures),
        )
        write_manifest(images)
        return images
