"""The journal of an unfinished set: what it is drawn from, and which pictures are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from dreamloom.core.errors import RunFolderError
from dreamloom.core.manifests import MANIFEST
from dreamloom.core.run_folder import Record, atomic_path, file_sha256, write_text
from dreamloom.data.foreign_files import list_foreign_files
from dreamloom.data.photos.listing import name_some

# Lists an unfinished set's pictures: what they are drawn from, then each one's hash.
JOURNAL = "unfinished.jsonl"

_ELSEWHERE = "Give this set another --name, or draw into another --out."


def find_drawn(
    folder: Path, record: Record | None, inputs: Mapping[str, str], files: Sequence[str]
) -> dict[str, str]:
    """Find which of a set's pictures lie in its folder, unharmed; give the hash of each.

    Raises:
        RunFolderError: If the folder holds a set drawn otherwise, a picture that was changed, or
            files that are nobody's.
    """
    made_from, known = _read_journal(folder)
    if not any((folder / name).exists() for name in known):
        made_from = None  # stopped before the first picture
    foreign = list_foreign_files(folder, [JOURNAL, *(() if made_from is None else known)])
    if made_from is None and record is not None and foreign:
        made_from = record.inputs
        known = {Path(name).name: sha256 for name, sha256 in record.outputs.items()}
    if made_from is None:
        if foreign:
            raise RunFolderError(
                f"{folder} holds what no record here lists: {name_some(foreign)}.", _ELSEWHERE
            )
        return {}
    refuse_other_inputs(folder, made_from, inputs)
    # The list of an unfinished set, which a journal does not know, is written anew.
    there = [name for name in (*files, MANIFEST) if (folder / name).exists()]
    there = [name for name in there if name != MANIFEST or name in known]
    changed = [name for name in there if known.get(name) != file_sha256(folder / name)]
    if changed:
        raise RunFolderError(
            f"{folder} holds what was changed since it was drawn: {name_some(changed)}.",
            "Move that elsewhere to have it drawn again, or give this set another --name.",
        )
    return {name: known[name] for name in there if name != MANIFEST}


def refuse_other_inputs(
    folder: Path, made_from: Mapping[str, str], inputs: Mapping[str, str]
) -> None:
    """Refuse to draw a set into a folder whose pictures are drawn from something else.

    Raises:
        RunFolderError: If an input differs; it names each that does.
    """
    differing = [name for name, value in inputs.items() if made_from.get(name) != value]
    if differing:
        raise RunFolderError(
            f"{folder} already holds pictures drawn with other {', '.join(differing)}.", _ELSEWHERE
        )


def _read_journal(folder: Path) -> tuple[dict[str, str] | None, dict[str, str]]:
    """Read what an unfinished set is drawn from, None where there is none, and its hashes."""
    try:
        lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, {}
    made_from: dict[str, str] | None = None
    known: dict[str, str] = {}
    for line in lines:
        try:
            entry = dict(json.loads(line))
            made_from = entry.get("inputs", made_from)
            known |= {entry["file"]: entry["sha256"]} if "file" in entry else {}
        except (ValueError, TypeError, KeyError):
            continue  # cut off when the process died, before that picture had its name
    return made_from, known


class Journal:
    """Keeps pictures of an unfinished set, and writes down what they are drawn from.

    Args:
        folder: Where they go.
        inputs: What the set is drawn from.
        drawn: The hash of each picture that is there.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, str], drawn: Mapping[str, str]) -> None:
        self.drawn = dict(drawn)
        self._folder = folder
        self._inputs = dict(inputs)
        self._is_begun = False

    def keep(self, name: str, image: Image.Image) -> None:
        """Save a picture; nothing is written before the first."""
        file = self._folder / JOURNAL
        if not self._is_begun:
            entries = [{"file": name, "sha256": sha256} for name, sha256 in self.drawn.items()]
            lines = [json.dumps(entry) for entry in ({"inputs": self._inputs}, *entries)]
            write_text(file, "\n".join(lines) + "\n")
            self._is_begun = True
        with atomic_path(self._folder / name) as temporary:
            image.save(temporary)
            sha256 = file_sha256(temporary)
            # Before the picture has its name: whatever bears one is known.
            with file.open("a", encoding="utf-8") as journal:
                journal.write("\n" + json.dumps({"file": name, "sha256": sha256}) + "\n")
        self.drawn[name] = sha256
