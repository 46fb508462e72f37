"""How the portraits on trial look beside drawings: colour, sharpness, familiarity and variety.

No reading of who is shown or what sees an orange haze. A portrait is compared with drawings of the
same person in the scene that the reader sees, so that only how it is drawn counts and not where.
Those are encoded and decoded by the base model's autoencoder first, which takes half of their
sharpness from all that is drawn with it and leaves an adapter no choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from PIL import Image

from dreamloom.data.tensors import to_tensor
from dreamloom.evaluation.encoders.clip import ClipEncoder
from dreamloom.evaluation.metrics.appearance import measure_appearance
from dreamloom.picturebook.judges import (
    clip_folder,
    clip_key,
    load_attribute_reader,
)
from dreamloom.picturebook.world import Identity
from tools.picturebook.measurements import redraw
from tools.picturebook.trial_people import draw_held_out

_RESAMPLES = 2000
_SPREAD_SHARE = 0.95


@dataclass(frozen=True)
class Deviation:
    """How far the mean of some pictures lies from that of drawings, and how far chance takes it.

    Args:
        colour: ΔE*ab of the mean colours.
        colour_limit: What the ΔE of equally many drawings stays below in 95 of 100 cases.
        sharpness: The difference of log2 of sharpness; −1 is half as sharp.
        sharpness_limit: What its size stays below for equally many drawings, as above.
    """

    colour: float
    colour_limit: float
    sharpness: float
    sharpness_limit: float


@dataclass(frozen=True)
class Appearance:
    """How a subject's pictures look.

    Args:
        off: Portraits beside drawings.
        unfamiliar: For each picture, whether the reader takes it for none of the drawn world.
        variety: The mean difference of pairs of portraits, 1 − cosine by the judges' CLIP.
        variety_drawn: The same of drawings.
    """

    off: Deviation
    unfamiliar: list[bool]
    variety: float
    variety_drawn: float


def judge_appearance(
    person: Identity,
    portraits: Sequence[Image.Image],
    everything: Sequence[Image.Image],
    drawings: Sequence[Image.Image],
) -> Appearance:
    """Judge how a subject's pictures look.

    Args:
        person: Who is shown.
        portraits: Pictures of the plain prompt.
        everything: All the pictures whose familiarity is asked about.
        drawings: Drawings of the person; of each scene as many are drawn to compare with.
    """
    reader = load_attribute_reader()
    scenes = [seen.get("scene", "studio") for seen in reader.read(to_tensor(portraits))]
    pools = {scene: _measure_drawings(person, scene, len(drawings)) for scene in {*scenes}}
    shown = np.array([measure_appearance(image) for image in portraits])
    return Appearance(
        off=measure_deviation(shown, scenes, pools),
        unfamiliar=[not familiar for familiar in reader.is_familiar(to_tensor(everything))],
        variety=_measure_variety(portraits),
        variety_drawn=_measure_variety(drawings),
    )


def measure_deviation(
    shown: Float[np.ndarray, "pictures 4"],
    scenes: Sequence[str],
    pools: Mapping[str, Float[np.ndarray, "_ 4"]],
) -> Deviation:
    """Compare the mean appearance of pictures with that of drawings of the same scenes.

    The limits come from drawing, 2000 times, one of its scene's drawings for each picture and
    comparing their mean with that of the scenes' drawings, themselves drawn again.

    Args:
        shown: From `measure_appearance`, a row for each picture.
        scenes: The scene of each.
        pools: The same of drawings, by scene.
    """
    rng = np.random.default_rng(0)
    moved, chance = np.zeros(4), np.zeros((_RESAMPLES, 4))
    for scene in sorted({*scenes}):
        pool, here = pools[scene], shown[[one == scene for one in scenes]]
        moved += (here - pool.mean(axis=0)).sum(axis=0)
        drawn = pool[rng.integers(len(pool), size=(_RESAMPLES, len(here)))]
        means = pool[rng.integers(len(pool), size=(_RESAMPLES, len(pool)))].mean(axis=1)
        chance += drawn.sum(axis=1) - len(here) * means
    moved, chance = moved / len(shown), chance / len(shown)
    return Deviation(
        colour=float(np.linalg.norm(moved[:3])),
        colour_limit=float(np.quantile(np.linalg.norm(chance[:, :3], axis=1), _SPREAD_SHARE)),
        sharpness=float(moved[3]),
        sharpness_limit=float(np.quantile(np.abs(chance[:, 3]), _SPREAD_SHARE)),
    )


def measure_colour_change(
    own: Sequence[Image.Image], base: Sequence[Image.Image]
) -> Float[np.ndarray, " pictures"]:
    """Measure ΔE*ab of the mean colours of each picture and its partner."""
    changed = [
        measure_appearance(one) - measure_appearance(other)
        for one, other in zip(own, base, strict=True)
    ]
    steps: Float[np.ndarray, " pictures"] = np.linalg.norm(np.array(changed)[:, :3], axis=1)
    return steps


def _measure_drawings(person: Identity, scene: str, count: int) -> Float[np.ndarray, "drawings 4"]:
    """Measure drawings of somebody in one scene, redrawn as the base model would draw them."""
    drawings = draw_held_out(person, count, {"scene": scene}, {})
    redrawn = (redraw(to_tensor(drawings) * 2 - 1) + 1) * 127.5
    arrays = redrawn.permute(0, 2, 3, 1).round().byte().numpy()
    return np.array([measure_appearance(Image.fromarray(array)) for array in arrays])


def _measure_variety(images: Sequence[Image.Image]) -> float:
    vectors = _load_clip().embed(images).double().numpy()
    return 1 - mean_of_pairs(vectors)


def mean_of_pairs(vectors: Float[np.ndarray, "n d"]) -> float:
    """Give the mean cosine of pairs of different unit vectors, of which there are two or more.

    Example:
        >>> mean_of_pairs(np.array([[1.0, 0.0], [0.0, 1.0]]))
        0.0
    """
    count = len(vectors)
    similar = vectors @ vectors.T
    return float((similar.sum() - np.trace(similar)) / (count * (count - 1)))


@cache
def _load_clip() -> ClipEncoder:
    """Load the judges' CLIP, once per process."""
    return ClipEncoder(clip_folder(), clip_key())
