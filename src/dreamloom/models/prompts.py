"""Prompts: cut into chunks of the text encoders' length, encoded, with weights where asked for.

A prompt of more tokens than the text encoders read at once is cut into chunks, each between a
begin and an end token of its own. What comes out stands one behind the other; the pooled embedding
is the first chunk's. A prompt that fits is encoded as diffusers' pipeline does, bit for bit.

Source:
    ComfyUI, comfy/sd1_clip.py, and AUTOMATIC1111, modules/sd_hijack_clip.py, which agree in this.
    As in ComfyUI, words of fewer than 8 tokens are not cut in two. Shorter prompts of a batch are
    repeated until all are equally long, as ComfyUI does (comfy/conds.py): attention to the same
    tokens twice is attention to them once. AUTOMATIC1111 appends empty chunks, by which a picture
    would depend on the others of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamloom.core.device import send
from dreamloom.models.prompt_weights import find_foreign_syntax, parse_weights

# Words of so many tokens and more may be cut in two, as in ComfyUI.
_LONG_WORD = 8
_MOST_NAMED, _MOST_SHOWN = 3, 60

_Tokens: TypeAlias = list[tuple[int, float]]
"""Numbers of tokens, each with its weight."""


@dataclass(frozen=True)
class SDXLConditioning:
    """Token embeddings of both text encoders, and the second one's pooled embedding.

    Args:
        tokens: The embeddings, one row a prompt.
        pooled: The pooled embeddings.
        lengths: How many tokens of its row are each prompt's own, where that is not all of them.
    """

    tokens: Float[Tensor, "prompts tokens features"]
    pooled: Float[Tensor, "prompts pooled"]
    lengths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, rows: Int[Tensor, " n"]) -> SDXLConditioning:
        """Select prompts by index, equally long."""
        lengths = tuple(self.lengths[row] for row in rows.tolist()) if self.lengths else ()
        rows = send(rows, self.tokens.device)
        return SDXLConditioning(self.tokens[rows], self.pooled[rows], lengths).aligned()

    def to(self, dtype: torch.dtype) -> SDXLConditioning:
        """The same in another precision."""
        return SDXLConditioning(self.tokens.to(dtype), self.pooled.to(dtype), self.lengths)

    def zeroed(self, dropped: Sequence[bool]) -> SDXLConditioning:
        """The same with zeros in place of some prompts."""
        if not any(dropped):
            return self
        said = send(torch.tensor(dropped).logical_not(), self.tokens.device).to(self.tokens.dtype)
        return SDXLConditioning(
            self.tokens * said[:, None, None], self.pooled * said[:, None], self.lengths
        )

    def aligned(self, multiple_of: int = 1) -> SDXLConditioning:
        """Repeat every prompt until all are equally long, which changes nothing of attention.

        Args:
            multiple_of: The length in tokens is a multiple of it, too.
        """
        own = self.lengths or (self.tokens.shape[1],) * len(self)
        length = math.lcm(multiple_of, *own)
        if length == self.tokens.shape[1]:
            return self
        rows = [
            row[:count].repeat(length // count, 1)
            for row, count in zip(self.tokens, own, strict=True)
        ]
        return SDXLConditioning(torch.stack(rows), self.pooled, own)


@dataclass(frozen=True)
class _CutPrompts:
    """Prompts as chunks of tokens, all first chunks before all others.

    Args:
        counts: The chunks of each prompt.
        tokens: For each text encoder, the chunks.
        weights: For each text encoder, the tokens' weights; None where all are 1.
    """

    counts: tuple[int, ...]
    tokens: list[Int[Tensor, "chunks tokens"]]
    weights: list[Float[Tensor, "chunks tokens"] | None]


class PromptEncoder:
    """Encodes prompts with both of a pipeline's text encoders; gradients flow where recorded.

    Tokens are kept, so that a training, which encodes its prompts anew at each update, cuts them
    once.

    Args:
        pipeline: diffusers' pipeline with its two tokenizers and text encoders.
        device: Where the text encoders compute.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._known: dict[tuple[Any, ...], _CutPrompts] = {}

    def encode(self, prompts: Sequence[str], weighted: bool = False) -> SDXLConditioning:
        """Encode prompts, and with ``weighted`` read the weights that are written in them.

        A weight moves a token's embedding away from that of the empty prompt at its place, or
        nearer to it, as in ComfyUI: e = e₀ + w (e - e₀). The pooled embedding is not weighted.
        """
        cut = self._cut(tuple(prompts), weighted)
        pipeline = self._pipeline
        embedded, pooled = [], torch.empty(0)
        for number, encoder in enumerate((pipeline.text_encoder, pipeline.text_encoder_2)):
            tokens, weights, first = cut.tokens[number], cut.weights[number], len(prompts)
            found, pooled = _run(encoder, tokens[:first])
            if len(tokens) > first:
                # Apart from the first ones, whose batch is as if there were no others.
                found = torch.cat([found, _run(encoder, tokens[first:])[0]])
            if weights is not None:
                empty = _run(encoder, self._cut(("",), False).tokens[number])[0]
                moved = empty + weights[..., None] * (found - empty)
                found = torch.where(weights[..., None] == 1, found, moved)
            embedded.append(found)
        chunks = torch.cat(embedded, dim=-1)
        if max(cut.counts) == 1:
            return SDXLConditioning(chunks, pooled)
        tokens, lengths = _join(chunks, cut.counts)
        return SDXLConditioning(tokens, pooled, lengths)

    def note(self, prompts: Sequence[str], weighted: bool = False) -> list[str]:
        """Say of which prompts a user should know how they are read: long ones, foreign syntax."""
        room = _room(self._pipeline.tokenizer)
        notes, long = [], []
        for text in dict.fromkeys(prompts):
            tokens = max(len(self._tokenize(one, text, weighted)) for one in self._tokenizers())
            chunks = self._cut((text,), weighted).counts[0]
            if chunks > 1:
                long.append(
                    f"{_quote(text)} has {tokens} tokens, more than the {room} that the text "
                    f"encoders read at once: it is encoded in {chunks} chunks"
                )
            notes += [f"{_quote(text)}: {told}" for told in find_foreign_syntax(text, weighted)]
        for kind in (long, notes):
            more = len(kind) - _MOST_NAMED
            if more > 0:
                kind[_MOST_NAMED:] = [f"the same holds for {more} more of the prompts"]
        return long + notes

    def _tokenizers(self) -> tuple[Any, Any]:
        return self._pipeline.tokenizer, self._pipeline.tokenizer_2

    def _cut(self, prompts: tuple[str, ...], weighted: bool) -> _CutPrompts:
        # New words come with tokenizers of their own.
        key = (*self._tokenizers(), prompts, weighted)
        if key not in self._known:
            by_encoder = [
                [_split(tokenizer, self._tokenize(tokenizer, text, weighted)) for text in prompts]
                for tokenizer in self._tokenizers()
            ]
            # A new word can have more vectors in one text encoder than in the other.
            counts = tuple(max(map(len, both)) for both in zip(*by_encoder, strict=True))
            tokens, weights = [], []
            for tokenizer, cut in zip(self._tokenizers(), by_encoder, strict=True):
                for chunks, count in zip(cut, counts, strict=True):
                    chunks += [[]] * (count - len(chunks))
                ordered = [chunks[0] for chunks in cut]
                ordered += [chunk for chunks in cut for chunk in chunks[1:]]
                framed = [_frame(tokenizer, chunk) for chunk in ordered]
                numbers = torch.tensor([[number for number, _ in chunk] for chunk in framed])
                factors = [[weight for _, weight in chunk] for chunk in framed]
                plain = all(weight == 1 for row in factors for weight in row)
                tokens.append(numbers.to(self._device))
                weights.append(None if plain else torch.tensor(factors).to(self._device))
            self._known[key] = _CutPrompts(counts, tokens, weights)
        return self._known[key]

    def _tokenize(self, tokenizer: Any, text: str, weighted: bool) -> _Tokens:
        tokens: _Tokens = []
        for piece, weight in parse_weights(text) if weighted else [(text, 1.0)]:
            converted = self._pipeline.maybe_convert_prompt(piece, tokenizer)
            numbers = tokenizer(converted, add_special_tokens=False, verbose=False).input_ids
            tokens += [(number, weight) for number in numbers]
        return tokens


