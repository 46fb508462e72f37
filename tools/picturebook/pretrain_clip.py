"""Training the judges' CLIP: pictures and captions in one space."""

import json
import random
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dreamloom.picturebook.judges import vocabulary_of
from dreamloom.picturebook.world import Drawing
from tools.picturebook.captions import attributes, caption_with_attributes
from tools.picturebook.dataset import PICTURE_PX, record
from tools.picturebook.pretrain_judges import Stores, choices, soften
from tools.picturebook.pretrain_text import tokenize
from tools.picturebook.tokenizer import MAX_TOKENS
from tools.picturebook.training import Run, Schedule, answer_loss, autocast, bf16_is_faster, seeded

_PEOPLE, _PICTURES = 32, 40
_SPACE = 128
_PEAK_RATE = 1e-3
PIXEL_MEAN, PIXEL_SPREAD = 0.5, 0.25
_PREPROCESSING = {
    "crop_size": {"height": PICTURE_PX, "width": PICTURE_PX},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [PIXEL_MEAN] * 3,
    "image_std": [PIXEL_SPREAD] * 3,
    "image_processor_type": "CLIPImageProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": PICTURE_PX},
}


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build a CLIP of 2.3 M parameters: patches of 16 px, 64 of them."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": _SPACE,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "image_size": PICTURE_PX,
        "patch_size": 16,
        "projection_dim": _SPACE,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=_SPACE)
    return CLIPModel(config)


def contrastive_loss(
    pictures: Float[Tensor, "n d"], captions: Float[Tensor, "n d"], log_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Ask of every caption which picture it describes, and the other way round.

    Source:
        Radford et al., Learning Transferable Visual Models (arXiv:2103.00020), Figure 3.
    """
    pictures = nn.functional.normalize(pictures, dim=1)
    captions = nn.functional.normalize(captions, dim=1)
    logits = log_scale.exp().clamp(max=100) * captions @ pictures.T
    own = torch.arange(len(logits), device=logits.device)
    loss: Tensor = nn.functional.cross_entropy(logits, own)
    return 0.5 * (loss + nn.functional.cross_entropy(logits.T, own))


def train_clip(
    work: Path, stores: Stores, tokenizer: CLIPTokenizer, updates: int, device: torch.device
) -> CLIPModel:
    """Train on captions, and at first on naming attributes too, which pictures teach faster."""
    torch.manual_seed(4)
    model = build_clip(tokenizer).to(device).train()
    if device.type == "cpu":
        model.set_attn_implementation("eager")
    vocabulary = vocabulary_of([attributes(record("people", index)) for index in range(4000)])
    answers = sum(len(values) for values in vocabulary.values())
    readers = nn.ModuleList([nn.Linear(_SPACE, answers), nn.Linear(_SPACE, answers)]).to(device)
    parameters = [*model.parameters(), *readers.parameters()]
    run = Run("clip", work, parameters, Schedule(_PEAK_RATE, updates))
    bf16 = bf16_is_faster(device)
    while not run.finished:
        pixels, words, said, seen = _take(run.updates_done, stores, vocabulary)
        tokens = tokenize(tokenizer, words).to(device)
        with autocast(device, bf16):
            output = model(
                input_ids=tokens, pixel_values=((pixels - PIXEL_MEAN) / PIXEL_SPREAD).to(device)
            )
            pictures, captions = output.image_embeds.float(), output.text_embeds.float()
            seeing = readers[0](8 * pictures).float()
            reading = readers[1](8 * captions).float()
        parts = [
            contrastive_loss(pictures, captions, model.logit_scale),
            0.05 * answer_loss(seeing, seen.to(device), vocabulary),
            0.05 * answer_loss(reading, said.to(device), vocabulary),
        ]
        run.step(torch.stack(parts).sum(), *parts)
    run.average.swap(run.parameters)
    return model.eval()


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the model in half precision, its tokenizer and how pictures are prepared for it."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSING, indent=1) + "\n")


_Batch = tuple[
    Float[Tensor, "n 3 h w"], list[str], Int[Tensor, "n attributes"], Int[Tensor, "n attributes"]
]


def _take(update: int, stores: Stores, vocabulary: dict[str, list[str]]) -> _Batch:
    """Take pictures, a caption of each, what the captions say and what the pictures show."""
    rng, _ = seeded("clip", update)
    words_rng = random.Random(int(rng.integers(2**62)))
    people = rng.integers(0, len(stores.people), _PEOPLE)
    pictures = rng.integers(0, len(stores.pictures), _PICTURES)
    pixels = torch.cat([stores.people.pixels(people), stores.pictures.pixels(pictures)])
    records: list[Drawing] = [stores.people.record(int(i)) for i in people]
    records += [stores.pictures.record(int(i)) for i in pictures]
    pairs = [caption_with_attributes(r, words_rng) for r in records]
    said = choices([stated for _, stated in pairs], vocabulary)
    seen = choices([attributes(r) for r in records], vocabulary)
    return soften(pixels.float() / 255, rng), [words for words, _ in pairs], said, seen
