"""SDXL base 1.0's configuration and CLIP's tokenizers: what a single-file checkpoint leaves out.

`NOTICE` in this folder says where its files come from.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPTokenizer

FOLDER = Path(__file__).parent
"""A pipeline's configuration in diffusers' layout, without weights and without tokenizers."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_TOKENS = 77


def read_merges() -> list[tuple[str, str]]:
    """Read the 48,894 merges of CLIP's byte-pair encoding, the most frequent pair first."""
    text = gzip.decompress((FOLDER / "merges.txt.gz").read_bytes()).decode()
    lines = text.splitlines()[1:]
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


def number_tokens(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Number CLIP's tokens: 256 bytes, 256 that end a word, one per merge, start and end."""
    letters = _letters_of_bytes()
    flat = [left + right for left, right in merges]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *flat, _START, _END]
    return {token: number for number, token in enumerate(tokens)}


def _letters_of_bytes() -> list[str]:
    """Give each byte a visible letter (GPT-2's scheme): printable Latin-1 first, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    hidden = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(hidden)]


def make_tokenizers(
    merges: Sequence[tuple[str, str]] | None = None,
) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Build the tokenizers of both text encoders.

    They differ in padding only: the first encoder was trained with the end token after a prompt,
    the second (OpenCLIP's) with id 0, which is "!".

    Args:
        merges: Which pieces are put together, the most frequent pair first; None takes CLIP's.
    """
    merges = read_merges() if merges is None else merges
    numbers = number_tokens(merges)
    first, second = (
        CLIPTokenizer(numbers, merges, pad_token=pad, model_max_length=_TOKENS)
        for pad in (_END, "!")
    )
    return first, second
