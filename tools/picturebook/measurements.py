"""What is measured of the picturebook itself: its parts, its pictures and its judges.

Everything is measured on world seeds that nothing was trained on. Work is handed to a pool of
processes in small pieces, so that every core is busy to the end.
"""

import operator
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from dreamloom.evaluation.stats import intervals
from dreamloom.evaluation.stats.intervals import Interval
from dreamloom.picturebook import weights_folder
from dreamloom.picturebook.judges import clip_folder, load_attribute_reader, load_identity_encoder
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
from tools.picturebook.captions import CLASS_CAPTION, attributes, caption_with_attributes
from tools.picturebook.drawing import draw
from tools.picturebook.pretrain_clip import PIXEL_MEAN, PIXEL_SPREAD
from tools.picturebook.pretrain_text import tokenize

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
_RARE = ("hair", "glasses", "hat", "view")
# Of all prompts, how many must ask for each rare attribute.
_RARE_SHARE = 0.3
_BATCH = 8
_STEPS = 25
_CAPTIONS_COMPARED = 64
_MIB = 2**20

Caption = tuple[str, dict[str, str]]
"""Words, and the attributes that they name."""


@dataclass(frozen=True)
class Row:
    """One measurement: shares and error rates are fractions, PSNR is in dB, sizes are in MiB.

    Args:
        name: What was measured.
        value: The measurement; None where it has none, and ``note`` then says why.
        goal: What it is held against.
        holds: Whether the goal is reached.
        n: How many pictures, drawings or subjects it rests on.
        interval: Where it lies with 95 % confidence.
        note: What else should be known about it.
    """

    name: str
    value: float | None
    goal: float
    holds: bool
    n: int | None = None
    interval: Interval | None = None
    note: str = ""


def _judge(
    holds: Callable[[float, float], bool],
    name: str,
    value: float,
    goal: float,
    n: int | None = None,
    interval: Interval | None = None,
    note: str = "",
) -> Row:
    return Row(name, round(value, 4), goal, holds(value, goal), n, interval, note)


at_least = partial(_judge, operator.ge)
"""Make a row whose value should be high."""
at_most = partial(_judge, operator.le)
"""Make a row whose value should be low."""


def share_at_least(name: str, right: Sequence[bool], goal: float) -> Row:
    """Make a row of how often something was right."""
    found = intervals.wilson_interval(sum(right), len(right))
    return at_least(name, float(np.mean(right)), goal, len(right), found)


def mean_at_least(name: str, values: Sequence[float], goal: float) -> Row:
    """Make a row of the mean of one value per picture."""
    estimate = intervals.mean_with_interval(np.array(values))
    return at_least(name, estimate.value, goal, estimate.n, estimate.interval)


def score_model(pool: Executor, quick: bool) -> list[Row]:
    """Measure the model and its judges; quickly means fewer pictures and so wider errors."""
    clip = pool.submit(score_clip)
    people = 20 if quick else 150
    identity = [
        pool.submit(score_identity, name, media, people, 4)
        for name, media in (("photos", MEDIA[:1]), ("all media", MEDIA))
    ]
    return [
        *score_autoencoder(pool, 12 if quick else 64),
        *score_prompts(pool, 16 if quick else 256),
        *score_reader(pool, 50 if quick else 1000),
        *clip.result(),
        *(row for future in identity for row in future.result()),
        *score_distinct(pool, 8 if quick else 128),
        *score_size(),
    ]


