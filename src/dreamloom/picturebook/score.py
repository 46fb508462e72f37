"""Measure the picturebook: ``python -m dreamloom.picturebook.score [--json FILE]``.

Everything is measured on world seeds that nothing was trained on. The table's rows are also
written as ``{"rows": [{"name", "value", "goal", "holds"}]}``.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from dreamloom.picturebook import weights_folder
from dreamloom.picturebook.captions import attributes, caption_with_attributes
from dreamloom.picturebook.drawing import draw
from dreamloom.picturebook.judges import (
    clip_folder,
    load_attribute_reader,
    load_identity_encoder,
)
from dreamloom.picturebook.pretrain_clip import PIXEL_MEAN, PIXEL_SPREAD
from dreamloom.picturebook.pretrain_text import tokenize
from dreamloom.picturebook.training import prepare_threads
from dreamloom.picturebook.world import (
    JUDGING_SEED_START,
    MEDIA,
    TRAINED_MEDIA,
    Drawing,
    Medium,
    sample_drawing,
    sample_identity,
    vary,
)

# The attributes that a prompt must be obeyed in, and the share in which it should be.
ATTRIBUTE_GOALS = {
    "kind": 0.98,
    "scene": 0.95,
    "medium": 0.95,
    "hair": 0.90,
    "glasses": 0.90,
    "hat": 0.90,
    "view": 0.90,
}
GUIDANCE = 4.0
_BATCH = 8
_STEPS = 25
_CAPTIONS_COMPARED = 64
_MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One measurement: shares and error rates are fractions, PSNR is in dB, sizes are in MiB."""

    name: str
    value: float
    goal: float
    holds: bool


def at_least(name: str, value: float, goal: float) -> Row:
    """Make a row whose value should be high."""
    return Row(name, round(value, 4), goal, value >= goal)


def at_most(name: str, value: float, goal: float) -> Row:
    """Make a row whose value should be low."""
    return Row(name, round(value, 4), goal, value <= goal)


def to_unit(drawings: Iterable[Drawing]) -> Float[Tensor, "n 3 h w"]:
    """Draw records as a batch with values in [0, 1]."""
    arrays = np.stack([np.asarray(draw(drawing)) for drawing in drawings])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def score_autoencoder(pipeline: StableDiffusionXLPipeline, per_medium: int) -> list[Row]:
    """Encode and decode drawings, and compare them pixel by pixel."""

    def decibels(medium: Medium) -> float:
        seeds = range(JUDGING_SEED_START, JUDGING_SEED_START + per_medium)
        pictures = to_unit(sample_drawing(seed, medium=medium) for seed in seeds) * 2 - 1
        latents = pipeline.vae.encode(pictures).latent_dist.mean
        redrawn = pipeline.vae.decode(latents).sample.clamp(-1, 1)
        errors = ((redrawn - pictures) / 2).square().mean(dim=(1, 2, 3))
        return float((-10 * errors.log10()).mean())

    by_medium = {medium: decibels(medium) for medium in TRAINED_MEDIA}
    everywhere = float(np.mean(list(by_medium.values())))
    return [
        at_least("autoencoder PSNR, photos", by_medium["photo"], 30.0),
        at_least("autoencoder PSNR, all media", everywhere, 26.0),
    ]


def prompts_asking(per_attribute: int) -> list[tuple[str, dict[str, str]]]:
    """Choose held-out captions until each attribute is named often enough."""
    rng = random.Random("prompts to score")
    asked: dict[str, int] = dict.fromkeys(ATTRIBUTE_GOALS, 0)
    chosen: list[tuple[str, dict[str, str]]] = []
    seed = JUDGING_SEED_START
    while min(asked.values()) < per_attribute:
        words, named = caption_with_attributes(sample_drawing(seed, name=""), rng)
        rare = [name for name in ("hair", "glasses", "hat", "view") if name in named]
        if rare and min(asked[name] for name in rare) < per_attribute:
            chosen.append((words, named))
            for name in asked:
                asked[name] += name in named
        seed += 1
    return chosen


def score_prompts(pipeline: StableDiffusionXLPipeline, per_attribute: int) -> list[Row]:
    """Draw from held-out captions, and let the reader say which of their words were obeyed."""
    reader = load_attribute_reader()
    asked = prompts_asking(per_attribute)
    obeyed: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        pictures = draw_prompts(pipeline, [words for words, _ in part], start)
        for (_, named), reading in zip(part, reader.read(pictures), strict=True):
            for name in ATTRIBUTE_GOALS.keys() & named.keys():
                obeyed[name].append(reading.get(name) == named[name])
    return [
        at_least(f"prompt obeyed: {name}", float(np.mean(obeyed[name])), goal)
        for name, goal in ATTRIBUTE_GOALS.items()
    ]


