"""What training learns from: crops, framings, prompts, and the order in which they are dealt."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamloom.core.manifests import PhotoSet, PriorSet
from dreamloom.data.photos.prepare import load_photos
from dreamloom.models.base import AdapterSpec, Model
from dreamloom.training.batches import Lesson, LessonPlan, Share, choose_place, deal
from studio_set import claimed, make_lesson, make_photos, small_config


def test_prompts_and_framings_stay_with_their_images(
    model: Model, sets: tuple[PhotoSet, PriorSet]
) -> None:
    """The faults of others: tiled prompts, and class images with a photo's crop."""
    lesson = make_lesson(model, *sets, small_config(model))
    side = model.advice.resolution_px
    (batch,) = lesson.deal(0, Share(2, 2))
    assert batch.is_prior.tolist() == [False, False, True, True]
    for card, framing, prompt in zip(batch.cards, batch.framings, batch.prompts, strict=True):
        assert prompt == lesson.prompts[card.is_prior]
        assert framing.original_px == ((side, side) if card.is_prior else (72, 96))
        assert framing.crop_top_left_px == card.place[:2]
        assert card.place[:2] == (0, 0) or not card.is_prior


def test_every_row_is_the_crop_that_its_card_names(
    model: Model, sets: tuple[PhotoSet, PriorSet]
) -> None:
    """A cache that is read by place instead of by picture pairs photos with strangers' captions."""
    lesson = make_lesson(model, *sets, small_config(model, photos__flip=True))
    side = model.advice.resolution_px
    for update in range(6):
        (batch,) = lesson.deal(update, Share(2, 2))
        for row, card in enumerate(batch.cards):
            name = (
                lesson.priors[card.picture] if card.is_prior else lesson.photos[card.picture].file
            )
            top, left, mirrored = card.place
            image = Image.open(lesson.folder / name).crop((left, top, left + side, top + side))
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
            pixels = pixels.flip(-1) if mirrored else pixels
            latents = model.encode_images(pixels / 127.5 - 1)
            torch.testing.assert_close(batch.latents.mean[row], latents.mean[0])


def test_captions_replace_the_common_prompt(model: Model, sets: tuple[PhotoSet, PriorSet]) -> None:
    photos, _ = sets
    captioned = photos.model_copy(
        update={
            "photos": tuple(
                photo.model_copy(update={"caption": f"pixel, number {number}"})
                for number, photo in enumerate(photos.photos)
            )
        }
    )
    lesson = make_lesson(model, captioned, None, small_config(model))
    assert len(lesson.texts) == 2 + 3
    for update in range(3):
        (batch,) = lesson.deal(update, Share(2, 0))
        told = [f"pixel, number {card.picture}" for card in batch.cards]
        assert list(batch.prompts) == told
        alone = model.encode_prompts(told)
        torch.testing.assert_close(lesson.conditioning(batch.prompts).tokens, alone.tokens)


def test_prompts_are_encoded_once_unless_they_are_taught(
    model: Model, sets: tuple[PhotoSet, PriorSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = make_lesson(model, *sets, small_config(model))
    asked: list[list[str]] = []
    encode = model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda p: asked.append(list(p)) or encode(p))
    prompts = [lesson.prompts[0], lesson.prompts[1], lesson.prompts[0]]
    once = [lesson.conditioning(prompts) for _ in range(3)]
    assert asked == [list(lesson.prompts)]
    model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0, text_encoders=True))
    try:
        again = [lesson.conditioning(prompts) for _ in range(3)]
        assert asked[1:] == [list(lesson.prompts)] * 3
        torch.testing.assert_close(again[0].tokens, once[0].tokens)
        assert again[0].tokens.requires_grad
    finally:
        model.detach_adapter()


def test_mirrored_crops_are_framed_from_the_other_side(
    model: Model, sets: tuple[PhotoSet, PriorSet]
) -> None:
    lesson = make_lesson(model, sets[0], None, small_config(model, photos__flip=True))
    photo = sets[0].photos[0]
    room = photo.scaled_px[1] - photo.bucket_px[1]
    seen = set()
    for update in range(12):
        (batch,) = lesson.deal(update, Share(2, 0))
        for card, framing in zip(batch.cards, batch.framings, strict=True):
            left, mirrored = card.place[1:]
            assert framing.crop_top_left_px[1] == (room - left if mirrored else left)
            seen.add(mirrored)
    assert seen == {True, False}


