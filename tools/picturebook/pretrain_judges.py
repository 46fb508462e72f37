"""Training the judges, on drawings only and apart from the base model."""

import copy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dreamloom.picturebook.judges import FEATURES, AttributeReader, IdentityEncoder, vocabulary_of
from dreamloom.picturebook.world import MEDIA
from tools.picturebook.captions import attributes
from tools.picturebook.dataset import DRAWINGS_PER_IDENTITY, PictureStore, record
from tools.picturebook.training import (
    Run,
    Schedule,
    answer_loss,
    autocast,
    bf16_is_faster,
    seeded,
)

_BATCH = 64
_DRAWINGS_EACH = 4
# How many figures a batch shows in several drawings each; the world's own pictures fill it up.
_IDENTITIES: dict[str, int] = {"judges": 12, "identity": 12, "reader": 10}
_TEMPERATURE = 0.07
_PEAK_RATE = 1.5e-3
# Of the people's drawings, those that show what is familiar, and those that set its limit.
_FAMILIAR_FROM, _FAMILIAR_HELD_OUT = np.arange(0, 6000), np.arange(6000, 8400)
# What an identity's looks are asked about; its two sizes are cut into five ranges.
_SIZES = {"face_width": (0.84, 1.16), "nose": (0.6, 1.6)}
_SIZE_RANGES = 5


@dataclass(frozen=True)
class Stores:
    """What judges are trained on: people, several drawings each, and the world's pictures."""

    people: PictureStore
    pictures: PictureStore


def soften(pixels: Float[Tensor, "n 3 h w"], rng: np.random.Generator) -> Float[Tensor, "n 3 h w"]:
    """Make some pictures a little soft, noisy or off in brightness, as redrawn pictures are."""
    if rng.random() < 0.4:
        size = int(rng.integers(80, 120))
        small = nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        pixels = nn.functional.interpolate(small, pixels.shape[-2:], mode="bilinear")
    n = len(pixels)
    gains = torch.from_numpy(rng.uniform(0.92, 1.08, (n, 3, 1, 1))).float()
    offsets = torch.from_numpy(rng.uniform(-0.04, 0.04, (n, 3, 1, 1))).float()
    levels = torch.from_numpy(rng.uniform(0, 0.05, (n, 1, 1, 1)) * (rng.random((n, 1, 1, 1)) < 0.5))
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))
    return (pixels * gains + offsets + noise * levels.float()).clamp(0, 1)


