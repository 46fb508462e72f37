"""Training batches: pictures with their crops, captions and latents, drawn in order.

Photos are drawn like cards, each time with a fresh crop. A crop is a function of the photo, the
round and the seed, so neither a resumed run nor another number of processes changes it; its
latents are kept, so encoding soon ends.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from dreamloom.core.device import seed_for, send
from dreamloom.core.events import OnProgress, no_progress
from dreamloom.core.manifests import ClassImageSet, Photo, PhotoSet
from dreamloom.data.buckets import list_places, mirror_left, place_crop
from dreamloom.data.image_io import open_upright
from dreamloom.data.tensors import to_tensor
from dreamloom.models.base import Conditioning, Framing, Latents, Model
from dreamloom.training.caption_variants import AS_WRITTEN, CaptionPlan, list_lines, list_variants
from dreamloom.training.latent_cache import LatentStore

# Batches whose prompts are remembered beside each other; without captions there is one.
_MOST_CONDITIONINGS = 4

SampleKind: TypeAlias = Literal["photo", "class image"]
CropPlace: TypeAlias = tuple[int, int, bool]
"""Top and left of a crop in pixels of the scaled picture, and whether it is mirrored."""


@dataclass(frozen=True)
class Sample:
    """One picture of one update, as it was drawn.

    Args:
        kind: Whether it is a photo of the subject or a class image.
        picture: Which one, from 0.
        place: How it is cut.
        number: Its number among all pictures of its kind in this update, over all processes and
            accumulated batches: noise and timestep depend on it, not on its place in a batch.
        drops_caption: Whether it is trained without its prompt this time.
        round: How often a photo was drawn before, which decides how its prompt is varied; None
            for a prompt as it was written.
    """

    kind: SampleKind
    picture: int
    place: CropPlace
    number: int
    drops_caption: bool = False
    round: int | None = None

    @property
    def is_prior(self) -> bool:
        """Whether it is a class image."""
        return self.kind == "class image"


@dataclass(frozen=True)
class Batch:
    """Pictures of one shape that go through the model together; row i of each belongs together.

    Args:
        samples: What was drawn.
        latents: Encoded crops.
        framings: How each was cut from its original.
        prompts: The prompt that each is trained with.
        masks: Where the subject is, from 0 to 1 in latents; None where no picture has a mask.
    """

    samples: tuple[Sample, ...]
    latents: Latents
    framings: tuple[Framing, ...]
    prompts: tuple[str, ...]
    masks: Float[Tensor, "images height width"] | None

    @property
    def is_prior(self) -> Bool[Tensor, " images"]:
        """True for class images."""
        return torch.tensor([sample.is_prior for sample in self.samples])


@dataclass(frozen=True)
class BatchPlan:
    """How pictures are drawn and cropped.

    Args:
        seed: The run's seed.
        flip: Whether photos are mirrored at random.
        held_out: How many photos, from the end of the list, are not trained on.
        caption_dropout: The share of pictures that are trained without their prompt.
        captions: How photos' prompts are varied.
    """

    seed: int
    flip: bool = False
    held_out: int = 0
    caption_dropout: float = 0.0
    captions: CaptionPlan = AS_WRITTEN


@dataclass(frozen=True)
class BatchShare:
    """Which part of an update a batch is: one of several processes and accumulated batches.

    Args:
        photos: Photos in one batch.
        priors: Class images in one batch, where there are any.
        batches: How many batches the update has in all, over all processes.
        index: Which of them this is, from 0.
    """

    photos: int
    priors: int
    batches: int = 1
    index: int = 0


@dataclass
class TrainingBatches:
    """All pictures, and what is known of them.

    Args:
        model: The base model that encodes them.
        photos: The photos that are trained on.
        held_out: The photos that are not.
        priors: Files of the class images; none without.
        prior_prompts: The prompt of each of them.
        prompts: The prompts of photos and of the class; a photo with a caption has its own.
        plan: How they are drawn and cropped.
        store: Keeps encoded crops on disk; None keeps them in memory alone.
    """

    model: Model
    photos: tuple[Photo, ...]
    held_out: tuple[Photo, ...]
    folder: Path
    priors: tuple[Path, ...]
    prior_prompts: tuple[str, ...]
    resolution_px: int
    prompts: tuple[str, str]
    plan: BatchPlan
    store: LatentStore | None = None
    _encoded: dict[tuple[str, CropPlace], Latents] = field(default_factory=dict)
    _pixels: dict[str, UInt8[Tensor, "3 height width"]] = field(default_factory=dict)
    _conditioning: Conditioning | None = None
    _by_prompts: dict[tuple[str, ...], Conditioning] = field(default_factory=dict)

    @cached_property
    def written_texts(self) -> tuple[str, ...]:
        """Every prompt as it was written, once."""
        captions = (
            line
            for photo in (*self.photos, *self.held_out)
            for line in list_lines(photo.caption or self.prompts[0], self.plan.captions)
        )
        none = ("",) if self.plan.caption_dropout else ()
        return tuple(dict.fromkeys([*self.prompts, *captions, *self.prior_prompts, *none]))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every prompt that is trained or validated with, once."""
        varied = (text for variants in self.variants for text in variants)
        return tuple(dict.fromkeys([*self.written_texts, *varied]))

    @cached_property
    def variants(self) -> tuple[tuple[str, ...], ...]:
        """What each photo is trained with in its rounds; see `list_variants`."""
        plan = self.plan
        return tuple(
            list_variants(photo.caption or self.prompts[0], plan.captions, plan.seed, number)
            for number, photo in enumerate(self.photos)
        )

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts: anew while they are being trained, else once for the whole run."""
        if self.model.trains_text:
            unique = list(dict.fromkeys(prompts))
            rows = torch.tensor([unique.index(prompt) for prompt in prompts])
            return self.model.encode_prompts(unique, drop_empty=True).take(rows)
        if self._conditioning is None:
            self._conditioning = self.model.encode_prompts(self.texts, drop_empty=True)
        wanted = tuple(prompts)
        if wanted not in self._by_prompts:
            # The same tensors again, so that a model can know them again.
            while len(self._by_prompts) >= _MOST_CONDITIONINGS:
                del self._by_prompts[next(iter(self._by_prompts))]
            rows = torch.tensor([self.texts.index(prompt) for prompt in wanted])
            self._by_prompts[wanted] = self._conditioning.take(rows)
        return self._by_prompts[wanted]

    def make_batches(self, update: int, share: BatchShare) -> list[Batch]:
        """Draw one batch of an update, in parts of one shape each.

        Photos and class images are each drawn like cards: every one is seen once before any is
        seen again, in an order that the seed and the round decide.
        """
        return self.encode(self.draw_samples(update, share))

    def draw_samples(self, update: int, share: BatchShare) -> list[Sample]:
        """Draw one batch of an update, without looking at the pictures."""
        seed, grid_px = self.plan.seed, self.model.pixels_per_latent
        samples = []
        for number, photo, round_ in draw_numbers(
            len(self.photos), update, share.photos, share, seed, "photos"
        ):
            place = choose_place(self.photos[photo], grid_px, self.plan, photo, round_)
            samples.append(Sample("photo", photo, place, number, round=round_))
        if self.priors and share.priors:
            numbers = draw_numbers(
                len(self.priors), update, share.priors, share, seed, "class images"
            )
            samples += [
                Sample("class image", image, (0, 0, False), number) for number, image, _ in numbers
            ]
        share_dropped = self.plan.caption_dropout
        return [
            replace(sample, drops_caption=drops_caption(sample, share_dropped, seed, update))
            for sample in samples
        ]

    def encode(
        self, samples: Sequence[Sample], on_picture: OnProgress = no_progress
    ) -> list[Batch]:
        """Encode what was drawn and is not known yet; group it by shape."""
        keyed = {self._key(sample): sample for sample in samples}
        unknown = {key: one for key, one in keyed.items() if key not in self._encoded}
        if unknown:
            self._encode_missing(list(unknown.values()), on_picture)
            # The autoencoder came back to the device for this; training needs the room.
            self.model.release_encoders()
        shaped = sorted(
            samples, key=lambda sample: (self._size(sample), sample.is_prior, sample.number)
        )
        return [self._collate(list(alike)) for _, alike in groupby(shaped, key=self._size)]

    def encode_all(self, on_picture: OnProgress = no_progress) -> None:
        """Encode every class image and the first round of photos, before training begins."""
        grid_px = self.model.pixels_per_latent
        first = [choose_place(p, grid_px, self.plan, n, 0) for n, p in enumerate(self.photos)]
        self.encode(
            [Sample("photo", n, place, n) for n, place in enumerate(first)]
            + [Sample("class image", n, (0, 0, False), n) for n in range(len(self.priors))],
            on_picture,
        )

    def validation(self) -> list[Batch]:
        """The photos to validate with, cut in the middle: held-out ones, or else all."""
        first = len(self.photos) if self.held_out else 0
        step = self.model.pixels_per_latent
        samples = []
        for number, photo in enumerate(self.held_out or self.photos):
            tops, lefts = list_places(photo.scaled_px, photo.bucket_px, step, photo.box_px)
            middle = (tops[len(tops) // 2], lefts[len(lefts) // 2], False)
            samples.append(Sample("photo", first + number, middle, number))
        return self.encode(samples)

    def name(self, sample: Sample) -> str:
        """Name a picture for a message."""
        if sample.kind == "photo":
            return self._photo(sample).source
        return f"class image {self.priors[sample.picture].name}"

    def _photo(self, sample: Sample) -> Photo:
        return (*self.photos, *self.held_out)[sample.picture]

    def _key(self, sample: Sample) -> tuple[str, CropPlace]:
        return (str(self._file(sample)), sample.place)

    def _file(self, sample: Sample) -> Path:
        if sample.kind == "photo":
            return self.folder / self._photo(sample).file
        return self.priors[sample.picture]

    def _size(self, sample: Sample) -> tuple[int, int]:
        if sample.kind == "photo":
            return self._photo(sample).bucket_px
        return (self.resolution_px, self.resolution_px)

    def _crop(self, sample: Sample, picture: Tensor) -> Tensor:
        (top, left, mirrored), (height, width) = sample.place, self._size(sample)
        crop = picture[:, top : top + height, left : left + width]
        return crop.flip(-1) if mirrored else crop

    def _encode_missing(self, samples: Sequence[Sample], on_picture: OnProgress) -> None:
        # One at a time: how a batch is put together changes the last bits of what comes out, and
        # a resumed run meets its crops in another company.
        for done, sample in enumerate(samples, start=1):
            file = self._file(sample)
            # Photos are few and cut again and again; a class image is needed only once.
            picture = _bytes(file) if sample.is_prior else self._read(file)
            pixels = self._crop(sample, picture)
            latents = self.store.find(pixels) if self.store else None
            if latents is None:
                latents = self.model.encode_images(pixels[None].float() / 127.5 - 1)
                if self.store:
                    self.store.keep(pixels, latents)
            # With CPU offload there is no room on the device for what is not at work.
            cpu_offload = self.model.memory_options.cpu_offload
            place = torch.device("cpu") if cpu_offload else self.model.runtime.device
            self._encoded[self._key(sample)] = Latents(
                latents.mean.to(place), latents.deviation.to(place)
            )
            on_picture(done, len(samples))

    def _read(self, path: Path) -> UInt8[Tensor, "channels height width"]:
        """Read a photo or its mask once."""
        if path.name not in self._pixels:
            self._pixels[path.name] = _bytes(path)
        return self._pixels[path.name]

    def _collate(self, samples: list[Sample]) -> Batch:
        found = [self._encoded[self._key(sample)] for sample in samples]
        device = self.model.runtime.device
        latents = Latents(
            torch.cat([one.mean for one in found]).to(device),
            torch.cat([one.deviation for one in found]).to(device),
        )
        return Batch(
            samples=tuple(samples),
            latents=latents,
            framings=tuple(self._frame(sample) for sample in samples),
            prompts=tuple(map(self._caption, samples)),
            masks=self._masks(samples, latents.mean),
        )

    def _caption(self, sample: Sample) -> str:
        if sample.drops_caption:
            return ""
        if sample.is_prior:
            return self.prior_prompts[sample.picture]
        if sample.round is None:
            written = self._photo(sample).caption or self.prompts[0]
            return list_lines(written, self.plan.captions)[0]
        variants = self.variants[sample.picture]
        return variants[sample.round % len(variants)]

    def _frame(self, sample: Sample) -> Framing:
        if sample.kind == "class image":
            return Framing((self.resolution_px, self.resolution_px))
        photo, (top, left, mirrored) = self._photo(sample), sample.place
        if mirrored:
            left = mirror_left(left, photo.bucket_px[1], photo.scaled_px[1])
        return Framing(photo.original_px, (top, left))

    def _masks(
        self, samples: Sequence[Sample], like: Tensor
    ) -> Float[Tensor, "images height width"] | None:
        """Cut the masks like their pictures and shrink them to latents; all ones without a mask."""
        files = ["" if one.is_prior else self._photo(one).mask for one in samples]
        if not any(files):
            return None
        side = (like.shape[-2], like.shape[-1])
        masks = torch.ones(len(samples), *side)
        for row, (sample, file) in enumerate(zip(samples, files, strict=True)):
            if file:
                cut = self._crop(sample, self._read(self.folder / file)[:1]).float()[None] / 255
                masks[row] = nn.functional.adaptive_avg_pool2d(cut, side)[0, 0]
        return send(masks, like.device)


def prepare_batches(
    model: Model,
    photos: PhotoSet,
    priors: ClassImageSet | None,
    prompts: tuple[str, str],
    plan: BatchPlan,
    on_picture: OnProgress = no_progress,
    store: LatentStore | None = None,
) -> TrainingBatches:
    """Encode what can be encoded before training begins; see `TrainingBatches`.

    Args:
        model: The base model.
        photos: The prepared photos; one with a caption is trained with that.
        priors: Class images, or None.
        prompts: The prompts of photos and of class images.
        plan: How pictures are drawn and cropped.
        on_picture: Called with (pictures encoded, pictures in all).
        store: Keeps encoded crops on disk; None keeps them in memory alone.

    Raises:
        ValueError: If no photo would be left to train on.
    """
    if plan.held_out >= len(photos.photos):
        raise ValueError(
            f"{plan.held_out} of {len(photos.photos)} photos are held out: none is left to learn"
        )
    trained = len(photos.photos) - plan.held_out
    batches = TrainingBatches(
        model=model,
        photos=photos.photos[:trained],
        held_out=photos.photos[trained:],
        folder=photos.folder,
        priors=tuple(priors.paths()) if priors else (),
        prior_prompts=tuple(priors.prompts()) if priors else (),
        resolution_px=photos.resolution_px,
        prompts=prompts,
        plan=plan,
        store=store,
    )
    batches.encode_all(on_picture)
    return batches


def choose_place(
    photo: Photo, grid_px: int, plan: BatchPlan, number: int, round_: int
) -> CropPlace:
    """Choose how a photo is cut in one round: a fresh crop that keeps the subject, and a flip."""
    rng = random.Random(seed_for(plan.seed, "crop", number, round_))
    top, left = place_crop(photo.scaled_px, photo.bucket_px, grid_px, rng, photo.box_px)
    return top, left, plan.flip and rng.random() < 0.5


def drops_caption(sample: Sample, share: float, seed: int, update: int) -> bool:
    """Draw whether a picture is trained without its prompt in one update.

    What the empty prompt draws is half of what guidance adds up. A training that never meets it
    leaves it to chance how the adapter moves it, and guidance multiplies the difference.

    Source:
        Ho and Salimans, Classifier-Free Diffusion Guidance (arXiv:2207.12598), algorithm 1.
    """
    if not share:
        return False
    purpose = f"caption dropout of {sample.kind}"
    return random.Random(seed_for(seed, purpose, update, sample.number)).random() < share


def draw_numbers(
    samples: int, update: int, per_batch: int, share: BatchShare, seed: int, purpose: str
) -> list[tuple[int, int, int]]:
    """Draw one batch's samples of one update from freshly shuffled packs, one after the other.

    Returns:
        For each card its number within the update, which card it is, and its round.
    """
    per_update = per_batch * share.batches
    drawn = []
    for number in range(share.index * per_batch, (share.index + 1) * per_batch):
        round_, position = divmod(update * per_update + number, samples)
        order = list(range(samples))
        random.Random(seed_for(seed, purpose, round_)).shuffle(order)
        drawn.append((number, order[position], round_))
    return drawn


def _bytes(path: Path) -> UInt8[Tensor, "channels height width"]:
    return (to_tensor([open_upright(path)])[0] * 255).round().to(torch.uint8)
