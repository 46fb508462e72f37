"""What was deleted and can still come back: moved aside within the studio's folder, not copied.

Each deletion is a folder with a record of where its things lay. Nothing outside of the root is ever
moved, and nothing that a link leads to.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.run_folder import write_text
from dreamloom.core.toml_files import ClosedModel
from dreamloom.studio.disk import Item
from dreamloom.studio.words import say

KEEP_SECONDS = 600
"""How long what was deleted waits for "undo" where its page was not seen to be left."""

_RECORD = "record.json"


class Deleted(ClosedModel):
    """What was deleted."""

    id: str
    name: str
    kind: str
    places: tuple[str, ...]
    """Where its things lay, as seen from the root."""
    size_bytes: int
    page: str
    """The page that asked for it."""
    deleted_at: float


class Trash:
    """All that was deleted and is not gone yet.

    Args:
        root: Where all runs lie.
        path: The folder of what was deleted; on the same disk.
    """

    def __init__(self, root: Path, path: Path) -> None:
        self.root = root
        self.path = path

    def __iter__(self) -> Iterator[Deleted]:
        """Go through what can still come back, the latest first."""
        found = []
        for file in self.path.glob(f"*/{_RECORD}"):
            with suppress(OSError, ValidationError):
                one = Deleted.model_validate_json(file.read_text(encoding="utf-8"))
                if one.id == file.parent.name:
                    found.append(one)
        return iter(sorted(found, key=lambda one: -one.deleted_at))

    def find(self, deleted_id: str) -> Deleted | None:
        """Find what was deleted by what addresses call it."""
        return next((one for one in self if one.id == deleted_id), None)

    def put(self, item: Item, page: str) -> Deleted:
        """Move something aside.

        Raises:
            DreamLoomError: If a link stands in its path, or the system does not let it be moved.
        """
        for place in item.places:
            self._require_inside(place, item.name)
        record = Deleted(
            id=secrets.token_hex(8),
            name=item.name,
            kind=item.kind,
            places=item.places,
            size_bytes=item.size_bytes,
            page=page,
            deleted_at=time.time(),
        )
        folder = self.path / record.id
        folder.mkdir(parents=True)
        # The record stands first: what is moved before a power cut can be found.
        write_text(folder / _RECORD, record.model_dump_json(indent=2) + "\n")
        try:
            for number, place in enumerate(item.places):
                (self.root / place).rename(folder / str(number))
        except OSError as error:
            self._move_back(record)
            why = error.strerror or str(error)
            raise DreamLoomError(say("disk.failed", name=item.name, why=why)) from None
        return record

    def bring_back(self, record: Deleted) -> None:
        """Move something back to where it lay.

        Raises:
            DreamLoomError: If something else lies there now.
        """
        for place in record.places:
            if (self.root / place).exists() or (self.root / place).is_symlink():
                raise DreamLoomError(say("disk.taken", name=record.name))
            self._require_inside(str(Path(place).parent), record.name)
        self._move_back(record)

    def _move_back(self, record: Deleted) -> None:
        folder = self.path / record.id
        for number, place in enumerate(record.places):
            aside = folder / str(number)
            if aside.exists() or aside.is_symlink():
                (self.root / place).parent.mkdir(parents=True, exist_ok=True)
                aside.rename(self.root / place)
        shutil.rmtree(folder, ignore_errors=True)

    def _require_inside(self, place: str, name: str) -> None:
        """Refuse a path that leaves the root, or that a link stands in.

        Raises:
            DreamLoomError: If it does.
        """
        path, parts = self.root, Path(place).parts
        for part in parts:
            path = path / part
            if part == ".." or path.is_symlink() or Path(place).is_absolute():
                raise DreamLoomError(say("disk.linked", name=name))

    def empty(self, page: str = "") -> None:
        """Remove for good what a page has deleted; without one, what has waited long enough."""
        now = time.time()
        for one in self:
            if one.page == page if page else now - one.deleted_at > KEEP_SECONDS:
                # Links in it are removed, and what they lead to stays.
                shutil.rmtree(self.path / one.id, ignore_errors=True)
