"""Pictures laid side by side: rows are prompts, columns are sets, seeds are the same across."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from dreamloom.core.errors import PhotoError
from dreamloom.core.manifests import ImageSet, Picture
from dreamloom.data.image_io import open_upright
from dreamloom.evaluation.metrics.measures import label_of
from dreamloom.report.roles import TABLE, place_of
from dreamloom.report.story import label_set

BADGES = ("identity", "clip_t")
"""Scores written below each picture."""

SHOT_PX = 320
"""Longer side of a picture on the page; smaller pictures keep their pixels."""

_SMALL_PX = 160


@dataclass(frozen=True)
class EmbeddedPicture:
    """One picture as the page embeds it."""

    source: Markup
    """A data address; empty if the file cannot be read."""
    alt: str
    size: tuple[int, int] = (0, 0)
    seed: int = 0
    pixelated: bool = False
    badges: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Column:
    """One set of pictures in a gallery."""

    label: str
    kind: str
    adapters: str
    """Which adapters it was drawn with, in words."""


@dataclass
class Row:
    """One prompt, drawn in each column."""

    prompt: str
    detail: str
    cells: list[list[EmbeddedPicture]]


@dataclass
class Gallery:
    """Sets side by side."""

    name: str
    title: str
    intro: str
    columns: list[Column]
    groups: list[tuple[str, list[Row]]]
    """Rows by the category of their prompts."""
    seeds: list[int] = field(default_factory=list)
    across: int = 4
    """Pictures beside each other in a cell."""


def embed(path: Path, longest_px: int = SHOT_PX) -> tuple[Markup, tuple[int, int]]:
    """Encode a picture for the page: upright, without metadata, no larger than needed.

    Returns:
        A data address, empty if the file is missing or damaged, and width and height.
    """
    try:
        image = open_upright(path)
    except PhotoError:
        return Markup(), (0, 0)
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # A small picture costs little, so it may stay nearly as it was.
    quality = 90 if max(image.size) <= _SMALL_PX else 82
    image.save(buffer, "WEBP", quality=quality, method=4, exif=b"", xmp=b"")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    # Base64 has no sign that needs escaping, and looking for one takes long.
    return Markup("data:image/webp;base64," + encoded), image.size


def build_gallery(
    name: str,
    sets: Mapping[str, ImageSet],
    values: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    title: str = "",
    only: Iterable[str] | None = None,
    details: Mapping[str, str] | None = None,
    longest_px: int = SHOT_PX,
) -> Gallery:
    """Lay sets side by side.

    Args:
        name: Becomes the gallery's place on the page.
        sets: The sets by name, one column each.
        values: Scores by set, file and name, for the figures below the pictures.
        title: The heading.
        only: Names of the sets whose prompts make rows; None takes all.
        details: What stands below each set's name; None takes the adapters that drew it.
        longest_px: Longer side of a picture.
    """
    wanted = set(only if only is not None else sets)
    samplers = {p.sampler for images in sets.values() for p in images.pictures}
    rows: dict[tuple[str, str, str], Row] = {}
    for set_name, images in sets.items():
        for picture in images.pictures if set_name in wanted else ():
            empty = Row(
                prompt=picture.prompt or "without a known prompt",
                detail=picture.sampler if len(samplers) > 1 else "",
                cells=[[] for _ in sets],
            )
            rows.setdefault(_place(picture), empty)
    for index, (set_name, images) in enumerate(sets.items()):
        for picture in sorted(images.pictures, key=lambda picture: picture.seed):
            row = rows.get(_place(picture))
            if row is not None:
                badges = values.get(set_name, {}).get(picture.file, {})
                row.cells[index].append(
                    _shot(images, picture, badges, label_set(set_name), longest_px)
                )
    groups: dict[str, list[Row]] = {}
    for (category, _, _), row in rows.items():
        groups.setdefault(category, []).append(row)
    shown = [shot for row in rows.values() for cell in row.cells for shot in cell]
    most = max((len(cell) for row in rows.values() for cell in row.cells), default=1)
    return Gallery(
        name=name,
        title=title,
        intro=f"Drawn with {samplers.pop()}." if len(samplers) == 1 else "",
        columns=[
            Column(
                label_set(set_name.removeprefix(f"{TABLE}_")),
                place_of(set_name, images).kind,
                details[set_name]
                if details is not None
                else " + ".join(map(str, images.adapters)) or "no adapter",
            )
            for set_name, images in sets.items()
        ],
        groups=list(groups.items()),
        seeds=sorted({shot.seed for shot in shown}),
        across=max(1, min(most, 12 // max(len(sets), 1), 8)),
    )


def prompts_of(images: ImageSet) -> set[str]:
    """The different prompts of a set."""
    return {picture.prompt for picture in images.pictures}


def split_by_prompts(sets: Mapping[str, ImageSet]) -> list[dict[str, ImageSet]]:
    """Put sets that share a prompt together, so that each gallery compares like with like."""
    groups: list[tuple[set[str], dict[str, ImageSet]]] = []
    for name, images in sets.items():
        prompts, together = prompts_of(images), {name: images}
        apart = []
        for known, group in groups:
            if known & prompts:
                prompts, together = prompts | known, {**group, **together}
            else:
                apart.append((known, group))
        groups = [*apart, (prompts, together)]
    return [group for _, group in groups]


def _place(picture: Picture) -> tuple[str, str, str]:
    return picture.category, picture.prompt, picture.sampler


def _shot(
    images: ImageSet,
    picture: Picture,
    values: Mapping[str, float],
    drawn_by: str,
    longest_px: int,
) -> EmbeddedPicture:
    source, size = embed(images.folder / picture.file, longest_px)
    told = f"{picture.prompt}, seed {picture.seed}, drawn by {drawn_by}"
    return EmbeddedPicture(
        source=source,
        alt=told if source else f"{picture.file} is missing",
        size=size,
        seed=picture.seed,
        pixelated="pixel" in picture.prompt.lower(),
        badges=tuple((label_of(name), values[name]) for name in BADGES if name in values),
    )
