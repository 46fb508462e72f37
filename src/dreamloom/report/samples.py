"""What was drawn while a training went on, and how it scored; and which pictures failed."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.manifests import ImageSet, Picture, read_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.evaluation.metrics.measures import label_of
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.report.answers import pick_set
from dreamloom.report.gallery import EmbeddedPicture, Gallery, build_gallery, embed
from dreamloom.report.off_pictures import MOST_SHOWN, OffPictures
from dreamloom.report.story import Story, label_run, label_set
from dreamloom.report.verdicts import tell

_MOST_UPDATES = 6
_MOST_FLAGGED, _MOST_UNLIKE = 8, 4
_MEASURES = ("identity", "clip_t")


def sample_galleries(story: Story) -> list[Gallery]:
    """Lay each training's validation samples side by side: a column for each number of updates."""
    found: list[Gallery] = []
    for name, run in story.runs.items():
        folders = sorted(run.validation_samples.glob("[0-9]*"))
        read = [(int(f.name), images) for f in folders if (images := _read_set(f))]
        shown = _spread(read)
        if not shown:
            continue
        cards = {updates: _read_card(images.folder) for updates, images in shown}
        left_out = len(read) - len(shown)
        title = f"Samples during training: {label_run(name)}" if name else ""
        gallery = build_gallery(
            f"samples-{len(found)}",
            {_label(updates): images for updates, images in shown},
            {
                _label(updates): {one.file: one.values for one in card.pictures}
                for updates, card in cards.items()
                if card
            },
            title=title,
            details={_label(updates): _tell(card) for updates, card in cards.items()},
        )
        if left_out:
            gallery.intro += f" {left_out} samples between these are left out here."
        found.append(gallery)
    return found


def _label(updates: int) -> str:
    return f"after {updates} updates" if updates else "untrained"


def _tell(card: Scorecard | None) -> str:
    if card is None:
        return "not scored"
    told = [
        f"{label_of(name)} {tell(card.scores[name])}"
        for name in _MEASURES
        if name in card.scores and card.scores[name].measured
    ]
    return "; ".join([*told, *(("its scores mean nothing",) if card.warning else ())])


def _spread(
    samples: list[tuple[int, ImageSet]], most: int = _MOST_UPDATES
) -> list[tuple[int, ImageSet]]:
    """Keep the first, the last, and some evenly between."""
    if len(samples) <= most:
        return samples
    return [samples[round(i * (len(samples) - 1) / (most - 1))] for i in range(most)]


def _read_set(folder: Path) -> ImageSet | None:
    try:
        return read_image_set(folder)
    except DreamLoomError:
        return None


def _read_card(folder: Path) -> Scorecard | None:
    try:
        known = json.loads(RunFolder(folder).scores.read_text(encoding="utf-8"))
        return Scorecard.model_validate(known) if known else None
    except (OSError, ValueError, ValidationError):
        return None


def find_failures(
    story: Story, off: OffPictures | None = None
) -> list[tuple[EmbeddedPicture, str]]:
    """Find the pictures of the main set that failed: flagged by a detector, off, or least alike.

    Args:
        story: The folder, read.
        off: What was found to be off in colour or sharpness.

    Returns:
        Each with why it is shown, in that order.
    """
    name = off.name if off else pick_set(story, "identity")
    card, images = (story.cards.get(name), story.sets.get(name)) if name else (None, None)
    if name is None or images is None:
        return []
    reasons: dict[str, list[str]] = {}
    for flags in card.flags.values() if card else ():
        for file in flags.flagged:
            reasons.setdefault(file, []).append(flags.label)
    shown = list(reasons)[:_MOST_FLAGGED]
    for file, why in off.reasons.items() if off else ():
        reasons.setdefault(file, []).append(why)
    shown += list(off.reasons)[:MOST_SHOWN] if off else []
    pictures = card.pictures if card else ()
    measured = [p for p in pictures if p.role == "subject" and "identity" in p.values]
    for one in sorted(measured, key=lambda p: p.values["identity"])[:_MOST_UNLIKE]:
        likeness = f"identity {one.values['identity']:.2f}".replace("-", "−")
        reasons.setdefault(one.file, []).append(likeness)
        shown.append(one.file)
    drawn = {picture.file: picture for picture in images.pictures}
    return [
        (_embed_failure(images, drawn[file], label_set(name)), "; ".join(reasons[file]))
        for file in dict.fromkeys(shown)
        if file in drawn
    ]


def _embed_failure(images: ImageSet, picture: Picture, drawn_by: str) -> EmbeddedPicture:
    source, size = embed(images.folder / picture.file)
    alt = f"{picture.prompt}, seed {picture.seed}, drawn by {drawn_by}"
    return EmbeddedPicture(source, alt if source else f"{picture.file} is missing", size)
