"""Validation samples as they lie in a run: pictures, scores and the adapter, and which to take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.manifests import ImageSet, read_image_set
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.recommend import CheckpointCandidate, Recommendation, recommend_checkpoint

SCORES = "scores.json"
ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class Look:
    """What was drawn after some updates of a training, and how it scored.

    Args:
        update: After how many.
        folder: Where it lies.
        images: The pictures; None where they cannot be read.
        card: Their scores; None where nobody judged them.
    """

    update: int
    folder: Path
    images: ImageSet | None
    card: Scorecard | None

    @property
    def has_adapter(self) -> bool:
        """Whether the adapter as it was then is there."""
        return (self.folder / ADAPTER).is_file()

    @property
    def candidate(self) -> CheckpointCandidate | None:
        """What can be told of its adapter; None without one, or where nobody judged it."""
        if self.card is None or not self.has_adapter:
            return None
        identity, clip_t = (self.card.scores.get(name) for name in ("identity", "clip_t"))
        return CheckpointCandidate(
            update=self.update,
            identity_lift=identity.lift if identity else None,
            clip_t=clip_t.value if clip_t else None,
            clip_t_floor=clip_t.floor if clip_t else None,
            alarms=self.card.alarms,
        )


def read_looks(folder: Path) -> list[Look]:
    """Read all validation samples below a run's ``looks``, in the order of updates."""
    return [read_look(one) for one in sorted(folder.glob("[0-9]*"))]


def read_look(folder: Path) -> Look:
    """Read the validation samples of one folder."""
    try:
        images = read_image_set(folder)
    except DreamLoomError:
        images = None
    try:
        written = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        card = Scorecard.model_validate(written) if written else None
    except (OSError, ValueError):
        card = None
    return Look(int(folder.name), folder, images, card)


def recommend_look(looks: Sequence[Look]) -> Recommendation | None:
    """Say which of the adapters that were kept is best; None where nothing was scored.

    Likeness of other pictures cannot be compared: only those are candidates whose prompts are those
    of the last one.
    """
    known = [(look.candidate, look.images and look.images.pictures) for look in looks]
    candidates = [(one, pictures) for one, pictures in known if one is not None]
    comparable = [one for one, pictures in candidates if pictures == candidates[-1][1]]
    found = recommend_checkpoint(comparable)
    left_out = len(candidates) - len(comparable)
    if found is None or not left_out:
        return found
    return replace(found, why=f"{found.why}; {left_out} with other prompts are not compared")
