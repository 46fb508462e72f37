"""Photo sets: folders of photos that were dropped on the page, in the form that training reads.

What is stored is upright, in sRGB and without any metadata; its name is ours. Crops, masks and
captions lie beside it as `dreamloom.data.photos.listing` finds them, so that the commands take such
a folder like any other.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dreamloom.core.errors import DreamLoomError, PhotoError
from dreamloom.core.run_folder import atomic_path, write_json, write_text
from dreamloom.data.image_io import find_marked, read_upright
from dreamloom.data.photos.check import PhotoCheck, check_photos
from dreamloom.data.photos.metadata import METADATA
from dreamloom.data.picture_files import open_picture
from dreamloom.studio.words import say

MOST_PHOTO_BYTES = 50 * 2**20
"""A larger upload is refused before it is read whole."""
MOST_PHOTOS = 200
LARGEST_SIDE_PX = 17_000
"""A picture with a longer side is refused: no camera makes one, and it would fill the memory."""
MOST_CAPTION_CHARS = 4000

# A square of 1024 px is cut out of it, or out of half of it.
_STORED_SIDE_PX = 2048
_THUMB_PX = 320
_ABOUT = "about.json"
_STORING = threading.Lock()
_NAME = re.compile(r"photo-\d{3}\.png")


@dataclass(frozen=True)
class PhotoSetFolder:
    """One set of photos.

    Args:
        folder: Its folder; the folder's name is what addresses call it.
    """

    folder: Path

    @property
    def id(self) -> str:
        """What addresses call it."""
        return self.folder.name

    @property
    def title(self) -> str:
        """What the user calls it."""
        return str(self._about().get("title") or self.id)

    @property
    def _beside(self) -> Path:
        """Where thumbnails and names lie: training would wonder about them among the photos."""
        return self.folder.with_name(f".{self.folder.name}")

    def _about(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return dict(json.loads((self._beside / _ABOUT).read_text(encoding="utf-8")))
        return {}

    def name_it(self, title: str) -> None:
        """Give it a name for people."""
        write_json(self._beside / _ABOUT, {**self._about(), "title": title[:80]})

    def note_drawn(self) -> None:
        """Note that its pictures are picturebook's drawings."""
        write_json(self._beside / _ABOUT, {**self._about(), "drawn": True})

    @property
    def base(self) -> str:
        """The base model that it is looked at for unless one is named."""
        return "picturebook" if self._about().get("drawn") is True else "sdxl"

    def names(self) -> list[str]:
        """The photos' names, in the order in which they came."""
        return sorted(file.name for file in self.folder.glob("photo-*.png") if _is_photo(file.name))

    def path(self, name: str) -> Path | None:
        """Where a photo lies; None for any name that is none of them."""
        return self.folder / name if name in self.names() else None

    def told_name(self, name: str) -> str:
        """What the user's own file was called, for reading alone."""
        return str(self._about().get("files", {}).get(name, name))

    def store(self, data: bytes, told: str) -> str:
        """Store a photo: upright, in sRGB, without metadata, its shorter side 2048 px at most.

        Args:
            data: The file as it was dropped.
            told: What it was called; it names nothing here.

        Returns:
            The name it has here.

        Raises:
            PhotoError: If it is no picture that can be read, too large, or one too many.
        """
        # One after the other: two that come at once get two names, and only one fills the memory.
        with _STORING:
            return self._store(data, told)

    def _store(self, data: bytes, told: str) -> str:
        names = self.names()
        if len(names) >= MOST_PHOTOS:
            raise PhotoError(say("photos.too_many", most=MOST_PHOTOS))
        told = Path(told.replace("\\", "/")).name[:120]
        told = "".join(c for c in told if c.isprintable()) or say("photos.unnamed")
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._beside / f"upload-{secrets.token_hex(4)}") as incoming:
            incoming.write_bytes(data)
            try:
                _refuse_huge(incoming, told)
                image = read_upright(incoming).image
            except PhotoError as error:
                raise PhotoError(str(error).replace(str(incoming), told)) from None
        with suppress(OSError):
            for left in self._beside.glob("upload-*"):
                left.unlink()
        if min(image.size) > _STORED_SIDE_PX:
            factor = _STORED_SIDE_PX / min(image.size)
            size = (round(image.width * factor), round(image.height * factor))
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        numbers = [int(name[6:9]) for name in names]
        name = f"photo-{max(numbers, default=0) + 1:03d}.png"
        with atomic_path(self.folder / name) as temporary:
            image.save(temporary, compress_level=1)
        about = self._about()
        files = {**about.get("files", {}), name: told}
        write_json(self._beside / _ABOUT, {**about, "files": files})
        return name

    def remove(self, name: str) -> None:
        """Remove a photo with its caption, mask and crop."""
        path = self.path(name)
        if path is None:
            return
        self.write_caption(name, "")
        self.write_mask(name, None)
        self.write_box(name, None)
        path.unlink(missing_ok=True)
        self._thumb(name).unlink(missing_ok=True)

    def _thumb(self, name: str) -> Path:
        return self._beside / f"thumb-{name}"

    def thumbnail(self, name: str) -> Path | None:
        """A small copy of a photo, made when first asked for."""
        path = self.path(name)
        if path is None:
            return None
        thumb = self._thumb(name)
        if not thumb.is_file():
            with Image.open(path) as image:
                small = image.convert("RGB")
                small.thumbnail((_THUMB_PX, _THUMB_PX))
                with atomic_path(thumb) as temporary:
                    small.save(temporary)
        return thumb

    # What stands beside a photo --------------------------------------------------------------

    def caption(self, name: str) -> str:
        """A photo's own caption; empty where it has none."""
        with suppress(OSError):
            return (self.folder / name).with_suffix(".txt").read_text(encoding="utf-8").strip()
        return ""

    def write_caption(self, name: str, text: str) -> None:
        """Give a photo a caption; an empty one takes it away.

        Raises:
            PhotoError: If it is too long.
        """
        file = (self.folder / name).with_suffix(".txt")
        text = " ".join(text.split())
        if not text.isprintable():
            raise PhotoError(say("photos.caption_signs"))
        if len(text) > MOST_CAPTION_CHARS:
            raise PhotoError(say("photos.caption_long", most=MOST_CAPTION_CHARS))
        if text:
            write_text(file, text + "\n")
        else:
            file.unlink(missing_ok=True)

    def mask(self, name: str) -> Path | None:
        """A photo's mask; None where it has none."""
        file = (self.folder / name).with_suffix(".mask.png")
        return file if file.is_file() else None

    def write_mask(self, name: str, data: bytes | None) -> None:
        """Give a photo a mask of its own size, white where the subject is; None takes it away.

        Raises:
            PhotoError: If it is no picture of that size, or marks nothing.
        """
        file = (self.folder / name).with_suffix(".mask.png")
        if data is None:
            file.unlink(missing_ok=True)
            return
        with Image.open(self.folder / name) as photo:
            size = photo.size
        try:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as given:
                if given.size != size:
                    raise PhotoError(say("photos.mask_size"))
                mask = given.convert("L")
        except PhotoError:
            raise
        except Exception:
            raise PhotoError(say("photos.mask_unreadable")) from None
        if find_marked(mask) is None:
            raise PhotoError(say("photos.mask_empty"))
        with atomic_path(file) as temporary:
            mask.save(temporary)

    def boxes(self) -> dict[str, tuple[float, float, float, float]]:
        """What crops must keep: left, top, right and bottom in pixels, by photo."""
        found = {}
        with suppress(OSError, ValueError):
            for line in (self.folder / METADATA).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                found[str(row["file_name"])] = tuple(row["box"])
        return found

    def write_box(self, name: str, box: Sequence[float] | None) -> None:
        """Say what a photo's crops must keep; None leaves it open.

        Raises:
            PhotoError: If it is not a box inside the photo.
        """
        boxes = self.boxes()
        boxes.pop(name, None)
        if box is not None:
            with Image.open(self.folder / name) as photo:
                width, height = photo.size
            left, top, right, bottom = box
            inside = 0 <= left < right <= width and 0 <= top < bottom <= height
            if not inside or min(right - left, bottom - top) < 8:
                raise PhotoError(say("photos.box_outside", width=width, height=height))
            boxes[name] = (left, top, right, bottom)
        file = self.folder / METADATA
        if boxes:
            rows = (json.dumps({"file_name": n, "box": list(b)}) for n, b in sorted(boxes.items()))
            write_text(file, "".join(row + "\n" for row in rows))
        else:
            file.unlink(missing_ok=True)

    def size(self, name: str) -> tuple[int, int]:
        """A photo's width and height."""
        with Image.open(self.folder / name) as photo:
            return photo.size

    def changed(self) -> str:
        """Give a text that is another one as soon as a photo comes, goes or changes."""
        times = {name: (self.folder / name).stat().st_mtime_ns for name in self.names()}
        return json.dumps(times)

    def check(self, resolution_px: int) -> PhotoCheck | None:
        """Look at all of them as training would; None where there is none, or nothing to read."""
        if not self.names():
            return None
        try:
            return check_photos(self.folder, resolution_px)
        except DreamLoomError:
            return None


