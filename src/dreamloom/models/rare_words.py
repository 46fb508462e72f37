"""Rare words: how late a base model's tokenizers learned a word's pieces, and which came later.

Byte-pair encoding joins the most frequent pair of pieces in its training text, again and again. A
piece's merge number therefore says how rare its letters were there, and no more: not how rare the
word is among the captions that the model itself learned from.

Source:
    Ruiz et al., DreamBooth (CVPR 2023), section 3.2: identifiers are rare tokens of at most three
    letters, for an invented word may be read letter by letter, and those bring a strong prior of
    their own. Theirs are from the middle of T5's vocabulary; here the latest come first.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dreamloom.core.errors import ConfigError
from dreamloom.models.tokenizers import END_OF_WORD, list_merges, load_tokenizers, spell_piece

KNOWN_ABBREVIATIONS = frozenset(
    "bdg bnp bpd bsf ccd chk clg cmdr cwgc dbz ddc dds dprk fbs fck gsp grl hgtv hmv hsv httr kprc "
    "kts lpg mds mgs mgt mss mth mwf ncds nlwx nmwx npt nrf nrg nwsl pbc pcm pgs pkg pkk pln psst "
    "rcn rmb rps rsc shld sks snf spp sqm ssh stg szn tls tvc wwdc".split()
)
"""One-piece words without a vowel, of the latest thousands, that are known to stand for something:
sks is a rifle, dbz a cartoon, ssh a program. Nobody can make this list complete."""

_MEANS_LITTLE = re.compile(r"(?!(.)\1+$)[b-df-hj-np-tv-xz]{3,4}")
"""Three or four letters without a vowel, and not the same one throughout."""

SUGGESTED = 8
"""How many rarer words are named."""


@dataclass(frozen=True)
class Piece:
    """A piece that a tokenizer cuts from a text.

    Args:
        text: Its letters.
        merge: The number of the merge that made it, 1 for the most frequent; None for a single
            sign, which no merge made.
    """

    text: str
    merge: int | None


@dataclass(frozen=True)
class ReadWord:
    """A word as a tokenizer reads it.

    Args:
        word: As it was typed.
        pieces: What it is cut into.
        later_than: The share of the tokenizer's one-piece words that were made earlier; None for
            a word of several pieces or of a single sign.
    """

    word: str
    pieces: tuple[Piece, ...]
    later_than: float | None


@dataclass(frozen=True)
class TextReading:
    """A text as one tokenizer, or several that agree, read it.

    Args:
        encoders: The text encoders whose tokenizers they are.
        merges: How many merges the tokenizer learned.
        words: The text's words.
    """

    encoders: tuple[str, ...]
    merges: int
    words: tuple[ReadWord, ...]


@dataclass(frozen=True)
class RareWords:
    """What a base model's tokenizers make of a text, and which short words were rarer.

    Args:
        base: The base model.
        text: The text.
        class_noun: Its last word, which is meant to be common; empty if it is the only one.
        readings: How the tokenizers read the text.
        rarer: Words of three or four letters without a vowel that every tokenizer reads in one
            piece, made later than any piece of the text without its class noun; the latest first,
            each with its merge.
    """

    base: str
    text: str
    class_noun: str
    readings: tuple[TextReading, ...]
    rarer: Mapping[str, int]


class _Vocabulary:
    """A tokenizer with the number of the merge that made each piece."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        made: dict[str, int] = {}
        for number, piece in enumerate(list_merges(tokenizer), start=1):
            made.setdefault(piece, number)
        self.made = made
        self.merges = len(made)
        self._whole = sorted(made[piece] for piece in made if piece.endswith(END_OF_WORD))

    def read(self, word: str) -> ReadWord:
        """Cut a word into pieces."""
        found = self._tokenizer.tokenize(word)
        pieces = tuple(
            Piece(spell_piece(self._tokenizer, piece), self.made.get(piece)) for piece in found
        )
        merge = pieces[0].merge if len(pieces) == 1 else None
        share = None if merge is None else bisect_left(self._whole, merge) / len(self._whole)
        return ReadWord(word, pieces, share)

    def list_whole(self) -> list[str]:
        """List the words that a merge made, the latest first."""
        made = sorted(self.made, key=self.made.__getitem__, reverse=True)
        return [piece.removesuffix(END_OF_WORD) for piece in made if piece.endswith(END_OF_WORD)]


def read_rare_words(base: str, text: str) -> RareWords:
    """Read a text with a base model's tokenizers, and find short words that were rarer.

    Args:
        base: The base model; see `load_tokenizers`.
        text: A rare word, alone or before what the subject is one of.

    Raises:
        ConfigError: If the text says nothing.
        BaseModelError: If there is no such base model, or its tokenizers cannot be read.
    """
    words = text.split()
    if not words:
        raise ConfigError(
            "There is no word to look at.", 'Give one, such as: dreamloom token "rraj person".'
        )
    vocabularies = {
        encoder: _Vocabulary(tokenizer) for encoder, tokenizer in load_tokenizers(base).items()
    }
    by_reading: dict[tuple[int, tuple[ReadWord, ...]], list[str]] = {}
    for encoder, vocabulary in vocabularies.items():
        key = (vocabulary.merges, tuple(vocabulary.read(word) for word in words))
        by_reading.setdefault(key, []).append(encoder)
    return RareWords(
        base,
        text,
        words[-1] if len(words) > 1 else "",
        tuple(
            TextReading(tuple(encoders), merges, read)
            for (merges, read), encoders in by_reading.items()
        ),
        _find_rarer(tuple(vocabularies.values()), words[:-1] or words),
    )


def _find_rarer(vocabularies: Sequence[_Vocabulary], words: Sequence[str]) -> dict[str, int]:
    """Find words that each tokenizer made later than all pieces of some words."""
    latest = [
        max((piece.merge or 0 for word in words for piece in one.read(word).pieces), default=0)
        for one in vocabularies
    ]

    def is_rarer(word: str) -> bool:
        if word in KNOWN_ABBREVIATIONS or not _MEANS_LITTLE.fullmatch(word):
            return False
        for vocabulary, merge in zip(vocabularies, latest, strict=True):
            pieces = vocabulary.read(word).pieces
            if len(pieces) != 1 or (pieces[0].merge or 0) <= merge:
                return False
        return True

    first = vocabularies[0]
    rarer = islice(filter(is_rarer, first.list_whole()), SUGGESTED)
    return {word: first.made[word + END_OF_WORD] for word in rarer}
