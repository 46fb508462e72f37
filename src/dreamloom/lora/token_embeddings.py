"""Token embeddings (textual inversion) of a LoRA's new words, in files beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.core.run_folder import file_sha256
from dreamloom.lora.tensors import open_tensors, save_tensors

TOKENS_KEY, HASH_KEY = "dreamloom.words", "dreamloom.words_sha256"
# What tools call SDXL's two text encoders in files of embeddings.
_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

# How OneTrainer, AUTOMATIC1111 and SD.Next name words that lie in the adapter's own file.
_BUNDLED = "bundle_emb."

TokenEmbeddings = Mapping[str, Mapping[str, Tensor]]
"""New words, each with embeddings of shape (vectors, features) by text encoder."""


def tokens_folder(path: Path) -> Path:
    """The folder beside an adapter's own file that holds its new words: ``NAME-tokens``."""
    return path.with_name(f"{path.stem}-tokens")


def list_token_files(path: Path) -> list[Path]:
    """List the files of an adapter's new words as DreamLoom writes them; none if it has none."""
    return sorted(tokens_folder(path).glob("*.safetensors"))


def write_token_embeddings(path: Path, words: TokenEmbeddings) -> dict[str, str]:
    """Write an adapter's new words beside its file, one file a word; without any, write nothing.

    ``<rraj>`` becomes ``NAME-tokens/rraj.safetensors``: ComfyUI calls it ``embedding:rraj`` and
    AUTOMATIC1111 ``rraj`` once the file lies among their embeddings, for both take the name of the
    file. diffusers loads one encoder's with
    ``load_textual_inversion(file["clip_l"], token="<rraj>")``.

    Args:
        path: The adapter's own file.
        words: Embeddings of shape (vectors, features) by word and text encoder.

    Returns:
        What the adapter's own header must say, so that `read_token_embeddings` finds them.

    Raises:
        AdapterError: If an embedding is not finite.
    """
    if not words:
        return {}
    for word, found in words.items():
        if not all(torch.isfinite(rows).all() for rows in found.values()):
            raise AdapterError(f"The embedding of {word} is not finite.", "Nothing was written.")
    folder, listed = tokens_folder(path), {}
    folder.mkdir(parents=True, exist_ok=True)
    for word, name in _name_files(words).items():
        tensors = {
            key: words[word][encoder].float()
            for encoder, key in _NAMES.items()
            if encoder in words[word]
        }
        file = folder / name
        save_tensors(file, tensors, {"format": "pt", "dreamloom.word": word})
        listed[word] = {"file": name, "sha256": file_sha256(file)}
    return {TOKENS_KEY: json.dumps(listed)}


def _name_files(words: Iterable[str]) -> dict[str, str]:
    """Name each word's file after it, as other programs call the word by its file."""
    names: dict[str, str] = {}
    for word in words:
        stem = re.sub(r"[^\w-]+", "_", word.strip("<>")).strip("_") or "word"
        taken = {name.lower() for name in names.values()}
        name, number = f"{stem}.safetensors", 1
        while name.lower() in taken:
            name, number = f"{stem}_{number + 1}.safetensors", number + 1
        names[word] = name
    return names


def read_token_embeddings(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Read the new words that an adapter's header tells of, from the files beside it.

    Raises:
        AdapterError: If a file is missing, damaged or another adapter's.
    """
    if TOKENS_KEY not in metadata:
        return {}
    try:
        listed: dict[str, dict[str, Any]] = json.loads(metadata[TOKENS_KEY])
        words = (
            _read_earlier(path, metadata[HASH_KEY], listed)
            if HASH_KEY in metadata
            else {
                word: _read_word(_find_file(path, word, told["file"], told["sha256"]))
                for word, told in listed.items()
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"The new words of {path} cannot be read: {error}.", "Get its files again."
        ) from error
    for word, found in words.items():
        if not all(torch.isfinite(rows.float()).all() for rows in found.values()):
            raise AdapterError(
                f"The embedding of {word} of {path} holds NaN or infinity.",
                "Use the words of an earlier checkpoint.",
            )
    return words


def _find_file(path: Path, word: str, name: str, sha256: str) -> Path:
    """Find a word's file by its hash: in the adapter's folder of words, or near it.

    Whoever renames the adapter, or gathers the words of several, loses none.
    """
    name = Path(name).name
    places = [tokens_folder(path) / name, path.with_name(name)]
    places += sorted(path.parent.glob(f"*-tokens/{name}"))
    there = [place for place in places if place.is_file()]
    for place in there:
        if file_sha256(place) == sha256:
            return place
    if there:
        raise AdapterError(
            f"{there[0]} holds another {word} than {path} was taught with.",
            "Put the file there that was written together with the adapter.",
        )
    raise AdapterError(
        f"{path} needs its new word {word}, and {places[0].relative_to(path.parent)} is not "
        "beside it.",
        f"Put that file there; it was written as {name}.",
    )


def _read_word(file: Path) -> dict[str, Tensor]:
    tensors, _ = open_tensors(file)
    return {e: tensors[key].float() for e, key in _NAMES.items() if key in tensors}


def _read_earlier(
    path: Path, sha256: str, listed: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Tensor]]:
    """Read the words of adapters that kept all of them in one file, ``NAME-tokens.safetensors``."""
    beside = path.with_name(f"{path.stem}-tokens.safetensors")
    if not beside.is_file():
        raise AdapterError(
            f"{path} needs its new words, {', '.join(listed)}, and {beside.name} is not beside it.",
            f"Put that file there; it was written as {beside.name}.",
        )
    if file_sha256(beside) != sha256:
        raise AdapterError(
            f"{beside} holds other words than {path} was taught with.",
            "Put the file there that was written together with the adapter.",
        )
    tensors, _ = open_tensors(beside)
    words: dict[str, dict[str, Tensor]] = {word: {} for word in listed}
    for encoder, key in _NAMES.items():
        owners = [word for word, found in listed.items() if encoder in found]
        if owners:
            counts = [listed[word][encoder] for word in owners]
            for word, rows in zip(owners, tensors[key].float().split(counts), strict=True):
                words[word][encoder] = rows.clone()
    return words


def split_bundled(
    path: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Take out the new words that OneTrainer bundles with a file's layers.

    Returns:
        The words, each with embeddings of shape (vectors, features) by text encoder, and the other
        tensors.

    Raises:
        AdapterError: If a word has vectors that are no embeddings of SDXL's text encoders.
    """
    words: dict[str, dict[str, Tensor]] = {}
    others = {key: tensor for key, tensor in tensors.items() if not key.startswith(_BUNDLED)}
    encoders = {name: encoder for encoder, name in _NAMES.items()}
    for key in sorted(tensors.keys() - others.keys()):
        word, _, name = key.removeprefix(_BUNDLED).rpartition(".")
        rows = tensors[key]
        if not word or name not in encoders or rows.ndim != 2:
            raise AdapterError(
                f"{path} bundles {key} of shape {tuple(rows.shape)}, which is no embedding of one "
                "of SDXL's text encoders.",
                "DreamLoom reads bundled words as clip_l and clip_g, (vectors, features); "
                "OneTrainer's output embeddings are none.",
            )
        words.setdefault(word, {})[encoders[name]] = rows.float()
    return words, others


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
