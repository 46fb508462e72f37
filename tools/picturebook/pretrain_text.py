"""Teaching the text encoders to read, before the denoiser teaches them to draw.

Learning words through noisy pictures alone is slow. A few minutes of reading captions, with the
attributes that each names as the answers, gives the denoiser conditioning that means something
from its first update.
"""

import random
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreamloom.picturebook.world import Drawing
from tools.picturebook.captions import caption_with_attributes
from tools.picturebook.dataset import record
from tools.picturebook.models import TEXT_WIDTH
from tools.picturebook.training import (
    Run,
    Schedule,
    answer_loss,
    autocast,
    bf16_is_faster,
    seeded,
)

_BATCH = 64
_UNSAID = "(unsaid)"

TextEncoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Int[Tensor, "n tokens"]:
    """Turn captions into token numbers, cut or filled up to the encoders' length."""
    tokens: Int[Tensor, "n tokens"] = tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return tokens


def encode_text(
    encoders: TextEncoders, tokens: Int[Tensor, "n tokens"]
) -> tuple[Float[Tensor, "n tokens d"], Float[Tensor, "n pooled"]]:
    """Encode as SDXL does: the last layer but one of both, side by side, and the pooled second."""
    first = encoders[0](tokens, output_hidden_states=True)
    second = encoders[1](tokens, output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return hidden, second.text_embeds


def train_text_encoders(
    work: Path,
    encoders: TextEncoders,
    tokenizer: CLIPTokenizer,
    updates: int,
    device: torch.device,
) -> None:
    """Train both encoders to state what a caption says, and how a known person looks."""
    questions = _questions()
    torch.manual_seed(1)
    answers = sum(len(values) for values in questions.values())
    # One reader of the pooled embedding, one of the words' own embeddings at the caption's end.
    readers = nn.ModuleList([nn.Linear(TEXT_WIDTH, answers), nn.Linear(2 * TEXT_WIDTH, answers)])
    parts = [*encoders, readers]
    for part in parts:
        part.to(device).train()
    parameters = [p for part in parts for p in part.parameters()]
    run = Run("text", work, parameters, Schedule(1e-3, updates))
    bf16 = bf16_is_faster(device)
    while not run.finished:
        captions, truths = _batch(questions, run.updates_done)
        tokens = tokenize(tokenizer, captions).to(device)
        ends = (tokens == tokenizer.eos_token_id).int().argmax(dim=1)
        with autocast(device, bf16):
            hidden, pooled = encode_text(encoders, tokens)
            at_end = hidden[torch.arange(len(ends), device=device), ends]
            loss = answer_loss(readers[0](pooled).float(), truths.to(device), questions)
            loss = loss + answer_loss(readers[1](at_end).float(), truths.to(device), questions)
        run.step(loss)
    run.average.swap(run.parameters)


def _stated(drawing: Drawing, rng: random.Random) -> tuple[str, dict[str, str]]:
    """Write a caption, and say what a reader of it knows."""
    words, stated = caption_with_attributes(drawing, rng)
    if drawing.name and drawing.name in words.split():
        looks = asdict(drawing.identity)
        known = ("skin", "hair", "style", "eyes", "beard", "brows", "mark", "earrings")
        stated |= {f"known {name}": str(looks[name]) for name in known}
    return words, stated


def _questions() -> dict[str, list[str]]:
    """List every attribute with its possible answers; the first is that it is not said."""
    rng = random.Random("questions")
    values: dict[str, set[str]] = {}
    for index in range(4000):
        for name, value in _stated(record("pictures", index), rng)[1].items():
            values.setdefault(name, set()).add(value)
    return {name: [_UNSAID, *sorted(values[name])] for name in sorted(values)}


def _batch(
    questions: dict[str, list[str]], update: int
) -> tuple[list[str], Int[Tensor, "n questions"]]:
    rng = random.Random(f"text {update}")
    numbers, _ = seeded("text", update)
    pairs = [
        _stated(record("pictures", int(i)), rng) for i in numbers.integers(0, 1_000_000, _BATCH)
    ]
    truths = [
        [values.index(stated.get(name, _UNSAID)) for name, values in questions.items()]
        for _, stated in pairs
    ]
    return [words for words, _ in pairs], torch.tensor(truths)
