"""Token embeddings (textual inversion) of a LoRA's new words, in a file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.core.run_folder import file_sha256
from dreamloom.lora.tensors import save_tensors

TOKENS_KEY, HASH_KEY = "dreamloom.words", "dreamloom.words_sha256"
# What tools call SDXL's two text encoders in files of embeddings.
_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

TokenEmbeddings = Mapping[str, Mapping[str, Tensor]]
"""New words, each with embeddings of shape (vectors, features) by text encoder."""


def token_embeddings_file(path: Path) -> Path:
    """The file beside an adapter's own that holds its new words: ``NAME-tokens.safetensors``."""
    return path.with_name(f"{path.stem}-tokens.safetensors")


def write_token_embeddings(path: Path, words: TokenEmbeddings) -> dict[str, str]:
    """Write an adapter's new words beside its file; without any, write nothing.

    The embeddings of all words stand below each other, in the order that the header tells.
    diffusers loads one encoder's with ``load_textual_inversion(file["clip_l"], token=[…])``; a file
    for several words needs as many names there.

    Args:
        path: The adapter's own file.
        words: Embeddings of shape (vectors, features) by word and text encoder.

    Returns:
        What the adapter's own header must say, so that `read_token_embeddings` finds them.
    """
    if not words:
        return {}
    beside = token_embeddings_file(path)
    listed = {word: {n: len(rows) for n, rows in found.items()} for word, found in words.items()}
    tensors = {
        key: torch.cat([words[word][encoder] for word in listed if encoder in words[word]]).float()
        for encoder, key in _NAMES.items()
        if any(encoder in found for found in words.values())
    }
    if not all(torch.isfinite(rows).all() for rows in tensors.values()):
        raise AdapterError(
            f"The embedding of {', '.join(listed)} is not finite.", "Nothing was written."
        )
    header = {"format": "pt", TOKENS_KEY: json.dumps(listed)}
    save_tensors(beside, tensors, header)
    return {TOKENS_KEY: json.dumps(listed), HASH_KEY: file_sha256(beside)}


def read_token_embeddings(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Read the new words that an adapter's header tells of, from the file beside it.

    Raises:
        AdapterError: If that file is missing, damaged or another adapter's.
    """
    if TOKENS_KEY not in metadata:
        return {}
    beside = token_embeddings_file(path)
    try:
        listed: dict[str, dict[str, int]] = json.loads(metadata[TOKENS_KEY])
        if not beside.is_file():
            raise AdapterError(
                f"{path} needs its new words, {', '.join(listed)}, and {beside.name} is not "
                "beside it.",
                f"Put that file there; it was written as {beside.name}.",
            )
        if file_sha256(beside) != metadata.get(HASH_KEY):
            raise AdapterError(
                f"{beside} holds other words than {path} was taught with.",
                "Put the file there that was written together with the adapter.",
            )
        with safe_open(beside, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if not all(torch.isfinite(rows.float()).all() for rows in tensors.values()):
            raise AdapterError(
                f"{beside} holds NaN or infinity.", "Use the words of an earlier checkpoint."
            )
        words: dict[str, dict[str, Tensor]] = {word: {} for word in listed}
        for encoder, key in _NAMES.items():
            owners = [word for word, found in listed.items() if encoder in found]
            if owners:
                counts = [listed[word][encoder] for word in owners]
                for word, rows in zip(owners, tensors[key].float().split(counts), strict=True):
                    words[word][encoder] = rows.clone()
        return words
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"The new words of {path} cannot be read: {error}.", "Get both files again."
        ) from error


def gather_token_embeddings(parts: Sequence[TokenEmbeddings]) -> dict[str, Mapping[str, Tensor]]:
    """Put the words of several adapters together.

    Raises:
        AdapterError: If two teach one word differently.
    """
    gathered: dict[str, Mapping[str, Tensor]] = {}
    for words in parts:
        for word, found in words.items():
            known = gathered.get(word)
            if known is not None and not (
                known.keys() == found.keys()
                and all(torch.equal(known[encoder], found[encoder]) for encoder in found)
            ):
                raise AdapterError(
                    f"Two adapters teach the word {word} in different ways.",
                    "Wear one of them, or teach one again with another word.",
                )
            gathered[word] = found
    return gathered
