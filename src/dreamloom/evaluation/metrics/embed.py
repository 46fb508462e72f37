"""Showing pictures to every encoder, once, and keeping what they saw."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.data.image_io import crop_centre, open_upright
from dreamloom.evaluation.copy_detection import Views, read_layout, read_views
from dreamloom.evaluation.encoders.base import Encoders, FaceExtractor, PerceptualDistance
from dreamloom.evaluation.encoders.store import Missing

_FLAT = 2  # of 255 grey levels: what is left of a black picture after JPEG


@dataclass(frozen=True)
class Embeddings:
    """What the encoders saw in some pictures.

    Args:
        features: One row per picture, by encoder.
        prints: A hash of each picture's pixels: equal ones are copies, whatever their files.
        flat: Whether each picture is one plain colour.
        familiar: Whether each picture lies in the world that the encoders know.
        broken: Encoders that gave no usable numbers, with how many pictures.
        missed: For encoders that look for somebody, in which pictures they found nobody.
        layouts: One row per picture, to compare it with photos.
        views: What a copy of each picture could show; none where nobody asked.
        paths: The pictures' files.
    """

    features: dict[str, Float[Tensor, "images features"]]
    prints: list[str]
    flat: list[bool]
    familiar: list[bool]
    broken: dict[str, int]
    layouts: Float[np.ndarray, "images layout"]
    missed: dict[str, Bool[Tensor, " images"]] = field(default_factory=dict)
    views: tuple[Views, ...] = ()
    paths: tuple[Path, ...] = ()


def embed_images(
    paths: Sequence[Path],
    encoders: Encoders,
    on_pictures: Callable[[int], None] = lambda done: None,
    batch: int = 16,
    *,
    views: bool = False,
) -> Embeddings:
    """Show pictures to every encoder that is there: upright, and their largest centred square.

    Those that look for faces see whole pictures.

    Args:
        paths: The pictures' files.
        encoders: The encoders; missing ones are left out.
        on_pictures: Told how many pictures have been seen.
        batch: Pictures looked at together; changes memory and speed, never the features.
        views: Whether these are photos, whose copies will be looked for.

    Raises:
        PhotoError: If a picture cannot be read.
    """
    present = {
        name: encoder
        for name, encoder in encoders.named().items()
        if not isinstance(encoder, Missing)
    }
    rows: dict[str, list[Tensor]] = {name: [] for name in present}
    prints, flat, familiar, layouts, photo_views = [], [], [], [], []
    for start in range(0, len(paths), batch):
        wholes, squares = [], []
        for path in paths[start : start + batch]:
            image = open_upright(path)
            prints.append(hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest())
            grey_levels = np.ptp(np.asarray(image).reshape(-1, 3), axis=0)
            flat.append(bool((grey_levels <= _FLAT).all()))
            wholes.append(image)
            squares.append(crop_centre(image))
            layouts.append(read_layout(squares[-1]))
            if views:
                photo_views.append(read_views(image))
        for name, encoder in present.items():
            # A face may lie where the square is cut off.
            looks_for_faces = isinstance(encoder, FaceExtractor)
            rows[name].append(encoder.embed(wholes if looks_for_faces else squares))
        familiar += encoders.familiar(squares) if encoders.familiar else [True] * len(squares)
        on_pictures(len(prints))
    features = {name: torch.cat(found) for name, found in rows.items() if found}
    missed = {
        name: found.isnan().all(dim=1)
        for name, found in features.items()
        if getattr(present[name], "may_miss", False)
    }
    unusable = {
        name: (~torch.isfinite(found).all(dim=1) | (found.norm(dim=1) == 0))
        & ~missed.get(name, torch.zeros(len(found), dtype=torch.bool))
        for name, found in features.items()
    }
    return Embeddings(
        features=features,
        prints=prints,
        flat=flat,
        familiar=familiar,
        broken={name: int(bad.sum()) for name, bad in unusable.items() if bad.any()},
        layouts=np.stack(layouts) if layouts else np.zeros((0, 1), np.float32),
        missed=missed,
        views=tuple(photo_views),
        paths=tuple(paths),
    )


def measure_distances(
    distance: PerceptualDistance, paths: Sequence[Path], groups: Sequence[int]
) -> Float[np.ndarray, "n n"]:
    """Compare pictures within each group; pairs of different groups get 0 and are not read.

    Args:
        distance: Compares.
        paths: The pictures' files.
        groups: For each picture, the number of its group.
    """
    found = np.zeros((len(paths), len(paths)))
    for group in dict.fromkeys(groups):
        members = [place for place, one in enumerate(groups) if one == group]
        images = [crop_centre(open_upright(paths[place])) for place in members]
        found[np.ix_(members, members)] = distance.distances(images).double().numpy()
    return found
