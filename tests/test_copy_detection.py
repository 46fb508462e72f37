"""A copy is found however it was saved again; another picture of the same subject is none."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from dreamloom.evaluation.copy_detection import (
    LIMIT,
    correlate_layouts,
    find_copies,
    read_layout,
    read_views,
)
from dreamloom.picturebook.world import JUDGING_SEED_START, sample_drawing, vary
from tools.picturebook.drawing import draw

SCENES = ("city", "beach", "forest", "studio")


def draw_photos(number=0):
    who = sample_drawing(JUDGING_SEED_START + 500_000 + number, kind="person").identity
    rng = random.Random(number)
    return who, [draw(vary(who, rng, medium="photo", scene=scene), 160) for scene in SCENES]


def correlate(pictures, photos):
    layouts = np.stack([read_layout(picture) for picture in pictures])
    return correlate_layouts(layouts, [read_views(photo) for photo in photos])


def save_again(image):
    kept = io.BytesIO()
    image.resize((96, 96), Image.Resampling.BICUBIC).save(kept, "JPEG", quality=50)
    return Image.open(kept).convert("RGB")


def disturb(image):
    pixels = np.asarray(image, float)
    noise = np.random.default_rng(0).normal(0, 8, pixels.shape)
    return Image.fromarray(np.clip(1.1 * pixels + noise - 10, 0, 255).astype(np.uint8))


def cut_edges(image):
    side = round(0.9 * image.width)
    return image.crop((image.width - side, 0, image.width, side))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        save_again,
        disturb,
        cut_edges,
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ],
    ids=["untouched", "saved again", "noisy", "cut", "mirrored"],
)
def test_a_copy_is_found_and_its_photo_named(change):
    _, photos = draw_photos()
    copies = [change(photo) for photo in photos]
    correlations = correlate(copies, photos)
    assert correlations.argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert find_copies(correlations, correlate(photos, photos)).all()


@pytest.mark.parametrize("number", range(4))
def test_new_pictures_of_the_same_subject_are_no_copies(number):
    who, photos = draw_photos(number)
    rng = random.Random(1000 + number)
    others = [draw(vary(who, rng, medium="photo", scene=scene), 128) for scene in SCENES * 3]
    correlations = correlate(others, photos)
    assert not find_copies(correlations, correlate(photos, photos)).any()
    assert correlations.max() < LIMIT


def test_a_square_cut_from_a_wide_photo_is_found():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 16, 3), np.uint8))
    wide = coarse.resize((320, 180), Image.Resampling.BICUBIC)
    cuts = [wide.crop((left, 0, left + 180, 180)) for left in (0, 23, 70, 111, 140)]
    assert correlate(cuts, [wide]).min() > LIMIT


def test_photos_of_one_burst_raise_the_limit():
    _, photos = draw_photos()
    burst = [photos[0], disturb(photos[0])]
    # As close to a photo as the photos are to each other: not to be told from a new one.
    among = correlate(burst, burst)
    assert not find_copies(among[:1, 1:], among).any()


def test_a_plain_picture_has_no_layout():
    _, photos = draw_photos()
    plain = Image.new("RGB", (50, 50), (12, 34, 56))
    assert (read_layout(plain) == 0).all()
    assert (correlate([plain], photos) == 0).all()
    with pytest.raises(ValueError, match="at least one photo"):
        correlate_layouts(np.zeros((1, 4), np.float32), [])


def test_an_uncut_view_is_the_layout_itself():
    _, photos = draw_photos()
    small = photos[0].resize((96, 96), Image.Resampling.BOX)
    assert np.abs(read_views(small).layouts[0] - read_layout(small)).max() < 5e-3
