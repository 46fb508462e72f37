"""Words as tokenizers read them: their pieces, how rare those were, and what that does not say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from dreamloom.display.layout import aside, table

if TYPE_CHECKING:
    from dreamloom.models.rare_words import Piece, RareWords, ReadWord


def render_rare_words(found: RareWords) -> Iterator[RenderableType]:
    """Lay out how a text is read, and how rare each of its words was."""
    from dreamloom.models.tokenizers import tell_reading

    for reading in found.readings:
        pieces = [piece.text for word in reading.words for piece in word.pieces]
        for text in tell_reading(found.text, dict.fromkeys(reading.encoders, pieces)):
            yield f"[bold]{escape(f'{found.base}: {text}')}[/bold]"
        rows = []
        for word in reading.words:
            name = f"{word.word} (class noun)" if word.word == found.class_noun else word.word
            read = " · ".join(piece.text for piece in word.pieces)
            merges = " · ".join(map(_number, word.pieces))
            rows.append(tuple(map(escape, (name, read, merges, _tell_rarity(word)))))
        yield table(("word", "pieces", "merges", "how rare"), rows)
    yield from aside(
        f"A merge (1 to {found.readings[0].merges:,}) makes one piece of the two that were most "
        "often neighbours in the text that the tokenizer learned from; – is a single sign. A late "
        "one was rare in that text, which is not to say in the captions that the model learned "
        "from.",
        *_tell_meanings(found),
    )


def _number(piece: Piece) -> str:
    return "–" if piece.merge is None else f"{piece.merge:,}"


def _tell_rarity(word: ReadWord) -> str:
    if len(word.pieces) > 1:
        return "not frequent enough for one piece"
    if word.later_than is None:
        return "a single sign"
    return f"later than {math.floor(100 * word.later_than)}% of one-piece words"


def _tell_meanings(found: RareWords) -> Iterator[str]:
    from dreamloom.models.rare_words import KNOWN_ABBREVIATIONS

    cut = dict.fromkeys(
        word.word
        for reading in found.readings
        for word in reading.words
        if len(word.pieces) > 1 and word.word != found.class_noun
    )
    for word in cut:
        yield f"The text encoders know each piece of {word} from other words."
    for word in dict.fromkeys(found.text.lower().split()):
        if word in KNOWN_ABBREVIATIONS:
            yield f"{word} stands for something that a model may know."