@cache
def load_pipeline(
    sampler: type[DDIMScheduler] | type[DPMSolverMultistepScheduler] = DDIMScheduler,
) -> StableDiffusionXLPipeline:
    """Load the shipped base model in single precision, once per process and sampler."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(weights_folder(), dtype=torch.float32)
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def to_unit(drawings: Iterable[Drawing]) -> Float[Tensor, "n 3 h w"]:
    """Draw records as a batch with values in [0, 1]."""
    arrays = np.stack([np.asarray(draw(drawing)) for drawing in drawings])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def score_autoencoder(pool: Executor, per_medium: int) -> list[Row]:
    """Encode and decode drawings, and compare them pixel by pixel."""
    measured = pool.map(measure_decibels, TRAINED_MEDIA, repeat(per_medium))
    by_medium = dict(zip(TRAINED_MEDIA, measured, strict=True))
    everywhere = [value for values in by_medium.values() for value in values]
    return [
        mean_at_least("autoencoder PSNR, photos", by_medium["photo"], 30.0),
        mean_at_least("autoencoder PSNR, all media", everywhere, 26.0),
    ]


@torch.no_grad()
def redraw(pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Encode and decode pictures with values in [-1, 1], as all that the base model draws is."""
    vae = load_pipeline().vae
    redrawn: Tensor = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    return redrawn


def measure_decibels(medium: Medium, count: int) -> list[float]:
    """Measure the PSNR of redrawn drawings of one medium, for each drawing."""
    seeds = range(JUDGING_SEED_START, JUDGING_SEED_START + count)
    found: list[float] = []
    for part in _cut([*seeds], _BATCH):
        pictures = to_unit(sample_drawing(seed, medium=medium) for seed in part) * 2 - 1
        errors = ((redraw(pictures) - pictures) / 2).square().mean(dim=(1, 2, 3))
        found += (-10 * errors.log10()).tolist()
    return found


def prompts_asking(count: int) -> list[Caption]:
    """Choose held-out captions, at first those that name something rare, then any."""
    rng = random.Random("prompts to score")
    missing = dict.fromkeys(_RARE, round(_RARE_SHARE * count))
    chosen: list[Caption] = []
    for seed in _count_from(JUDGING_SEED_START):
        words, named = caption_with_attributes(sample_drawing(seed, name=""), rng)
        wanted = any(missing[name] > 0 for name in _RARE if name in named)
        if wanted or max(missing.values()) <= 0:
            chosen.append((words, named))
            for name in _RARE:
                missing[name] -= name in named
        if len(chosen) == count:
            break
    return chosen


def score_prompts(pool: Executor, captions: int) -> list[Row]:
    """Draw from held-out captions, and let the reader say which of their words were obeyed."""
    parts = _cut(prompts_asking(captions), _BATCH)
    starts = range(0, captions, _BATCH)
    obeyed: dict[str, list[bool]] = defaultdict(list)
    for answers in chain.from_iterable(pool.map(draw_and_read, parts, starts)):
        for name, right in answers.items():
            obeyed[name].append(right)
    return [
        share_at_least(f"prompt obeyed: {name}", obeyed[name], goal)
        for name, goal in ATTRIBUTE_GOALS.items()
    ]


