"""Validation samples while a training runs: pictures from fixed seeds, scores, the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import DreamLoomError, TrainingError
from dreamloom.core.events import Note, Observer, Progress, ValidationSampled
from dreamloom.core.manifests import ImageSet, Picture, read_image_set, write_manifest
from dreamloom.core.requests import check_prompts
from dreamloom.core.run_folder import RunFolder, atomic_folder, fingerprint, write_json
from dreamloom.evaluation.looks import ADAPTER, SCORES, read_looks, recommend_look
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.recommend import Recommendation
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import Model, Sampler, Shot

ScoreImages: TypeAlias = Callable[[ImageSet, ImageSet | None], Scorecard]
"""Scores pictures of the subject, beside the untrained model's pictures of the same seeds."""


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
        if (folder / SCORES).is_file():
            return
        pictures = self._list_pictures()
        needs_floor = self.judge is not None and updates_done
        untrained = self._find_untrained(pictures) if needs_floor else None
        with atomic_folder(folder) as fresh:
            images = self._draw(fresh, pictures, f"looking after update {updates_done}")
            if updates_done:
                adapter = self.sign(self.model.read_adapter())
                write_adapter(fresh / ADAPTER, adapter, format=self.config.adapter.format)
            scorecard = None
            if self.judge is not None:
                scorecard = self.judge(images, untrained)
            write_json(fresh / SCORES, scorecard)
        self._forget_old()
        scores = {} if scorecard is None else scorecard.scores
        values = {name: one.value for name, one in scores.items() if one.value is not None}
        self.observe(ValidationSampled(updates_done, str(folder), values))

    def save_adapter(self, updates_done: int) -> Path:
        """Write the adapter as it is now, because somebody asked for it; return its file."""
        adapter = self.sign(self.model.read_adapter()).with_metadata(ss_steps=str(updates_done))
        # Other programs call an adapter by its file's name.
        file = self.run.saved_adapters / f"adapter-{updates_done:06d}.safetensors"
        write_adapter(file, adapter, format=self.config.adapter.format)
        return file

    def change_prompts(self, prompts: Sequence[str]) -> None:
        """Draw other prompts from the next validation on, also when the training is resumed."""
        write_json(self.run.validation_prompts, {"prompts": list(prompts)})
        for text in self.model.note_prompts(self._fill_in(prompts)):
            self.observe(Note("train", text))

    def list_prompts(self) -> tuple[str, ...]:
        """List the prompts that are drawn now: those of the settings, or what they became."""
        file, given = self.run.validation_prompts, self.config.validation.prompts
        if not file.is_file():
            return given
        try:
            return check_prompts(json.loads(file.read_text(encoding="utf-8"))["prompts"])
        except (OSError, ValueError, KeyError, TypeError, DreamLoomError):
            text = f"{file} cannot be read, so validation.prompts are drawn"
            self.observe(Note("train", text, warning=True))
            return given

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
        from a checkpoint ends where it would have ended; and not on samples that somebody asked
        for between two validations. Where prompts were changed, it counts anew.

        Raises:
            TrainingError: If the validation has no score to go by.
        """
        settings = self.config.validation
        if settings.patience is None or settings.every is None or not updates_done:
            return ""
        best = self.recommend(updates_done, settings.every)
        if best is None:
            if self.run.validation_prompts.is_file():
                return ""  # the new prompts may show nobody, which is no reason to end
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
        card = json.loads((self._folder(updates_done) / SCORES).read_text(encoding="utf-8"))
        identity = Scorecard.model_validate(card).scores.get("identity") if card else None
        if identity is None:
            return "nothing judged its pictures"
        return identity.reason or "there is no lift of identity"

    def recommend(self, last: int | None = None, every: int = 1) -> Recommendation | None:
        """Say which of the adapters that were kept is best; None where nothing was scored.

        Likeness of other pictures cannot be compared: only those are candidates whose prompts are
        those of the last one. Where samples are drawn on request alone, none is: the finished
        adapter would not be among them.

        Args:
            last: The update after which none is looked at; None looks at all.
            every: Only those after a multiple of so many updates are looked at.
        """
        if self.config.validation.every is None:
            return None
        looks = read_looks(self.run.validation_samples)
        asked = [one for one in looks if last is None or one.update <= last]
        return recommend_look([one for one in asked if one.update % every == 0])

    def adapter_of(self, update: int) -> Path:
        """Where the adapter of a validation lies."""
        return self._folder(update) / ADAPTER

    def _folder(self, updates_done: int) -> Path:
        return self.run.validation_samples / f"{updates_done:06d}"

    def _fill_in(self, prompts: Sequence[str]) -> list[str]:
        return [text.replace("{subject}", self.config.subject.phrase) for text in prompts]

    def _list_pictures(self) -> tuple[Picture, ...]:
        """List what is drawn at a validation: each prompt with each seed."""
        settings = self.config.validation
        sampler = self._sampler
        prompts = self._fill_in(self.list_prompts())
        return tuple(
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
        )

    @property
    def _sampler(self) -> Sampler:
        guidance = float(self.config.generate.guidance)
        return Sampler("ddim", self.config.validation.steps, guidance)

    def _find_untrained(self, pictures: tuple[Picture, ...]) -> ImageSet:
        """Find the untrained model's pictures of the same prompts and seeds, or draw them.

        The first validation has those of the first prompts, where there was one. For others the
        adapter is disabled while they are drawn.
        """
        first = self._folder(0)
        if _read_pictures(first) == pictures:
            return read_image_set(first)
        drawn_from = [picture.model_dump(mode="json") for picture in pictures]
        folder = self.run.validation_samples / f"untrained-{fingerprint(drawn_from)[:8]}"
        if _read_pictures(folder) != pictures:
            with atomic_folder(folder) as fresh, self.model.disable_adapter():
                self._draw(fresh, pictures, "drawing the same without the adapter")
        return read_image_set(folder)

    def _draw(self, folder: Path, pictures: tuple[Picture, ...], task: str) -> ImageSet:
        """Draw pictures into a folder, with their manifest."""
        subject = self.config.subject
        drawn = self.model.sample(
            [Shot(picture.prompt, picture.seed) for picture in pictures],
            self._sampler,
            on_picture=lambda done, total: self.observe(Progress("train", task, done, total)),
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
            pictures=pictures,
        )
        write_manifest(images)
        return images


def _read_pictures(folder: Path) -> tuple[Picture, ...]:
    """Read what the pictures in a folder were drawn from; nothing where there are none."""
    try:
        return read_image_set(folder).pictures
    except DreamLoomError:
        return ()
