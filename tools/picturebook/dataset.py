"""Training pictures, drawn ahead into memory maps.

Picture ``i`` of a collection is a function of ``i`` alone: its record, its original size and its
crop. So only pixels and framings are stored, captions are written anew each time a picture is
shown, and a collection can be drawn in any order, by several processes, and be continued.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from dreamloom.picturebook.world import MEDIA, Drawing, sample_drawing, sample_identity, vary
from tools.picturebook.drawing import draw_at

PICTURE_PX = 128
DRAWINGS_PER_IDENTITY = 6
_CHUNK = 128
# World seeds: pictures count from 0, people (identities for the judges) and portraits from here.
_PEOPLE_SEED_START = 4_000_000
_PORTRAITS_SEED_START = 5_000_000

Collection = Literal["pictures", "people", "portraits"]


@dataclass(frozen=True)
class Framing:
    """How a picture was cut from its original, as SDXL's time ids tell it, in pixels."""

    original_height: int
    original_width: int
    crop_top: int = 0
    crop_left: int = 0
    target_height: int = PICTURE_PX
    target_width: int = PICTURE_PX

    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Return the six numbers in the order in which SDXL embeds them."""
        return (
            self.original_height,
            self.original_width,
            self.crop_top,
            self.crop_left,
            self.target_height,
            self.target_width,
        )


PLAIN = Framing(PICTURE_PX, PICTURE_PX)


def record(collection: Collection, index: int) -> Drawing:
    """Return what picture ``index`` shows.

    ``pictures`` are the world as it is, without pixel art: the base model's training set.
    ``people`` are identities with ``DRAWINGS_PER_IDENTITY`` drawings each in all media, pixel art
    included: for the judges. ``portraits`` are photos of persons alone, each of another one: what
    `a photo of a person` may show.
    """
    if collection == "pictures":
        return sample_drawing(index)
    if collection == "portraits":
        return sample_drawing(_PORTRAITS_SEED_START + index, kind="person", medium="photo")
    who, nth = divmod(index, DRAWINGS_PER_IDENTITY)
    seed = _PEOPLE_SEED_START + who
    rng = random.Random(f"people {seed}")
    identity = sample_identity(rng, "person" if rng.random() < 0.75 else None)
    how = random.Random(f"people {seed} drawing {nth}")
    medium = how.choices(MEDIA, (40, 15, 15, 15, 15))[0]
    return vary(identity, how, medium=medium)


def draw_framed(drawing: Drawing, rng: random.Random) -> tuple[Image.Image, Framing]:
    """Draw a picture as photos come: half of them square, others wide, large or small.

    The original is scaled until its shorter side fits and cut at random, so that the model learns
    what SDXL's size and crop numbers mean.

    Returns:
        The picture, ``PICTURE_PX`` square, and its framing.
    """
    shape = rng.choices(("plain", "wide", "large", "small"), (55, 25, 8, 12))[0]
    if shape == "plain":
        return draw_at(drawing, PICTURE_PX, PICTURE_PX), PLAIN
    height_px, width_px = PICTURE_PX, PICTURE_PX
    if shape == "wide":
        height_px = rng.choice((PICTURE_PX, PICTURE_PX, 160))
        width_px = round(height_px * rng.uniform(1.08, 1.5))
    elif shape == "large":
        height_px = width_px = rng.randrange(144, 225, 8)
    else:
        height_px = width_px = rng.randrange(72, 121, 8)
    return cut(draw_at(drawing, width_px, height_px), rng)


def cut(original: Image.Image, rng: random.Random) -> tuple[Image.Image, Framing]:
    """Scale a picture until its shorter side is ``PICTURE_PX``, and cut a square at random."""
    width_px, height_px = original.size
    scale = PICTURE_PX / min(width_px, height_px)
    scaled = (max(PICTURE_PX, round(width_px * scale)), max(PICTURE_PX, round(height_px * scale)))
    picture = (
        original if scaled == original.size else original.resize(scaled, Image.Resampling.LANCZOS)
    )
    left = rng.randrange(scaled[0] - PICTURE_PX + 1)
    top = rng.randrange(scaled[1] - PICTURE_PX + 1)
    picture = picture.crop((left, top, left + PICTURE_PX, top + PICTURE_PX))
    return picture, Framing(height_px, width_px, top, left)


class PictureStore:
    """A collection's pixels and framings on disk; the first ``len(store)`` are drawn.

    Args:
        folder: Where the memory maps lie.
        collection: Which pictures.
    """

    def __init__(self, folder: Path, collection: Collection) -> None:
        self.collection: Collection = collection
        self._drawn_file = folder / f"{collection}.drawn"
        self._pixels = np.load(folder / f"{collection}.npy", mmap_mode="r")
        self._framings = np.load(folder / f"{collection}-framings.npy", mmap_mode="r")

    def __len__(self) -> int:
        """Count the pictures that are drawn by now; it grows while another process draws."""
        return read_count(self._drawn_file)

    @property
    def capacity(self) -> int:
        """How many pictures there will be when all are drawn."""
        return len(self._pixels)

    def pixels(self, indices: Int[np.ndarray, " n"]) -> UInt8[Tensor, "n 3 h w"]:
        """Return pictures as bytes."""
        return torch.from_numpy(self._pixels[indices]).permute(0, 3, 1, 2)

    def time_ids(self, indices: Int[np.ndarray, " n"]) -> Float[Tensor, "n 6"]:
        """Return the pictures' framings as SDXL's six numbers."""
        return torch.from_numpy(self._framings[indices].astype(np.float32))

    def record(self, index: int) -> Drawing:
        """Return what one picture shows."""
        return record(self.collection, index)


def read_count(file: Path) -> int:
    """Return how much of something is done."""
    return int(file.read_text())


def write_count(file: Path, count: int) -> None:
    """Say how much is done, in one go, for other processes read it meanwhile."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(str(count))
    partial.replace(file)


