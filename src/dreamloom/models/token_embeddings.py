"""Token embeddings of new words (placeholder tokens), attached to the text encoders for a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dreamloom.core.errors import AdapterError, ConfigError
from dreamloom.lora.token_embeddings import TokenEmbeddings

ENCODERS = ("text_encoder", "text_encoder_2")
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class ExtendedEmbedding(nn.Module):
    """A vocabulary's embeddings with more rows at its end; its own stay as they are.

    Args:
        known: The vocabulary's own embeddings, (words, features); they get no gradient.
        added: The rows of new words in float32, (new words, features).
    """

    def __init__(self, known: nn.Embedding, added: Float[Tensor, "new features"]) -> None:
        super().__init__()
        self.known = known
        self.added = nn.Parameter(added.to(known.weight.device, torch.float32))

    @property
    def weight(self) -> Tensor:
        """The vocabulary's own embeddings, whose precision transformers asks for."""
        return self.known.weight

    def forward(self, tokens: Int[Tensor, "*places"]) -> Float[Tensor, "*places features"]:
        """Look up each token."""
        size = self.known.num_embeddings
        is_new = (tokens >= size)[..., None]
        old = self.known(tokens.clamp(max=size - 1))
        new = self.added[(tokens - size).clamp(min=0)]
        return torch.where(is_new, new.to(old.dtype), old)


class AttachedTokenEmbeddings:
    """New words on a pipeline; it is as it was after `detach`.

    The tokenizers are copies that know the words; several vectors of one word are named ``word``,
    ``word_1`` and so on, as in diffusers' textual inversion, which expands them in prompts.

    Args:
        pipeline: An SDXL pipeline.
        words: Embeddings by word and text encoder.

    Raises:
        AdapterError: If a word's embeddings do not fit the text encoders.
        ConfigError: If a word is known already or cannot be one.
    """

    def __init__(self, pipeline: Any, words: TokenEmbeddings) -> None:
        for word in words:
            if not word or re.search(r"\s", word):
                raise ConfigError(
                    f"{word!r} is no single word.", "Choose one without spaces, such as <me>."
                )
        self._pipeline = pipeline
        self._words = {
            word: {n: len(rows) for n, rows in found.items()} for word, found in words.items()
        }
        self._earlier: dict[str, Any] = {}
        self._embeddings: dict[str, ExtendedEmbedding] = {}
        try:
            for encoder in ENCODERS:
                self._attach(encoder, words)
        except Exception:
            self.detach()
            raise

    def _attach(self, encoder: str, words: TokenEmbeddings) -> None:
        model = getattr(self._pipeline, encoder)
        tokenizer = copy.deepcopy(getattr(self._pipeline, _TOKENIZERS[encoder]))
        known = _find_embeddings(model).token_embedding
        rows = []
        for word, found in words.items():
            vectors = found.get(encoder)
            if vectors is None or vectors.ndim != 2 or vectors.shape[1] != known.embedding_dim:
                raise AdapterError(
                    f"The new word {word} does not fit the base model's {encoder}, whose words "
                    f"have {known.embedding_dim} features.",
                    "It was made for another base model; name that one with --base.",
                )
            names = [word, *(f"{word}_{number}" for number in range(1, len(vectors)))]
            is_known = any(len(tokenizer.tokenize(name)) < 2 for name in names)
            if is_known or tokenizer.add_tokens(names) != len(names):
                raise ConfigError(
                    f"The word {word} is known to the base model already.",
                    f"Choose one that it does not know, such as <{word.strip('<>')}>.",
                )
            rows.append(vectors)
        # Embeddings beyond the tokenizer's own words would be taken for the new ones.
        if tokenizer.convert_tokens_to_ids(next(iter(words))) != known.num_embeddings:
            raise AdapterError(
                f"The base model's {encoder} has {known.num_embeddings} embeddings for "
                f"{len(tokenizer) - sum(map(len, rows))} words, so none can be added.",
                "Train without new words on this base model.",
            )
        self._earlier[_TOKENIZERS[encoder]] = getattr(self._pipeline, _TOKENIZERS[encoder])
        self._earlier[encoder] = known
        extended = ExtendedEmbedding(known, torch.cat(rows))
        _find_embeddings(model).token_embedding = extended
        self._embeddings[encoder] = extended
        setattr(self._pipeline, _TOKENIZERS[encoder], tokenizer)

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The rows of the new words, in float32: one weight per text encoder."""
        return tuple(embedding.added for embedding in self._embeddings.values())

    def read(self) -> dict[str, dict[str, Tensor]]:
        """Copy the embeddings to the CPU."""
        words: dict[str, dict[str, Tensor]] = {word: {} for word in self._words}
        for encoder, embedding in self._embeddings.items():
            rows = embedding.added.detach().cpu().clone()
            counts = [found[encoder] for found in self._words.values()]
            for word, vectors in zip(words, rows.split(counts), strict=True):
                words[word][encoder] = vectors.clone()
        return words

    @torch.no_grad()
    def load(self, words: TokenEmbeddings) -> None:
        """Take the embeddings of the same words from an adapter.

        Raises:
            AdapterError: If a word has other embeddings there.
        """
        for encoder, embedding in self._embeddings.items():
            rows = [words[word].get(encoder, torch.empty(0, 0)) for word in self._words]
            if [len(found) for found in rows] != [one[encoder] for one in self._words.values()]:
                raise AdapterError(
                    f"A new word of the adapter to begin from does not fit {encoder}: words are "
                    "learned here with one embedding each.",
                    "Leave --from out.",
                )
            embedding.added.copy_(torch.cat(rows))

    def detach(self) -> None:
        """Forget the words."""
        for name, part in self._earlier.items():
            if name in ENCODERS:
                _find_embeddings(getattr(self._pipeline, name)).token_embedding = part
            else:
                setattr(self._pipeline, name, part)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Read the words as the base model does, letter by letter, for the time of a block."""
        own = {name: getattr(self._pipeline, name) for name in _TOKENIZERS.values()}
        try:
            for name in own:
                setattr(self._pipeline, name, self._earlier[name])
            yield
        finally:
            for name, tokenizer in own.items():
                setattr(self._pipeline, name, tokenizer)


