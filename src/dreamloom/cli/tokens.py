"""The command that looks at words: how tokenizers read them, how rare they are, which are rarer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from dreamloom.cli.options import LoomCommand, json_option
from dreamloom.cli.output import command_line, deliver
from dreamloom.cli.words import BASE

if TYPE_CHECKING:
    from dreamloom.models.rare_words import RareWords


@click.command(cls=LoomCommand)
@click.argument("words", nargs=-1, required=True, metavar="TEXT")
@click.option(
    "--base",
    type=BASE,
    default="picturebook",
    show_default=True,
    help="picturebook, sdxl, a folder or a .safetensors file.",
)
@json_option
def token(words: tuple[str, ...], base: str, json_target: str | None) -> None:
    """Say how tokenizers read TEXT, and name rarer words.

    TEXT is a rare word, alone or before what the subject is one of, as in --subject "rraj person".
    """
    from dreamloom.display.layout import say, show
    from dreamloom.display.words import render_rare_words
    from dreamloom.models.rare_words import read_rare_words

    found = read_rare_words(base, " ".join(words))

    def tell() -> None:
        show(render_rare_words(found))
        for text in _tell_rarer(found):
            say(text)

    deliver(asdict(found), tell, json_target)


def _tell_rarer(found: RareWords) -> Iterator[str]:
    """Name rarer words, and say how far it can be told that they mean nothing."""
    from dreamloom.models.rare_words import KNOWN_ABBREVIATIONS

    given = found.text.split()
    asked = " ".join(given[:-1] or given)
    left_out = (
        "Left out are words with a vowel, because a tokenizer cannot tell somebody's name or word "
        f"from an invented one, and {len(KNOWN_ABBREVIATIONS)} abbreviations that are known here "
        "to mean something, such as sks, a rifle."
    )
    if found.rarer:
        listed = ", ".join(f"{word} ({merge:,})" for word, merge in found.rarer.items())
        yield f"One piece, and rarer than each piece of {asked}: {listed}."
        first = next(iter(found.rarer))
        drawing = command_line(
            *("dreamloom", "generate", "--base", found.base),
            *("--prompt", f"a photo of {first} {found.class_noun}".rstrip()),
            *("--name", first, "--out", "runs/look"),
        )
        yield (
            f"{left_out} Any other may mean something, too. Pictures tell what the base model "
            f"makes of one: {drawing}"
        )
    else:
        yield f"None is left of the short one-piece words rarer than each piece of {asked}."
        yield left_out
    if found.base == "picturebook":
        yield (
            "All that picturebook reads in one piece comes from its captions: an invented word, "
            "which it reads in pieces, is the rarest that it has."
        )
