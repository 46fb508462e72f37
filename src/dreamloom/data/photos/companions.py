"""Companions of photos: which files of a folder are captions and masks, in others' spelling too."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

CAPTION_SUFFIXES = (".txt", ".caption")
TEXT_SUFFIXES = frozenset((*CAPTION_SUFFIXES, ".cap", ".csv", ".json", ".jsonl", ".tags", ".tsv"))
"""Names that end so may have been meant for captions."""

PLAIN_MASK = ".mask.png"
# IMG_1-masklabel.png (OneTrainer), IMG_1_mask.png, IMG_1.jpg.mask.png, mask_IMG_1.png.
_ENDS_IN_MASK = re.compile(r"(?P<photo>.+?)(?P<spelling>[ ._-]*(?:masks?|masklabel))")
_BEGINS_WITH_MASK = re.compile(r"(?P<spelling>mask[ ._-]+)(?P<photo>.+)")
# Nobody calls a photo so.
_SURELY_MASKS = (".mask", "masklabel")


class Companions(NamedTuple):
    """What lies beside each photo, and what seems to belong to one and does not."""

    pictures: list[Path]
    """The pictures that are no masks."""
    captions: dict[Path, Path]
    masks: dict[Path, Path]
    lost_masks: list[Path]
    """Masks whose photo is not there, or has another mask already."""
    taken_for_photos: list[Path]
    """Pictures that are called masks of nothing that is there."""


def fold_name(name: str) -> str:
    """Give what two names have in common that differ in case or in how accents are composed.

    Example:
        >>> fold_name("Jose\u0301.TXT") == fold_name("JOS\u00c9.txt")
        True
    """
    return unicodedata.normalize("NFC", name).casefold()


def find_companions(named_so: Sequence[Path], entries: Collection[Path]) -> Companions:
    """Tell photos from masks, and find each photo's caption and mask.

    A picture is a mask if its name is a photo's with ``mask`` or ``masklabel`` added, or ends in
    ``.mask`` before the suffix. Exact names go before those that differ in case or composition.

    Args:
        named_so: The folder's pictures, by their names.
        entries: All that lies in the folder.
    """
    called_masks = {path: called for path in named_so if (called := _read_mask_name(path))}
    owners: dict[str, list[Path]] = {}
    for path in named_so:
        for name in {fold_name(path.stem), fold_name(path.name)}:
            owners.setdefault(name, []).append(path)
    paired = {
        path for path, called in called_masks.items() if set(owners.get(called.photo, ())) - {path}
    }
    spellings = {called_masks[path].spelling for path in paired}
    # What has a mask itself, such as the photo of a wooden mask, is a photo.
    masked = {owner for path in paired for owner in owners[called_masks[path].photo]}
    all_masks = [
        path
        for path, (_, spelling) in called_masks.items()
        if path in paired
        or (path not in masked and (spelling in spellings or spelling.endswith(_SURELY_MASKS)))
    ]
    pictures = [path for path in named_so if path not in all_masks]
    by_photo: dict[str, list[Path]] = {}
    for path in all_masks:
        by_photo.setdefault(called_masks[path].photo, []).append(path)
    masks = {path: mask for path in pictures if (mask := _choose_mask(path, by_photo))}
    used = set(masks.values())
    return Companions(
        pictures,
        _find_captions(pictures, entries),
        masks,
        [path for path in all_masks if path not in used],
        [path for path in pictures if path in called_masks],
    )


def is_plain_mask(path: Path) -> bool:
    """Say whether a mask is called as DreamLoom calls them, IMG_1.mask.png."""
    return path.name.lower().endswith(PLAIN_MASK)


class _MaskName(NamedTuple):
    photo: str
    """The folded name of what it masks, with or without a suffix."""
    spelling: str


def _read_mask_name(path: Path) -> _MaskName | None:
    stem = fold_name(path.stem)
    found = _ENDS_IN_MASK.fullmatch(stem) or _BEGINS_WITH_MASK.fullmatch(stem)
    return _MaskName(found["photo"], found["spelling"]) if found else None


def _choose_mask(path: Path, by_photo: Mapping[str, Sequence[Path]]) -> Path | None:
    """Choose the mask of a photo; ``IMG_1.mask.png`` goes before other spellings."""
    found = [*by_photo.get(fold_name(path.stem), ()), *by_photo.get(fold_name(path.name), ())]
    plain = path.with_suffix(PLAIN_MASK)

    def rank(mask: Path) -> tuple[bool, bool, str]:
        exact = mask.stem.startswith(path.stem) or mask.stem.endswith(path.stem)
        return mask != plain, not exact, mask.name

    return min(found, key=rank, default=None)


def _find_captions(pictures: Iterable[Path], entries: Collection[Path]) -> dict[Path, Path]:
    pictures = list(pictures)
    exact = {path: text for path in pictures for text in _name_captions(path) if text in entries}
    others = {fold_name(entry.name): entry for entry in entries if entry not in exact.values()}
    captions = {}
    for path in pictures:
        names = _name_captions(path)
        near = [text for text in names if text in entries]
        near += [others[name] for text in names if (name := fold_name(text.name)) in others]
        if near:
            captions[path] = near[0]
    return captions


def _name_captions(path: Path) -> list[Path]:
    """Name the files that may hold a photo's caption, in the order in which they count."""
    beside = [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    return beside + [path.with_name(path.name + suffix) for suffix in CAPTION_SUFFIXES]