def draw_and_read(captions: Sequence[Caption], first_seed: int) -> list[dict[str, bool]]:
    """Draw captions; say for each which of the attributes that it names are in its picture."""
    pictures = draw_prompts(load_pipeline(), [words for words, _ in captions], first_seed)
    readings = load_attribute_reader().read(pictures)
    return [
        {name: reading.get(name) == named[name] for name in ATTRIBUTE_GOALS if name in named}
        for (_, named), reading in zip(captions, readings, strict=True)
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


def score_reader(pool: Executor, pictures: int) -> list[Row]:
    """Let the reader read held-out drawings of all media."""
    shares = chain.from_iterable(pool.map(read_drawings, _cut([*range(pictures)], 50)))
    return [mean_at_least("reader on held-out drawings", [*shares], 0.99)]


def read_drawings(numbers: Sequence[int]) -> list[float]:
    """Read held-out drawings by number; give the share that was read rightly, for each."""
    records = [
        sample_drawing(JUDGING_SEED_START + 100_000 + number, medium=MEDIA[number % len(MEDIA)])
        for number in numbers
    ]
    shares: list[float] = []
    for drawing, reading in zip(
        records, load_attribute_reader().read(to_unit(records)), strict=True
    ):
        true = attributes(drawing)
        right = [reading.get(name) == true.get(name) for name in ATTRIBUTE_GOALS]
        shares.append(float(np.mean(right)))
    return shares


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
    return [share_at_least(name, found.tolist(), 0.90)]


def score_identity(
    name: str, media: Sequence[Medium], people: int, drawings_each: int
) -> list[Row]:
    """Compare held-out drawings of the same people with drawings of different people."""
    encoder = load_identity_encoder()
    # The same people for every choice of media.
    rng = random.Random(f"identities {JUDGING_SEED_START}")
    vectors: list[Tensor] = []
    for _ in range(people):
        identity = sample_identity(rng, "person")
        drawn = [vary(identity, rng, medium=rng.choice(media)) for _ in range(drawings_each)]
        vectors.append(encoder.embed(to_unit(drawn)))
    stacked = torch.cat(vectors)
    who = torch.arange(people).repeat_interleave(drawings_each)
    pairs = torch.triu_indices(len(who), len(who), offset=1)
    similarity = (stacked @ stacked.T)[pairs[0], pairs[1]]
    rate = equal_error_rate(similarity, who[pairs[0]] == who[pairs[1]])
    return [at_most(f"identity equal error rate, {name}", rate, 0.05, len(who))]


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


def score_distinct(pool: Executor, pictures: int) -> list[Row]:
    """Ask whether `a photo of a person` shows as many people as there are pictures.

    They are drawn with DPM++: a sampler of first order narrows what a model knows. In 25 steps
    DDIM takes a twelfth from the spread of skins even where the model is perfect, and this row
    shall measure the model.
    """
    parts = _cut([*range(pictures)], _BATCH)
    drawn = np.concatenate([*pool.map(embed_pictures, parts)])
    drawings = np.concatenate([*pool.map(embed_drawings, parts)])
    rise, interval = likeness_above(drawn, drawings)
    name = "a photo of a person: identities alike, above drawings"
    return [at_most(name, rise, 0.05, pictures, interval)]


def embed_pictures(seeds: Sequence[int]) -> Float[np.ndarray, "n d"]:
    """Draw `a photo of a person` with consecutive seeds; embed who is seen."""
    prompts = [CLASS_CAPTION] * len(seeds)
    drawn = draw_prompts(load_pipeline(DPMSolverMultistepScheduler), prompts, seeds[0])
    return load_identity_encoder().embed(drawn).numpy()


def embed_drawings(numbers: Sequence[int]) -> Float[np.ndarray, "n d"]:
    """Draw different held-out persons as photos; embed who is seen."""
    records = [
        sample_drawing(JUDGING_SEED_START + 300_000 + number, kind="person", medium="photo")
        for number in numbers
    ]
    return load_identity_encoder().embed(to_unit(records)).numpy()


def likeness_above(
    pictures: Float[np.ndarray, "n d"], drawings: Float[np.ndarray, "m d"]
) -> tuple[float, Interval | None]:
    """Compare the mean similarity of pairs of pictures with that of pairs of drawings.

    Args:
        pictures: Unit vectors of two pictures or more.
        drawings: Unit vectors of two drawings or more.

    Returns:
        The difference, above 0 where pictures are more alike, and its interval.
    """
    sampled = []
    for seed, vectors in enumerate((pictures, drawings)):
        draws = intervals.draw([0] * len(vectors), seed=seed)
        similar = (vectors @ vectors.T).astype(np.float64)
        sampled.append(intervals.sample_pairs(similar, np.ones_like(similar), draws))
    above = intervals.Sampled(
        sampled[0].value - sampled[1].value, sampled[0].resampled - sampled[1].resampled
    )
    fewest = min(len(pictures), len(drawings))
    return above.value, intervals.interval(above, fewest, 0.95)


def score_size() -> list[Row]:
    """Add up the shipped files."""
    size = sum(file.stat().st_size for file in weights_folder().rglob("*") if file.is_file())
    return [at_most("weights, MiB", size / _MIB, 60.0)]


def _cut(things: Sequence[Any], length: int) -> list[list[Any]]:
    """Cut a sequence into parts of a length, the last one perhaps shorter."""
    return [list(things[start : start + length]) for start in range(0, len(things), length)]


def _count_from(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1