def _find_embeddings(encoder: nn.Module) -> Any:
    for name, _ in encoder.named_modules():
        if name.rpartition(".")[2] == "token_embedding":
            return encoder.get_submodule(name.rpartition(".")[0])
    raise AdapterError("The text encoder has no embeddings of words.", "Use another base model.")


def refuse_other_words(found: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse to go on with an adapter that knows other new words than those that are learned.

    Raises:
        AdapterError: If so; names them.
    """
    differing = sorted({*found} ^ {*wanted})
    if differing:
        raise AdapterError(
            f"The adapter to begin from and this training know other new words: "
            f"{', '.join(differing)}.",
            "Name the same ones in adapter.placeholder_tokens, or leave --from out.",
        )


def start_embeddings(pipeline: Any, beginnings: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Begin each new word as the mean of the embeddings of the words that it starts from.

    The mean is not scaled to a word's usual length, neither here nor while it is trained.

    Args:
        pipeline: An SDXL pipeline that does not know the words.
        beginnings: New words, each with a word or phrase.

    Returns:
        One vector per word and text encoder.

    Raises:
        ConfigError: If a phrase holds no word.
    """
    words: dict[str, dict[str, Tensor]] = {word: {} for word in beginnings}
    for word, phrase in beginnings.items():
        for encoder in ENCODERS:
            tokenizer = getattr(pipeline, _TOKENIZERS[encoder])
            tokens = tokenizer(phrase, add_special_tokens=False).input_ids
            if not tokens:
                raise ConfigError(
                    f"The new word {word} must start from another word, not from {phrase!r}.",
                    "Name what it is, such as person or dog.",
                )
            known = _find_embeddings(getattr(pipeline, encoder)).token_embedding.weight
            rows = known[torch.tensor(tokens, device=known.device)]
            words[word][encoder] = rows.detach().float().mean(dim=0, keepdim=True).cpu()
    return words
