"""Prompt packs: lists of prompts that ask for one change each, so that scores can be read by kind.

Each pack is a TOML file in this folder. Its name ends in a version, and a version's prompts never
change: scores of one pack stay comparable.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

from dreamloom.core.manifests import FaceShown, PromptStyle, SubjectChange
from dreamloom.core.toml_files import ClosedModel, read_toml

Category: TypeAlias = Literal[
    "photo",
    "scene",
    "accessory",
    "attribute",
    "view",
    "expression",
    "style",
    "merge",
    "class",
    "unrelated",
]
"""The kind of change that a prompt asks for; ``photo`` asks for none."""

PACK_NAMES = (
    "person-v1",
    "object-v1",
    "live-v1",
    "class-v1",
    "unrelated-v1",
    "seed-v1",
    "pixel-v1",
    "picturebook-v1",
    "picturebook-class-v1",
)
"""The packs, the most used first."""

_FOLDER = Path(__file__).parent
_PERSONS = frozenset("person human man woman boy girl child baby lady gentleman guy face".split())
# An article goes by sound, not by letter.
_SOUNDS_LIKE_YOU = re.compile(r"eu|ew|one\b|u(?:ni[^nm]|s[ei]|k[eu]|te|ra|ri)")
_SILENT_H = re.compile(r"hour|heir|honou?r|honest")
_ARTICLE_AND_BLANK = re.compile(r"(?:\b([Aa]) )?\{(subject|class_noun)\}")


def is_person(class_noun: str) -> bool:
    """Say whether a class noun means persons.

    Example:
        >>> is_person("old man"), is_person("dog")
        (True, False)
    """
    return bool(_PERSONS.intersection(class_noun.lower().split()[-1:]))


class PackPrompt(ClosedModel):
    """A prompt of a pack, and what a right picture of it may show otherwise than the photos."""

    text: str
    """{subject} stands for the subject's phrase, {class_noun} for what it is one of."""
    category: Category
    style: PromptStyle = "photo"
    """Whether a photo is asked for, or art: judges of real faces and eyes do not know art."""
    face: FaceShown = "yes"
    """Whether the subject's face must be visible, where it has one."""
    may_change: tuple[SubjectChange, ...] = ()
    """What of the subject may differ from its photos, because the prompt asks for it."""
    check: str = ""
    """A question that a right picture answers with yes; empty if none was written."""
    for_persons: bool = False
    """Whether it makes sense only if the class noun means a person."""

    def fill(self, subject: str, class_noun: str) -> str:
        """Put the words in; "a" before them becomes "an" where one says so.

        Example:
            >>> PackPrompt(text="a {class_noun}", category="class").fill("sks owl", "owl")
            'an owl'
        """
        words = {"subject": subject, "class_noun": class_noun}

        def replace(found: re.Match[str]) -> str:
            article, word = found[1], words[found[2]]
            if not article:
                return word
            return f"{article}{'n' if _takes_an(word) else ''} {word}"

        return _ARTICLE_AND_BLANK.sub(replace, self.text)

    def suits(self, class_noun: str) -> bool:
        """Say whether the prompt makes sense for subjects of this class.

        One for persons does not suit dogs, and one that is to be unrelated must not name the
        class.
        """
        words = class_noun.lower().split()
        if self.for_persons and not is_person(class_noun):
            return False
        if self.category != "unrelated" or not words:
            return True
        return not re.search(rf"(?<!\w){re.escape(' '.join(words))}s?(?!\w)", self.text.lower())


class Pack(ClosedModel):
    """A named list of prompts."""

    name: str
    about: str
    """What it is for, in one sentence."""
    attribution: str = ""
    """Whose work it was adapted from, and under which licence; empty if it is our own."""
    prompts: tuple[PackPrompt, ...]

    def select(self, class_noun: str) -> tuple[PackPrompt, ...]:
        """Keep the prompts that suit a class noun, in order."""
        return tuple(prompt for prompt in self.prompts if prompt.suits(class_noun))


@cache
def read_pack(name: str) -> Pack:
    """Read a pack.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in PACK_NAMES:
        raise ValueError(f"there is no prompt pack {name!r}, only {', '.join(PACK_NAMES)}")
    return Pack.model_validate({"name": name, **read_toml(_FOLDER / f"{name}.toml", "pack")})


def _takes_an(words: str) -> bool:
    start = words.lower()
    if _SILENT_H.match(start):
        return True
    return start[:1] in tuple("aeiou") and not _SOUNDS_LIKE_YOU.match(start)
