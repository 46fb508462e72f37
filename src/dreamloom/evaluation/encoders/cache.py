"""Each picture is looked at once, whatever sets it appears in.

The same photos stand beside every set of pictures, and a floor beside many. What an encoder said
of a picture is kept by the encoder's key and the picture's pixels, in memory only and as long as
the process lives: the vector of a face is biometric data, and no file of ours holds one.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dreamloom.evaluation.encoders.base import Extractor, FaceExtractor, FaceReading, TextExtractor
from dreamloom.evaluation.encoders.faces import stack_rows

_KEPT = 50_000  # rows; the oldest go first. At 768 features that is some 150 MiB
_Said = TypeVar("_Said")


class Remembering:
    """An extractor that looks at each picture once; it answers as the one inside does.

    Args:
        inner: The extractor that looks.
    """

    def __init__(self, inner: Extractor) -> None:
        self.inner = inner
        self.key = inner.key
        self.may_miss = bool(getattr(inner, "may_miss", False))

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        if not images:
            return self.inner.embed(images)
        return torch.stack(_ROWS.look(self.key, images, lambda new: list(self.inner.embed(new))))


class RememberingReader(Remembering):
    """The same for an extractor that reads prompts, too; those are read each time."""

    def __init__(self, inner: TextExtractor) -> None:
        super().__init__(inner)
        self._reader = inner

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts features"]:
        """Turn prompts into unit vectors; what is too long is cut off at the end."""
        return self._reader.embed_texts(texts)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """List the texts that `embed_texts` cuts off."""
        return self._reader.too_long(texts)


class RememberingFaces(Remembering):
    """The same for an extractor of faces: what was found is kept with the vector."""

    def __init__(self, inner: FaceExtractor) -> None:
        super().__init__(inner)
        self._finder, self.width = inner, inner.width

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn the largest face of each picture into a unit vector; NaN where there is none."""
        return stack_rows(self.find(images), self.width)

    def find(self, images: Sequence[Image.Image]) -> list[FaceReading]:
        """Find the largest face in each picture."""
        return _READINGS.look(self.key, images, self._finder.find)


def hash_picture(image: Image.Image) -> str:
    """Hash a picture's size, mode and pixels; its file does not matter."""
    digest = hashlib.sha256(repr((image.size, image.mode)).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class _Memory(OrderedDict[tuple[str, str], _Said]):
    """What encoders said, by their key and the picture's hash."""

    def look(
        self,
        key: str,
        images: Sequence[Image.Image],
        ask: Callable[[list[Image.Image]], list[_Said]],
    ) -> list[_Said]:
        prints = [hash_picture(image) for image in images]
        said = {one: self[key, one] for one in prints if (key, one) in self}
        new = {one: image for one, image in zip(prints, images, strict=True) if one not in said}
        if new:
            said.update(zip(new, ask(list(new.values())), strict=True))
            self.update({(key, one): said[one] for one in new})
        while len(self) > _KEPT:
            self.popitem(last=False)
        return [said[one] for one in prints]


_ROWS: _Memory[Tensor] = _Memory()
_READINGS: _Memory[FaceReading] = _Memory()
