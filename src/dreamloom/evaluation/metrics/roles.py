"""What a picture is for: to show the subject, to show its class, or neither."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from dreamloom.evaluation.metrics.measures import PictureRole


class SubjectWords(NamedTuple):
    """What the subject is called."""

    phrase: str
    """As prompts name it, such as ``rraj person``."""
    class_noun: str
    """What it is one of, such as ``person``."""


def names(prompt: str, words: str) -> bool:
    """Say whether a prompt holds these words, whole and in this order.

    Example:
        >>> names("a photo of Rraj person", "rraj person"), names("personality", "person")
        (True, False)
    """
    return bool(words) and bool(
        re.search(rf"(?<!\w){re.escape(words)}(?!\w)", prompt, flags=re.IGNORECASE)
    )


def assign_roles(
    prompts: Sequence[str], categories: Sequence[str], phrase: str, class_noun: str
) -> list[PictureRole]:
    """Say of each picture what its prompt names.

    Pictures of the class keep watch over what the subject has done to its class; pictures of
    neither, over everything else. Where no prompt names the subject, as in a folder without a
    manifest, every picture counts as one of the subject.

    Args:
        prompts: As they were drawn.
        categories: Of their packs: a prompt such as "an old man" is told to be of the class by
            its category ``class``, though it has not the noun.
        phrase: The subject, such as ``rraj person``.
        class_noun: Its class, such as ``person``.
    """
    if not any(names(prompt, phrase) for prompt in prompts):
        return ["subject"] * len(prompts)
    roles: list[PictureRole] = []
    for prompt, category in zip(prompts, categories, strict=True):
        if names(prompt, phrase):
            roles.append("subject")
        elif category == "class" or names(prompt, class_noun):
            roles.append("class")
        else:
            roles.append("other")
    return roles
