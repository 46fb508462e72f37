r"""Prompt weights: ``(word:1.2)``, ``(word)`` and ``[word]``, and other programs' syntax, found.

Source:
    AUTOMATIC1111's syntax (modules/prompt_parser.py): ``(word)`` weighs 1.1, ``[word]`` 1 / 1.1,
    ``(word:1.2)`` 1.2; nested ones multiply; ``\(`` is a plain bracket. What a bracket opens and
    nothing closes, the prompt's end closes.
"""

from __future__ import annotations

import re

_STEP = 1.1
_CLOSES = {"(": ")", "[": "]"}
_PIECES = re.compile(r"\\.|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)
_ESCAPED = re.compile(r"\\([()\[\]\\])")

_WEIGHT = re.compile(r"(?<!\\)\((?:[^()\\]|\\.)+\)|(?<!\\)\[(?:[^\[\]\\]|\\.)+\]", re.DOTALL)
_EXTRA_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")
_BREAK = re.compile(r"\bBREAK\b")


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Split a prompt into pieces, each with its weight; neighbours' weights differ.

    A bracket that closes nothing is a character like any other.
    """
    pieces: list[tuple[str, float]] = []
    open_: list[tuple[str, int]] = []

    def scale(first: int, factor: float) -> None:
        pieces[first:] = [(piece, weight * factor) for piece, weight in pieces[first:]]

    for part in _PIECES.findall(text):
        opened = open_[-1][0] if open_ else ""
        if part in _CLOSES:
            open_.append((part, len(pieces)))
        elif part[0] == ":" and len(part) > 1 and opened == "(":
            scale(open_.pop()[1], float(part[1:-1]))
        elif opened and part == _CLOSES[opened]:
            scale(open_.pop()[1], _STEP if opened == "(" else 1 / _STEP)
        else:
            pieces.append((_ESCAPED.sub(r"\1", part), 1.0))
    for opened, first in open_:
        scale(first, _STEP if opened == "(" else 1 / _STEP)
    joined: list[tuple[str, float]] = []
    for piece, weight in pieces:
        if joined and joined[-1][1] == weight:
            piece = joined.pop()[0] + piece
        joined.append((piece, weight))
    return joined


def find_foreign_syntax(text: str, weighted: bool) -> list[str]:
    """Say what in a prompt other programs would read otherwise, and is taken literally here.

    Args:
        text: The prompt.
        weighted: Whether weights are read.
    """
    told = []
    weights = [] if weighted else _WEIGHT.findall(text)
    if weights:
        told.append(
            f"{' and '.join(weights[:3])} {'is' if len(weights) == 1 else 'are'} taken literally; "
            "drawings read such brackets as weights with generate.prompt_weights=true"
        )
    for network in _EXTRA_NETWORK.findall(text)[:1]:
        told.append(f"{network} is taken literally; name adapters with --adapter FILE:WEIGHT")
    for choice in _CHOICE.findall(text)[:1]:
        told.append(f"{choice} is taken literally; give a prompt for each choice")
    if _BREAK.search(text):
        told.append("BREAK is taken literally; long prompts are cut into chunks by themselves")
    return told
