"""What training learns from: crops, framings, prompts, and the order in which they are dealt."""

from pathlib import Path

import pytest

from dreamloom.families import load_model
from dreamloom.families.base import Model
from dreamloom.lessons import choose_crops, choose_rows, deal
from dreamloom.pictures import PhotoSet, PriorSet
from dreamloom.runtime import pick_runtime
from studio_set import make_lesson, make_sets, small_config


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> Model:
    return load_model(str(tiny_sdxl), pick_runtime("cpu"))


@pytest.fixture(scope="module")
def sets(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[PhotoSet, PriorSet]:
    return make_sets(model, tmp_path_factory.mktemp("sets"))


def test_prompts_and_framings_stay_with_their_images(
    model: Model, sets: tuple[PhotoSet, PriorSet]
) -> None:
    """The faults of others: tiled prompts, and class images with a photo's crop."""
    config = small_config(model)
    lesson = make_lesson(model, *sets, config)
    rows, is_prior = choose_rows(lesson, 0, 2, 2, 0)
    side = model.advice.resolution_px
    for row, prior in zip(rows.tolist(), is_prior.tolist(), strict=True):
        assert lesson.prompt_rows[row] == (1 if prior else 0)
        framing = lesson.framings[row]
        assert framing.original_px == ((side, side) if prior else (72, 96))
        assert framing.crop_top_left_px == (0, 0) or not prior


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
    assert len(lesson.conditioning) == 2 + 3
    for photo, rows in enumerate(lesson.crops):
        assert set(lesson.prompt_rows[list(rows)].tolist()) == {2 + photo}


def test_mirrored_crops_are_framed_from_the_other_side(
    model: Model, sets: tuple[PhotoSet, PriorSet]
) -> None:
    plain = make_lesson(model, sets[0], None, small_config(model))
    mirrored = make_lesson(model, sets[0], None, small_config(model, train__flip=True))
    assert len(mirrored.crops[0]) == 2 * len(plain.crops[0])
    straight, turned = (mirrored.framings[row] for row in mirrored.crops[0][:2])
    room = sets[0].photos[0].scaled_px[1] - sets[0].resolution_px
    assert straight.crop_top_left_px[1] + turned.crop_top_left_px[1] == room


def test_every_photo_is_dealt_equally_often() -> None:
    dealt = [card for update in range(9) for card in deal(6, 4, update, 0, "photos")]
    assert {dealt.count(card) for card in range(6)} == {6}
    assert dealt[:6] != dealt[6:12]
    assert sorted(dealt[:6]) == list(range(6))


def test_crops_stay_inside_and_begin_with_the_centre() -> None:
    assert choose_crops((64, 64), 64, 4, 0, 0) == [(0, 0)]
    places = choose_crops((64, 164), 64, 8, 0, 0)
    assert places[0] == (0, 50)
    assert len(places) > 4
    assert all(top == 0 and 25 <= left <= 75 for top, left in places)
    assert places != choose_crops((64, 164), 64, 8, 0, 1)
