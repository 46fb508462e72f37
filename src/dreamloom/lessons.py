"""What training learns from: encoded pictures with their framings and prompts, dealt in order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dreamloom.families.base import (
    Conditioning,
    Framing,
    Latents,
    Model,
    OnPicture,
    nothing,
)
from dreamloom.pictures import PhotoSet, PriorSet
from dreamloom.pixels import open_upright, to_tensor
from dreamloom.runtime import seed_for

_ENCODE_BATCH = 8


@dataclass(frozen=True)
class Lesson:
    """All encoded pictures, their framings and prompts; row i of each belongs together.

    Args:
        latents: Encoded crops of photos, then class images.
        framings: How each row was cut.
        prompt_rows: Which row of ``conditioning`` each picture is trained with.
        conditioning: Encoded prompts.
        crops: For each photo, the rows of its crops.
        prior_rows: The rows of the class images; none without.
        class_row: The conditioning row of the class prompt.
    """

    latents: Latents
    framings: tuple[Framing, ...]
    prompt_rows: Int[Tensor, " rows"]
    conditioning: Conditioning
    crops: tuple[tuple[int, ...], ...]
    prior_rows: tuple[int, ...]
    class_row: int


@dataclass(frozen=True)
class LessonPlan:
    """How photos are cut for a lesson.

    Args:
        crops_per_photo: Different square crops of each photo that is not square.
        flip: Whether each crop is also taken mirrored.
        seed: The run's seed.
    """

    crops_per_photo: int
    flip: bool
    seed: int


def prepare_lesson(
    model: Model,
    photos: PhotoSet,
    priors: PriorSet | None,
    prompts: tuple[str, str],
    plan: LessonPlan,
    on_picture: OnPicture = nothing,
) -> Lesson:
    """Encode every crop, class image and prompt once; see `Lesson`.

    Args:
        model: The base model.
        photos: The prepared photos; one with a caption is trained with that.
        priors: Class images, or None.
        prompts: The prompts of photos and of class images.
        plan: How photos are cut.
        on_picture: Called with (pictures encoded, pictures in all).
    """
    side = photos.resolution_px
    pixels: list[Tensor] = []
    framings: list[Framing] = []
    texts = list(prompts)
    prompt_rows: list[int] = []
    crops: list[tuple[int, ...]] = []
    for number, (photo, path) in enumerate(zip(photos.photos, photos.paths(), strict=True)):
        picture = to_tensor([open_upright(path)])[0]
        text = photo.caption or prompts[0]
        if text not in texts:
            texts.append(text)
        places = choose_crops(photo.scaled_px, side, plan.crops_per_photo, plan.seed, number)
        first = len(pixels)
        for top, left in places:
            crop = picture[:, top : top + side, left : left + side]
            pixels.append(crop)
            framings.append(Framing(photo.original_px, (top, left)))
            if plan.flip:
                pixels.append(crop.flip(-1))
                framings.append(Framing(photo.original_px, (top, photo.scaled_px[1] - side - left)))
        crops.append(tuple(range(first, len(pixels))))
        prompt_rows += [texts.index(text)] * len(crops[-1])
    prior_paths = priors.paths() if priors else []
    prior_rows = tuple(range(len(pixels), len(pixels) + len(prior_paths)))
    for path in prior_paths:
        pixels.append(to_tensor([open_upright(path)])[0])
        framings.append(Framing((side, side)))
        prompt_rows.append(1)
    return Lesson(
        latents=_encode(model, pixels, on_picture),
        framings=tuple(framings),
        prompt_rows=torch.tensor(prompt_rows),
        conditioning=model.encode_prompts(texts),
        crops=tuple(crops),
        prior_rows=prior_rows,
        class_row=1,
    )


def choose_crops(
    scaled_px: tuple[int, int], side: int, count: int, seed: int, photo: int
) -> list[tuple[int, int]]:
    """Choose tops and lefts of square crops: the centre first, then random ones around it.

    Random crops keep to the middle half of the room there is, so that a subject near the middle
    is never cut off. A square photo has one crop.

    Returns:
        Up to ``count`` different (top, left) pairs, in pixels.
    """
    rooms = [length - side for length in scaled_px]
    dice = random.Random(seed_for(seed, "crop", photo))
    places = [(rooms[0] // 2, rooms[1] // 2)]
    for _ in range(count - 1):
        places.append(tuple(round(room * dice.uniform(0.25, 0.75)) for room in rooms))  # type: ignore[arg-type]
    return list(dict.fromkeys(places))


def _encode(model: Model, pixels: Sequence[Tensor], on_picture: OnPicture) -> Latents:
    means, deviations = [], []
    for start in range(0, len(pixels), _ENCODE_BATCH):
        some = torch.stack(list(pixels[start : start + _ENCODE_BATCH])) * 2 - 1
        latents = model.encode_images(some)
        means.append(latents.mean)
        deviations.append(latents.deviation)
        on_picture(start + len(some), len(pixels))
    return Latents(torch.cat(means), torch.cat(deviations))


def choose_rows(
    lesson: Lesson, update: int, batch_photos: int, batch_priors: int, seed: int
) -> tuple[Int[Tensor, " images"], Bool[Tensor, " images"]]:
    """Choose the pictures of one update, photos first, and say which are class images.

    Photos and class images are each dealt like cards: every one is seen once before any is seen
    again, in an order that the seed and the round decide.

    Args:
        lesson: What there is to choose from.
        update: Which update, from 0.
        batch_photos: How many photos.
        batch_priors: How many class images, where there are any; 0 leaves them out.
        seed: The run's seed.
    """
    dice = random.Random(seed_for(seed, "crop choice", update))
    photos = deal(len(lesson.crops), batch_photos, update, seed, "photos")
    rows = [dice.choice(lesson.crops[photo]) for photo in photos]
    priors: list[int] = []
    if lesson.prior_rows and batch_priors:
        dealt = deal(len(lesson.prior_rows), batch_priors, update, seed, "class images")
        priors = [lesson.prior_rows[card] for card in dealt]
    is_prior = torch.tensor([False] * len(rows) + [True] * len(priors))
    return torch.tensor(rows + priors), is_prior


def deal(cards: int, per_update: int, update: int, seed: int, purpose: str) -> list[int]:
    """Deal the cards of one update from freshly shuffled packs, one pack after the other."""
    dealt = []
    for place in range(update * per_update, (update + 1) * per_update):
        pack, position = divmod(place, cards)
        order = list(range(cards))
        random.Random(seed_for(seed, purpose, pack)).shuffle(order)
        dealt.append(order[position])
    return dealt
