"""Prompts and words in settings: text whose blanks (words in braces) are filled in later."""

from __future__ import annotations

import difflib
import re
import string
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field


def _check_blanks(allowed: str, text: str) -> str:
    """Let a prompt be filled in later: it may hold one word in braces, and no other."""
    if not text.strip():
        raise ValueError("it is blank")
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError:
        raise ValueError(
            f"a brace is alone; the only word in braces may be {{{allowed}}}"
        ) from None
    for _, name, form, conversion in parsed:
        if name is not None and (name, form or "", conversion) != (allowed, "", None):
            typed = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(
                f"{{{typed}}} means nothing; the only word in braces may be {{{allowed}}}"
            )
    return text


def _refuse_blanks(text: str) -> str:
    if "{" in text or "}" in text:
        raise ValueError("nothing may be in braces; write the words themselves")
    return text


def _check_words(text: str) -> str:
    """Let a phrase stand in prompts: it says something, and has no blank of its own."""
    if not text.strip():
        raise ValueError("it is blank")
    for word in re.findall(r"\{\s*(\w+)\s*\}", text):
        if difflib.get_close_matches(word, ("subject", "class_noun"), cutoff=0.75):
            raise ValueError(f"{{{word}}} is for prompts, and this is what stands for it there")
    return text


Words = Annotated[str, Field(min_length=1), AfterValidator(_check_words)]
"""What prompts call somebody or something; not blank."""


SubjectPrompt = Annotated[str, AfterValidator(partial(_check_blanks, "subject"))]
"""A prompt in which {subject} stands for the phrase."""

ClassPrompt = Annotated[str, AfterValidator(partial(_check_blanks, "class_noun"))]
"""A prompt in which {class_noun} stands for the noun."""

PlainText = Annotated[str, AfterValidator(_refuse_blanks)]
"""Text without blanks."""