def split_alike(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Split rows into batches of one length and at most ``most`` rows; shorter ones come first."""
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = []
    for _, alike in groupby(rows, key=lengths.__getitem__):
        some = list(alike)
        batches += [some[start : start + most] for start in range(0, len(some), most)]
    return batches


def _room(tokenizer: Any) -> int:
    """How many tokens stand between a chunk's begin and end tokens."""
    return int(tokenizer.model_max_length) - 2


def _split(tokenizer: Any, tokens: _Tokens) -> list[_Tokens]:
    """Split a prompt's tokens into chunks, at the ends of words."""
    room = _room(tokenizer)
    chunks: list[_Tokens] = [[]]
    for word in _list_words(tokenizer, tokens):
        if len(chunks[-1]) + len(word) > room and len(word) < min(_LONG_WORD, room + 1):
            chunks.append([])
        for token in word:
            if len(chunks[-1]) == room:
                chunks.append([])
            chunks[-1].append(token)
    return chunks


def _list_words(tokenizer: Any, tokens: _Tokens) -> Iterator[_Tokens]:
    word: _Tokens = []
    added = tokenizer.get_added_vocab()
    names = tokenizer.convert_ids_to_tokens([number for number, _ in tokens])
    for token, name in zip(tokens, names, strict=True):
        word.append(token)
        if name.endswith("</w>") or name in added:
            yield word
            word = []
    if word:
        yield word


def _frame(tokenizer: Any, chunk: _Tokens) -> _Tokens:
    """Put a chunk between begin and end and fill it up, as the tokenizer itself does."""
    framed = [(tokenizer.bos_token_id, 1.0), *chunk, (tokenizer.eos_token_id, 1.0)]
    missing = int(tokenizer.model_max_length) - len(framed)
    return framed + [(tokenizer.pad_token_id, 1.0)] * missing


def _run(
    encoder: Any, tokens: Int[Tensor, "chunks tokens"]
) -> tuple[Float[Tensor, "chunks tokens features"], Float[Tensor, "chunks pooled"]]:
    """Encode chunks: what goes into the last layer, as SDXL was trained, and the pooled output."""
    caught: list[Tensor] = []
    inner = getattr(encoder, "text_model", encoder)
    hook = inner.encoder.layers[-1].register_forward_pre_hook(
        lambda layer, inputs: caught.append(inputs[0])
    )
    try:
        pooled = encoder(tokens)[0]
    finally:
        hook.remove()
    return caught[0], pooled


def _join(
    chunks: Float[Tensor, "chunks tokens features"], counts: Sequence[int]
) -> tuple[Float[Tensor, "prompts longest features"], tuple[int, ...]]:
    """Put each prompt's chunks one behind the other; shorter rows end in zeros."""
    rows, rest = [], len(counts)
    for number, count in enumerate(counts):
        more = chunks[rest : rest + count - 1]
        rest += count - 1
        rows.append(torch.cat([chunks[number], *more]))
    lengths = tuple(len(row) for row in rows)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def _quote(text: str) -> str:
    """Quote a prompt, or its beginning."""
    return f'"{text}"' if len(text) <= _MOST_SHOWN else f'"{text[:_MOST_SHOWN].rstrip()}…"'