def test_crops_are_fresh_in_each_round_and_encoded_once(
    model: Model,
    sets: tuple[PhotoSet, PriorSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_photos(tmp_path / "wide", size=(240, 72))
    wide = load_photos(folder, claimed(tmp_path / "run"), model.advice.resolution_px)
    lesson = make_lesson(model, wide, sets[1], small_config(model))
    encoded: list[int] = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda p: encoded.append(len(p)) or encode(p))
    places = {
        (card.picture, card.place)
        for update in range(30)
        for batch in lesson.deal(update, Share(3, 3))
        for card in batch.cards
        if not card.is_prior
    }
    per_photo = Counter(photo for photo, _ in places)
    assert all(count > 4 for count in per_photo.values())
    assert sum(encoded) <= len(places)
    encoded.clear()
    for update in range(30):
        lesson.deal(update, Share(3, 3))
    assert not encoded


def test_a_crop_depends_on_photo_round_and_seed_alone(sets: tuple[PhotoSet, PriorSet]) -> None:
    photo = sets[0].photos[0].model_copy(update={"scaled_px": (64, 400)})
    plan = LessonPlan(seed=0)
    places = [choose_place(photo, 8, plan, 0, round_) for round_ in range(40)]
    assert places == [choose_place(photo, 8, plan, 0, round_) for round_ in range(40)]
    assert len(set(places)) > 10
    assert places != [choose_place(photo, 8, plan, 1, round_) for round_ in range(40)]
    assert places != [choose_place(photo, 8, LessonPlan(seed=1), 0, r) for r in range(40)]


def test_held_out_photos_are_never_dealt(model: Model, sets: tuple[PhotoSet, PriorSet]) -> None:
    config = small_config(model, watch__held_out_photos=1)
    lesson = make_lesson(model, *sets, config)
    last = sets[0].photos[-1]
    dealt = {
        lesson.name(card) for update in range(12) for card in lesson.deal_cards(update, Share(2, 2))
    }
    assert last.source not in dealt
    assert len(dealt) == 2 + 3
    (batch,) = lesson.validation()
    assert [lesson.name(card) for card in batch.cards] == [last.source]


def test_pictures_of_other_shapes_go_in_parts_of_their_own(
    model: Model, sets: tuple[PhotoSet, PriorSet]
) -> None:
    photos, priors = sets
    wide = photos.photos[0].model_copy(update={"bucket_px": (64, 80)})
    mixed = photos.model_copy(update={"photos": (wide, *photos.photos[1:])})
    lesson = make_lesson(model, mixed, priors, small_config(model))
    parts = lesson.deal(0, Share(3, 2))
    assert [part.latents.mean.shape[-2:] for part in parts] == [(8, 8), (8, 10)]
    cards = [card for part in parts for card in part.cards]
    assert sorted(card.number for card in cards if not card.is_prior) == [0, 1, 2]


def test_masks_are_cut_like_their_pictures(
    model: Model, sets: tuple[PhotoSet, PriorSet], tmp_path: Path
) -> None:
    photos = sets[0]
    width, height = photos.photos[0].scaled_px[::-1]
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    mask.save(photos.folder / "half.png")
    first = photos.photos[0].model_copy(update={"mask": "half.png"})
    masked = photos.model_copy(update={"photos": (first, *photos.photos[1:])})
    lesson = make_lesson(model, masked, None, small_config(model))
    (batch,) = lesson.deal(0, Share(3, 0))
    assert batch.masks is not None
    for card, cut in zip(batch.cards, batch.masks, strict=True):
        if card.picture:
            assert cut.eq(1).all()
            continue
        edge = (width // 2 - card.place[1]) / 8
        expected = (torch.arange(1, 9) - edge).clamp(0, 1)
        torch.testing.assert_close(cut, expected.expand(8, 8), atol=0.01, rtol=0)


def test_every_photo_is_dealt_equally_often() -> None:
    dealt = [card for update in range(9) for _, card, _ in deal(6, update, 4, Share(4, 0), 0, "x")]
    assert {dealt.count(card) for card in range(6)} == {6}
    assert dealt[:6] != dealt[6:12]
    assert sorted(dealt[:6]) == list(range(6))


@pytest.mark.parametrize("batches", [2, 3])
def test_the_shares_of_an_update_are_the_whole_of_it(batches: int) -> None:
    for update in range(5):
        whole = deal(7, update, 2 * batches, Share(2 * batches, 0), 0, "photos")
        shares = [deal(7, update, 2, Share(2, 0, batches, i), 0, "photos") for i in range(batches)]
        assert [card for share in shares for card in share] == whole


def test_no_photo_left_is_an_error(model: Model, sets: tuple[PhotoSet, PriorSet]) -> None:
    with pytest.raises(ValueError, match="none is left"):
        make_lesson(model, sets[0], None, small_config(model, watch__held_out_photos=3))


def test_encoding_is_told(model: Model, sets: tuple[PhotoSet, PriorSet]) -> None:
    told: list[tuple[int, int]] = []
    lesson: Lesson = make_lesson(model, *sets, small_config(model))
    fresh = Lesson(
        model, lesson.photos, (), lesson.folder, lesson.priors, 64, lesson.prompts, lesson.plan
    )
    fresh.encode_all(lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