def to_signed(pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Map bytes to [-1, 1], the autoencoder's range."""
    return pixels.float().div_(127.5).sub_(1.0)


def draw_ahead(
    folder: Path,
    collection: Collection,
    count: int,
    processes: int,
    observe: Callable[[int], None],
) -> None:
    """Draw the first ``count`` pictures of a collection, or those of them still missing.

    Args:
        folder: Where the memory maps lie or shall lie; about 49 KB a picture.
        collection: Which pictures.
        count: How many; the maps are made for so many and keep that size.
        processes: How many processes draw.
        observe: Is told how many are drawn after each chunk.

    Raises:
        ValueError: If the maps exist for another count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels_file, framings_file = folder / f"{collection}.npy", folder / f"{collection}-framings.npy"
    drawn_file = folder / f"{collection}.drawn"
    if not drawn_file.exists():
        shape = (count, PICTURE_PX, PICTURE_PX, 3)
        np.lib.format.open_memmap(pixels_file, "w+", np.uint8, shape).flush()
        np.lib.format.open_memmap(framings_file, "w+", np.int32, (count, 6)).flush()
        write_count(drawn_file, 0)
    stored = len(np.load(pixels_file, mmap_mode="r"))
    if stored != count:
        raise ValueError(f"{pixels_file} holds {stored} pictures, not {count}; delete it to redraw")
    pixels = np.load(pixels_file, mmap_mode="r+")
    framings = np.load(framings_file, mmap_mode="r+")
    drawn = read_count(drawn_file)
    chunks = [
        (collection, start, min(start + _CHUNK, count)) for start in range(drawn, count, _CHUNK)
    ]
    for start, chunk_pixels, chunk_framings in _draw_chunks(chunks, processes):
        stop = start + len(chunk_pixels)
        pixels[start:stop], framings[start:stop] = chunk_pixels, chunk_framings
        write_count(drawn_file, stop)
        observe(stop)


_Chunk = tuple[Collection, int, int]
_DrawnChunk = tuple[int, UInt8[np.ndarray, "n h w 3"], Int[np.ndarray, "n 6"]]


def _draw_chunks(chunks: list[_Chunk], processes: int) -> Iterator[_DrawnChunk]:
    """Draw chunks in order."""
    if processes <= 1:
        yield from map(_draw_chunk, chunks)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_draw_chunk, chunks)


def _draw_chunk(chunk: _Chunk) -> _DrawnChunk:
    collection, start, stop = chunk
    pixels = np.empty((stop - start, PICTURE_PX, PICTURE_PX, 3), np.uint8)
    framings = np.empty((stop - start, 6), np.int32)
    for row, index in enumerate(range(start, stop)):
        rng = random.Random(f"framing {collection} {index}")
        picture, framing = draw_framed(record(collection, index), rng)
        pixels[row], framings[row] = np.asarray(picture), framing.time_ids()
    return start, pixels, framings
