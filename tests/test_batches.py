"""What training learns from: crops, framings, prompts, and the order in which they are dealt."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.data.photos.prepare import load_photos
from dreamloom.models.base import AdapterSpec, Model
from dreamloom.training.batches import (
    BatchPlan,
    BatchShare,
    TrainingBatches,
    choose_place,
    draw_numbers,
)
from studio_set import claimed, make_lesson, make_photos, small_config


def test_prompts_and_framings_stay_with_their_images(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    """The faults of others: tiled prompts, and class images with a photo's crop."""
    batches = make_lesson(model, *sets, small_config(model))
    side = model.advice.resolution_px
    (batch,) = batches.make_batches(0, BatchShare(2, 2))
    assert batch.is_prior.tolist() == [False, False, True, True]
    for sample, framing, prompt in zip(batch.samples, batch.framings, batch.prompts, strict=True):
        assert prompt == batches.prompts[sample.is_prior]
        assert framing.original_px == ((side, side) if sample.is_prior else (72, 96))
        assert framing.crop_top_left_px == sample.place[:2]
        assert sample.place[:2] == (0, 0) or not sample.is_prior


def test_every_row_is_the_crop_that_its_sample_names(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    """A cache that is read by place instead of by picture pairs photos with strangers' captions."""
    batches = make_lesson(model, *sets, small_config(model, photos__flip=True))
    side = model.advice.resolution_px
    for update in range(6):
        (batch,) = batches.make_batches(update, BatchShare(2, 2))
        for row, sample in enumerate(batch.samples):
            name = (
                batches.priors[sample.picture]
                if sample.is_prior
                else batches.photos[sample.picture].file
            )
            top, left, mirrored = sample.place
            image = Image.open(batches.folder / name).crop((left, top, left + side, top + side))
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
            pixels = pixels.flip(-1) if mirrored else pixels
            latents = model.encode_images(pixels / 127.5 - 1)
            torch.testing.assert_close(batch.latents.mean[row], latents.mean[0])


def test_captions_replace_the_common_prompt(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    photos, _ = sets
    captioned = photos.model_copy(
        update={
            "photos": tuple(
                photo.model_copy(update={"caption": f"pixel, number {number}"})
                for number, photo in enumerate(photos.photos)
            )
        }
    )
    batches = make_lesson(model, captioned, None, small_config(model))
    assert len(batches.texts) == 2 + 3
    for update in range(3):
        (batch,) = batches.make_batches(update, BatchShare(2, 0))
        told = [f"pixel, number {sample.picture}" for sample in batch.samples]
        assert list(batch.prompts) == told
        alone = model.encode_prompts(told)
        torch.testing.assert_close(batches.conditioning(batch.prompts).tokens, alone.tokens)


def test_prompts_are_encoded_once_unless_they_are_trained(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make_lesson(model, *sets, small_config(model))
    asked: list[list[str]] = []
    encode = model.encode_prompts
    monkeypatch.setattr(
        model, "encode_prompts", lambda p, **how: asked.append(list(p)) or encode(p, **how)
    )
    prompts = [batches.prompts[0], batches.prompts[1], batches.prompts[0]]
    once = [batches.conditioning(prompts) for _ in range(3)]
    assert asked == [list(batches.prompts)]
    model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0, text_encoders=True))
    try:
        again = [batches.conditioning(prompts) for _ in range(3)]
        assert asked[1:] == [list(batches.prompts)] * 3
        torch.testing.assert_close(again[0].tokens, once[0].tokens)
        assert again[0].tokens.requires_grad
    finally:
        model.detach_adapter()


def test_mirrored_crops_are_framed_from_the_other_side(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    batches = make_lesson(model, sets[0], None, small_config(model, photos__flip=True))
    photo = sets[0].photos[0]
    room = photo.scaled_px[1] - photo.bucket_px[1]
    seen = set()
    for update in range(12):
        (batch,) = batches.make_batches(update, BatchShare(2, 0))
        for sample, framing in zip(batch.samples, batch.framings, strict=True):
            left, mirrored = sample.place[1:]
            assert framing.crop_top_left_px[1] == (room - left if mirrored else left)
            seen.add(mirrored)
    assert seen == {True, False}


def test_crops_are_fresh_in_each_round_and_encoded_once(
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_photos(tmp_path / "wide", size=(240, 72))
    wide = load_photos(folder, claimed(tmp_path / "run"), model.advice.resolution_px)
    batches = make_lesson(model, wide, sets[1], small_config(model))
    encoded: list[int] = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda p: encoded.append(len(p)) or encode(p))
    places = {
        (sample.picture, sample.place)
        for update in range(30)
        for batch in batches.make_batches(update, BatchShare(3, 3))
        for sample in batch.samples
        if not sample.is_prior
    }
    per_photo = Counter(photo for photo, _ in places)
    assert all(count > 4 for count in per_photo.values())
    assert sum(encoded) <= len(places)
    encoded.clear()
    for update in range(30):
        batches.make_batches(update, BatchShare(3, 3))
    assert not encoded


def test_a_crop_depends_on_photo_round_and_seed_alone(sets: tuple[PhotoSet, ClassImageSet]) -> None:
    photo = sets[0].photos[0].model_copy(update={"scaled_px": (64, 400)})
    plan = BatchPlan(seed=0)
    places = [choose_place(photo, 8, plan, 0, round_) for round_ in range(40)]
    assert places == [choose_place(photo, 8, plan, 0, round_) for round_ in range(40)]
    assert len(set(places)) > 10
    assert places != [choose_place(photo, 8, plan, 1, round_) for round_ in range(40)]
    assert places != [choose_place(photo, 8, BatchPlan(seed=1), 0, r) for r in range(40)]


def test_each_class_image_is_trained_with_the_prompt_that_it_was_drawn_from(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    photos, priors = sets
    several = priors.model_copy(update={"more_prompts": ("a sketch of a person", "a hat")})
    prompts = several.prompts()
    assert prompts[:3] == [priors.prompt, priors.prompt, "a sketch of a person"]
    batches = make_lesson(model, photos, several, small_config(model))
    met = set()
    for update in range(6):
        (batch,) = batches.make_batches(update, BatchShare(2, 2))
        for sample, prompt in zip(batch.samples, batch.prompts, strict=True):
            if sample.is_prior:
                assert prompt == prompts[sample.picture]
                met.add(prompt)
            assert prompt in batches.texts
    assert met == set(prompts)


def test_a_share_of_the_captions_is_dropped_whatever_the_batches(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    batches = make_lesson(model, *sets, small_config(model, train__caption_dropout=0.25))
    whole = [batches.draw_samples(update, BatchShare(4, 4)) for update in range(100)]
    halves = [
        [s for index in range(2) for s in batches.draw_samples(update, BatchShare(2, 2, 2, index))]
        for update in range(100)
    ]
    for one, other in zip(whole, halves, strict=True):
        dropped = [{(s.kind, s.number): s.drops_caption for s in drawn} for drawn in (one, other)]
        assert dropped[0] == dropped[1]
    flat = [sample for drawn in whole for sample in drawn]
    for kind in ("photo", "class image"):
        own = [sample.drops_caption for sample in flat if sample.kind == kind]
        assert 0.15 < sum(own) / len(own) < 0.35
    (batch,) = batches.encode(flat[:8])
    prompts = ["" if s.drops_caption else batches.prompts[s.is_prior] for s in batch.samples]
    assert list(batch.prompts) == prompts
    without = make_lesson(model, *sets, small_config(model))
    assert not any(s.drops_caption for s in without.draw_samples(0, BatchShare(4, 4)))


def test_a_dropped_caption_is_what_guidance_takes_for_none(model: Model) -> None:
    """Zeros where the base model was taught so, and else the encoded empty prompt."""
    prompts = ["a dog", "", "a cat"]
    encoded = model.encode_prompts(prompts, drop_empty=True)
    assert model.encode_prompts(prompts).tokens[1].any()
    assert not encoded.tokens[1].any()
    assert not encoded.pooled[1].any()
    alone = model.encode_prompts(["a cat"])
    torch.testing.assert_close(encoded.tokens[2:], alone.tokens)
    pipeline = model._pipeline
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        assert model.encode_prompts(prompts, drop_empty=True).tokens[1].any()
    finally:
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)


def test_held_out_photos_are_never_drawn(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    config = small_config(model, watch__held_out_photos=1)
    batches = make_lesson(model, *sets, config)
    last = sets[0].photos[-1]
    drawn = {
        batches.name(sample)
        for update in range(12)
        for sample in batches.draw_samples(update, BatchShare(2, 2))
    }
    assert last.source not in drawn
    assert len(drawn) == 2 + 3
    (batch,) = batches.validation()
    assert [batches.name(sample) for sample in batch.samples] == [last.source]


def test_pictures_of_other_shapes_go_in_parts_of_their_own(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    photos, priors = sets
    wide = photos.photos[0].model_copy(update={"bucket_px": (64, 80)})
    mixed = photos.model_copy(update={"photos": (wide, *photos.photos[1:])})
    batches = make_lesson(model, mixed, priors, small_config(model))
    parts = batches.make_batches(0, BatchShare(3, 2))
    assert [part.latents.mean.shape[-2:] for part in parts] == [(8, 8), (8, 10)]
    samples = [sample for part in parts for sample in part.samples]
    assert sorted(sample.number for sample in samples if not sample.is_prior) == [0, 1, 2]


def test_masks_are_cut_like_their_pictures(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    photos = sets[0]
    width, height = photos.photos[0].scaled_px[::-1]
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    mask.save(photos.folder / "half.png")
    first = photos.photos[0].model_copy(update={"mask": "half.png"})
    masked = photos.model_copy(update={"photos": (first, *photos.photos[1:])})
    batches = make_lesson(model, masked, None, small_config(model))
    (batch,) = batches.make_batches(0, BatchShare(3, 0))
    assert batch.masks is not None
    for sample, cut in zip(batch.samples, batch.masks, strict=True):
        if sample.picture:
            assert cut.eq(1).all()
            continue
        edge = (width // 2 - sample.place[1]) / 8
        expected = (torch.arange(1, 9) - edge).clamp(0, 1)
        torch.testing.assert_close(cut, expected.expand(8, 8), atol=0.01, rtol=0)


def test_every_photo_is_drawn_equally_often() -> None:
    drawn = [
        sample
        for update in range(9)
        for _, sample, _ in draw_numbers(6, update, 4, BatchShare(4, 0), 0, "x")
    ]
    assert {drawn.count(sample) for sample in range(6)} == {6}
    assert drawn[:6] != drawn[6:12]
    assert sorted(drawn[:6]) == list(range(6))


@pytest.mark.parametrize("batches", [2, 3])
def test_the_shares_of_an_update_are_the_whole_of_it(batches: int) -> None:
    for update in range(5):
        whole = draw_numbers(7, update, 2 * batches, BatchShare(2 * batches, 0), 0, "photos")
        shares = [
            draw_numbers(7, update, 2, BatchShare(2, 0, batches, i), 0, "photos")
            for i in range(batches)
        ]
        assert [sample for share in shares for sample in share] == whole


def test_no_photo_left_is_an_error(model: Model, sets: tuple[PhotoSet, ClassImageSet]) -> None:
    with pytest.raises(ValueError, match="none is left"):
        make_lesson(model, sets[0], None, small_config(model, watch__held_out_photos=3))


def test_encoding_is_told(model: Model, sets: tuple[PhotoSet, ClassImageSet]) -> None:
    told: list[tuple[int, int]] = []
    batches: TrainingBatches = make_lesson(model, *sets, small_config(model))
    fresh = TrainingBatches(
        *(model, batches.photos, (), batches.folder, batches.priors, batches.prior_prompts, 64),
        *(batches.prompts, batches.plan),
    )
    fresh.encode_all(lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