def contrast_identities(vectors: Float[Tensor, "n d"], who: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Pull pictures of the same figure together, and push all others away.

    Source:
        Khosla et al., Supervised Contrastive Learning (arXiv:2004.11362), Eq. 2.
    """
    logits = vectors @ vectors.T / _TEMPERATURE
    itself = torch.eye(len(who), dtype=torch.bool, device=who.device)
    logits = logits.masked_fill(itself, float("-inf"))
    same = (who[:, None] == who[None, :]) & ~itself
    log_shares = logits - logits.logsumexp(dim=1, keepdim=True)
    return -log_shares.masked_fill(~same, 0).sum(dim=1).div(same.sum(dim=1).clamp(min=1)).mean()


def train_judges(
    work: Path,
    stores: Stores,
    updates: int,
    device: torch.device,
    start: tuple[IdentityEncoder, AttributeReader] | None = None,
) -> tuple[IdentityEncoder, AttributeReader]:
    """Train a trunk on both tasks, then each judge apart from it on its own task.

    A quarter of the updates train a common trunk, one tunes the identity encoder, two the reader.
    Judges to start from have left their trunk behind, and that quarter with it.
    """
    torch.manual_seed(3)
    identity, reader = start or (IdentityEncoder(), AttributeReader(_vocabulary()))
    identity, reader = identity.to(device).train(), reader.to(device).train()
    looks = nn.Linear(FEATURES, sum(len(v) for v in _looks_vocabulary().values())).to(device)
    judges = _Judges(identity, reader, looks)
    if start is None:
        reader.trunk = identity.trunk
        _train(work, "judges", judges, stores, updates // 4, tasks=("identity", "reader"))
        reader.trunk = copy.deepcopy(identity.trunk)
    _train(work, "identity", judges, stores, updates // 4, tasks=("identity",))
    _train(work, "reader", judges, stores, updates // 2, tasks=("reader",))
    reader.eval().requires_grad_(False)
    # Whole identities are held out: drawings of one figure resemble each other.
    reader.learn_familiar(_pixels(stores, _FAMILIAR_FROM), _pixels(stores, _FAMILIAR_HELD_OUT))
    reader.learn_style(_pixels_by_medium(stores))
    return identity.eval(), reader


@dataclass
class _Judges:
    identity: IdentityEncoder
    reader: AttributeReader
    looks: nn.Linear

    def parameters(self, tasks: tuple[str, ...]) -> list[nn.Parameter]:
        parts: list[nn.Module] = []
        if "identity" in tasks:
            parts += [self.identity, self.looks]
        if "reader" in tasks:
            parts.append(self.reader)
        # The trunk may belong to both.
        return list(dict.fromkeys(p for part in parts for p in part.parameters()))


@dataclass(frozen=True)
class _Batch:
    pixels: Float[Tensor, "n 3 h w"]
    who: Int[Tensor, " n"]
    looks: Int[Tensor, "n looks"]
    stated: Int[Tensor, "n attributes"]


def _train(
    work: Path, name: str, judges: _Judges, stores: Stores, updates: int, tasks: tuple[str, ...]
) -> None:
    parameters = judges.parameters(tasks)
    device = parameters[0].device
    peak = _PEAK_RATE if len(tasks) > 1 else _PEAK_RATE * 2 / 3
    run = Run(name, work, parameters, Schedule(peak, updates, max(1, updates // 10)))
    bf16 = bf16_is_faster(device)
    while not run.finished:
        batch = _take(name, run.updates_done, stores, judges.reader.vocabulary)
        parts: list[Tensor] = []
        with autocast(device, bf16):
            if "identity" in tasks:
                features = judges.identity.trunk(batch.pixels.to(device))
                looks = judges.looks(features).float()
                vectors = nn.functional.normalize(judges.identity.head(features).float(), dim=1)
            if "reader" in tasks:
                if "identity" not in tasks:
                    features = judges.reader.trunk(batch.pixels.to(device))
                readings = judges.reader.head(features).float()
        if "identity" in tasks:
            parts.append(contrast_identities(vectors, batch.who.to(device)))
            parts.append(0.1 * answer_loss(looks, batch.looks.to(device), _looks_vocabulary()))
        if "reader" in tasks:
            vocabulary = judges.reader.vocabulary
            parts.append(0.2 * answer_loss(readings, batch.stated.to(device), vocabulary))
        run.step(torch.stack(parts).sum(), *parts)
    run.average.swap(run.parameters)


def _take(purpose: str, update: int, stores: Stores, vocabulary: dict[str, list[str]]) -> _Batch:
    """Take several drawings each of some figures, and a few of the world's own pictures."""
    rng, _ = seeded(purpose, update)
    people = len(stores.people) // DRAWINGS_PER_IDENTITY
    chosen = rng.choice(people, _IDENTITIES[purpose], replace=False)
    drawings = np.concatenate(
        [
            who * DRAWINGS_PER_IDENTITY
            + rng.choice(DRAWINGS_PER_IDENTITY, _DRAWINGS_EACH, replace=False)
            for who in chosen
        ]
    )
    pictures = rng.integers(0, len(stores.pictures), _BATCH - len(drawings))
    pixels = torch.cat([stores.people.pixels(drawings), stores.pictures.pixels(pictures)])
    records = [stores.people.record(int(i)) for i in drawings]
    records += [stores.pictures.record(int(i)) for i in pictures]
    # Nobody in the world's own pictures is anybody else in the batch.
    who = np.concatenate([drawings // DRAWINGS_PER_IDENTITY, -1 - np.arange(len(pictures))])
    return _Batch(
        soften(pixels.float() / 255, rng),
        torch.from_numpy(who),
        choices([_looks(asdict(r.identity)) for r in records], _looks_vocabulary()),
        choices([attributes(r) for r in records], vocabulary),
    )


def _looks(identity: dict[str, object]) -> dict[str, str]:
    """State an identity's looks in words; sizes as the number of their range."""
    looks = {name: str(value) for name, value in identity.items() if name not in _SIZES}
    for name, (low, high) in _SIZES.items():
        share = (float(str(identity[name])) - low) / (high - low)
        looks[name] = str(min(_SIZE_RANGES - 1, max(0, int(share * _SIZE_RANGES))))
    return looks


@cache
def _looks_vocabulary() -> dict[str, list[str]]:
    samples = (asdict(record("people", index).identity) for index in range(0, 12000, 6))
    return vocabulary_of([_looks(identity) for identity in samples])


def _vocabulary() -> dict[str, list[str]]:
    return vocabulary_of([attributes(record("people", index)) for index in range(4000)])


def choices(
    stated: list[dict[str, str]], vocabulary: dict[str, list[str]]
) -> Int[Tensor, "n attributes"]:
    """Turn stated attributes into the numbers of their values; unstated ones are 0."""
    rows = [[v.index(s.get(name, "")) for name, v in vocabulary.items()] for s in stated]
    return torch.tensor(rows)


def _pixels(stores: Stores, indices: np.ndarray) -> Float[Tensor, "n 3 h w"]:
    rng = np.random.default_rng(0)
    parts = [stores.people.pixels(part).float() / 255 for part in np.array_split(indices, 50)]
    return torch.cat([part if i % 2 else soften(part, rng) for i, part in enumerate(parts)])


def _pixels_by_medium(stores: Stores) -> list[Float[Tensor, "n 3 h w"]]:
    media = np.array([stores.people.record(int(index)).medium for index in _FAMILIAR_FROM])
    return [_pixels(stores, _FAMILIAR_FROM[media == medium]) for medium in MEDIA]