def draw_prompts(
    pipeline: StableDiffusionXLPipeline,
    prompts: list[str],
    first_seed: int,
    guidance: float = GUIDANCE,
) -> Float[Tensor, "n 3 h w"]:
    """Draw one picture of each prompt, with values in [0, 1]."""
    seeds = range(first_seed, first_seed + len(prompts))
    pictures: Any = pipeline(
        prompts,
        num_inference_steps=_STEPS,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return torch.as_tensor(pictures).float()


def score_reader(pictures: int) -> list[Row]:
    """Let the reader read held-out drawings of all media."""
    reader = load_attribute_reader()
    records = [
        sample_drawing(JUDGING_SEED_START + 100_000 + i, medium=MEDIA[i % len(MEDIA)])
        for i in range(pictures)
    ]
    right: list[bool] = []
    for start in range(0, pictures, 50):
        part = records[start : start + 50]
        for drawing, reading in zip(part, reader.read(to_unit(part)), strict=True):
            true = attributes(drawing)
            right += [reading.get(name) == true.get(name) for name in ATTRIBUTE_GOALS]
    return [at_least("reader on held-out drawings", float(np.mean(right)), 0.99)]


def distinct_captions(count: int) -> tuple[list[Drawing], list[str]]:
    """Choose held-out drawings with captions each of which is true of its own drawing alone."""
    rng = random.Random("captions to tell apart")
    chosen: list[tuple[Drawing, str, dict[str, str]]] = []
    for seed in _count_from(JUDGING_SEED_START + 200_000):
        drawing = sample_drawing(seed, name="")
        words, named = caption_with_attributes(drawing, rng)
        true = attributes(drawing)
        clear = all(
            not named.items() <= attributes(other).items() and not said.items() <= true.items()
            for other, _, said in chosen
        )
        if clear:
            chosen.append((drawing, words, named))
        if len(chosen) == count:
            break
    return [drawing for drawing, _, _ in chosen], [words for _, words, _ in chosen]


@torch.no_grad()
def score_clip() -> list[Row]:
    """Ask the CLIP for the picture of each caption."""
    model = CLIPModel.from_pretrained(clip_folder(), dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder())
    drawings, captions = distinct_captions(_CAPTIONS_COMPARED)
    pixels = (to_unit(drawings) - PIXEL_MEAN) / PIXEL_SPREAD
    output = model(input_ids=tokenize(tokenizer, captions), pixel_values=pixels)
    found = output.logits_per_text.argmax(dim=1) == torch.arange(len(captions))
    name = f"CLIP: caption's picture found among {len(captions)}"
    return [at_least(name, float(found.float().mean()), 0.90)]


def score_identity(people: int, drawings_each: int) -> list[Row]:
    """Compare held-out drawings of the same people with drawings of different people."""
    encoder = load_identity_encoder()
    rng = random.Random(f"identities {JUDGING_SEED_START}")
    rates: list[Row] = []
    for name, media in (("photos", MEDIA[:1]), ("all media", MEDIA)):
        vectors: list[Tensor] = []
        for _ in range(people):
            identity = sample_identity(rng, "person")
            drawn = [vary(identity, rng, medium=rng.choice(media)) for _ in range(drawings_each)]
            vectors.append(encoder.embed(to_unit(drawn)))
        stacked = torch.cat(vectors)
        who = torch.arange(people).repeat_interleave(drawings_each)
        pairs = torch.triu_indices(len(who), len(who), offset=1)
        similarity = (stacked @ stacked.T)[pairs[0], pairs[1]]
        same = who[pairs[0]] == who[pairs[1]]
        rate = equal_error_rate(similarity, same)
        rates.append(at_most(f"identity equal error rate, {name}", rate, 0.05))
    return rates


def equal_error_rate(similarity: Float[Tensor, " pairs"], same: Bool[Tensor, " pairs"]) -> float:
    """Return the error rate at the threshold where both kinds of error are equally frequent.

    Example:
        >>> equal_error_rate(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([True, True, False]))
        0.0
    """
    order = similarity.argsort(descending=True)
    same = same[order].double()
    missed = 1 - same.cumsum(0) / same.sum()
    mistaken = (1 - same).cumsum(0) / (1 - same).sum()
    nearest = (missed - mistaken).abs().argmin()
    return float((missed[nearest] + mistaken[nearest]) / 2)


def score_size() -> list[Row]:
    """Add up the shipped files."""
    size = sum(file.stat().st_size for file in weights_folder().rglob("*") if file.is_file())
    return [at_most("weights, MiB", size / _MIB, 60.0)]


def load_pipeline() -> StableDiffusionXLPipeline:
    """Load the shipped base model for DDIM sampling, in single precision."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        weights_folder(), torch_dtype=torch.float32
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def score_all(quick: bool) -> list[Row]:
    """Measure everything; quickly means fewer pictures and so wider errors."""
    pipeline = load_pipeline()
    return [
        *score_autoencoder(pipeline, 12 if quick else 64),
        *score_prompts(pipeline, 4 if quick else 40),
        *score_reader(50 if quick else 1000),
        *score_clip(),
        *score_identity(20 if quick else 150, 4),
        *score_size(),
    ]


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write here.")
@click.option("--quick", is_flag=True, help="Fewer pictures: half a minute instead of minutes.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(json_file: Path | None, quick: bool, threads: int) -> None:
    """Measure the embedded base model and its judges."""
    prepare_threads(threads)
    rows = score_all(quick)
    for row in rows:
        held = "holds" if row.holds else "missed"
        click.echo(f"{row.name:45} {row.value:9.4f}   goal {row.goal:<6g} {held}")
    if json_file is not None:
        json_file.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _count_from(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1


if __name__ == "__main__":
    main()