class PhotoSets:
    """All photo sets of a studio.

    Args:
        path: Where they lie.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Any:
        """Go through the sets, the latest first."""
        folders = sorted(self.path.glob("photos-*"), reverse=True) if self.path.is_dir() else []
        return (PhotoSetFolder(folder) for folder in folders)

    def find(self, set_id: str) -> PhotoSetFolder | None:
        """Find a set by what addresses call it."""
        return next((one for one in self if one.id == set_id), None)

    def make(self, title: str) -> PhotoSetFolder:
        """Make an empty set."""
        numbers = [int(part) for one in self if (part := one.id[len("photos-") :]).isdecimal()]
        made = PhotoSetFolder(self.path / f"photos-{max(numbers, default=0) + 1:03d}")
        made.folder.mkdir(parents=True)
        made.name_it(title or made.id)
        return made

    def remove(self, one: PhotoSetFolder) -> None:
        """Remove a set with everything in it."""
        for folder in (one.folder, one.folder.with_name(f".{one.folder.name}")):
            shutil.rmtree(folder, ignore_errors=True)


def _is_photo(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def _refuse_huge(path: Path, told: str) -> None:
    """Refuse by the header what would take too much memory to read.

    Raises:
        PhotoError: If it is too large, or no picture.
    """
    try:
        with open_picture(path) as (_, size):
            pass
    except PhotoError:
        raise
    except Exception:
        raise PhotoError(say("photos.no_picture", name=told)) from None
    if max(size) > LARGEST_SIDE_PX:
        raise PhotoError(
            say("photos.huge", name=told, width=size[0], height=size[1], most=LARGEST_SIDE_PX)
        )
