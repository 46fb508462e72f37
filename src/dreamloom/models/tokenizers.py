"""Tokenizers of a base model, found without its weights, and the pieces that they cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from dreamloom.core.errors import BaseModelError
from dreamloom.models.sdxl_configs import make_tokenizers
from dreamloom.picturebook import weights_folder

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""SDXL's text encoders by the names that diffusers gives them, each with a tokenizer."""

END_OF_WORD = "</w>"
"""How CLIP marks a piece that ends a word."""

_FOLDERS = ("tokenizer", "tokenizer_2")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


def load_tokenizers(base: str) -> dict[str, CLIPTokenizer]:
    """Load the tokenizers of a base model that is on this machine, by their text encoders' names.

    Args:
        base: ``picturebook``, ``sdxl``, a checkpoint (which has SDXL's), or a folder in diffusers'
            layout.

    Raises:
        BaseModelError: If there is no such base model here, or its tokenizers cannot be read.
    """
    path = Path(base)
    if base == "sdxl" or (path.suffix.lower() == ".safetensors" and path.is_file()):
        return dict(zip(TEXT_ENCODERS, make_tokenizers(), strict=True))
    folder = weights_folder() if base == "picturebook" else path
    if not base or not folder.is_dir():
        raise BaseModelError(
            f"There is no base model {base!r} on this machine whose tokenizers could be asked.",
            "Name picturebook, sdxl, a folder in diffusers' layout, or a checkpoint; fine-tunes "
            "of SDXL keep its tokenizers, so that --base sdxl answers for them.",
        )
    found = {}
    for encoder, name in zip(TEXT_ENCODERS, _FOLDERS, strict=True):
        try:
            found[encoder] = CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
            is_whole = bool(list_merges(found[encoder]))
        except _UNREADABLE:
            is_whole = False
        if not is_whole:
            raise BaseModelError(
                f"{folder / name} holds no tokenizer in CLIP's form.",
                "Name the folder that holds model_index.json, tokenizer/ and tokenizer_2/.",
            )
    return found


def list_merges(tokenizer: Any) -> list[str]:
    """List the pieces that a tokenizer's merges make, the most frequent pair of its text first."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return ["".join(pair.split() if isinstance(pair, str) else pair) for pair in merges]


def spell_piece(tokenizer: Any, piece: str) -> str:
    """Spell a piece in letters; a part of a letter stays in the tokenizer's own signs."""
    bare = piece.removesuffix(END_OF_WORD)
    spelled = str(tokenizer.convert_tokens_to_string([bare])).strip()
    return bare if "\N{REPLACEMENT CHARACTER}" in spelled or not spelled else spelled


def tokenize_text(tokenizers: Mapping[str, Any], text: str) -> dict[str, list[str]]:
    """Say what each tokenizer makes of a text, by its text encoder's name."""
    return {
        encoder: [spell_piece(tokenizer, piece) for piece in tokenizer.tokenize(text)]
        for encoder, tokenizer in tokenizers.items()
    }


def tell_reading(text: str, by_encoder: Mapping[str, Sequence[str]]) -> list[str]:
    """Say in words what text encoders read; those that read the same share a sentence."""
    read: dict[str, list[str]] = {}
    for encoder, pieces in by_encoder.items():
        read.setdefault(" · ".join(pieces), []).append(encoder)
    return [
        f"“{text}” is read as {pieces} (tokens of {' and '.join(encoders)})"
        for pieces, encoders in read.items()
    ]
