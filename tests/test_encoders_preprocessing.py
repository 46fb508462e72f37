"""Pictures reach an encoder as its authors prepared them, to the last pixel."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dreamloom.evaluation.encoders.preprocessing import (
    CLIP_PREPROCESSING,
    DINO_PREPROCESSING,
    DINOV2_PREPROCESSING,
    Preprocessing,
)

# What the encoders' own preprocessor_config.json say.
PUBLISHED = {
    "clip": (CLIPImageProcessorPil(), CLIP_PREPROCESSING),
    "dinov2": (
        BitImageProcessorPil(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            resample=3,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        DINOV2_PREPROCESSING,
    ),
}
PUBLISHED["dino"] = (PUBLISHED["dinov2"][0], DINO_PREPROCESSING)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def farthest(name, image):
    """Compare our pixels with the published ones: the largest difference, on their own scale."""
    processor, recipe = PUBLISHED[name]
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = recipe([image])
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "size",
    [(224, 224), (256, 256), (301, 517), (517, 301), (640, 427), (225, 224), (100, 37), (1, 3)],
)
def test_pixels_are_the_published_ones(name, size):
    assert farthest(name, noise(*size)) <= 1e-6


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(PUBLISHED)),
    st.integers(2, 700),
    st.integers(2, 700),
    st.integers(0, 9),
)
def test_pixels_are_the_published_ones_at_any_size(name, width, height, seed):
    assert farthest(name, noise(width, height, seed)) <= 1e-6


def test_the_comparison_finds_another_filter_crop_or_rounding():
    image = noise(301, 517)
    processor, recipe = PUBLISHED["clip"]
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    bilinear = image.resize((224, 384), Image.Resampling.BILINEAR)
    rounded_up = image.resize((224, 385), Image.Resampling.BICUBIC)
    shifted = image.resize((224, 384), Image.Resampling.BICUBIC).crop((0, 81, 224, 305))
    for broken in (bilinear, rounded_up, shifted):
        assert float((recipe([broken]) - theirs).abs().max()) > 0.01


@pytest.mark.parametrize("recipe", [CLIP_PREPROCESSING, DINO_PREPROCESSING])
def test_black_and_white_arrive_where_the_recipe_says(recipe):
    for level in (0, 255):
        found = recipe([Image.new("RGB", (300, 400), (level,) * 3)])[0, :, 5, 5].tolist()
        expected = [
            (level / 255 - mean) / deviation
            for mean, deviation in zip(recipe.mean, recipe.deviation, strict=True)
        ]
        assert found == pytest.approx(expected, abs=1e-5)
        assert all(abs(value) < 2.7 for value in found)


def test_pictures_are_cropped_not_squashed():
    wide = Image.new("RGB", (400, 100), "black")
    wide.paste("white", (140, 0, 260, 100))
    shown = Preprocessing(50, 50, (0.0,) * 3, (1.0,) * 3)([wide])
    assert shown.min() == 1.0
    assert Preprocessing(60, 50, (0.0,) * 3, (1.0,) * 3)([wide]).shape == (1, 3, 50, 50)


def test_shrinking_is_smooth():
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[::2] = 255
    shown = Preprocessing(32, 32, (0.0,) * 3, (1.0,) * 3)([Image.fromarray(stripes)])
    assert shown[..., 4:-4, :].std() < 0.02  # without smoothing, only black or white lines survive


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ((32, 40, (0.5,) * 3, (0.5,) * 3), "a crop must be 1 px to the resized side, got 40 of 32"),
        ((32, 32, (0.5,) * 3, (0.01, 1.0, 1.0)), "not meant for pixels in"),
        ((32, 32, (123.0, 117.0, 104.0), (58.0, 57.0, 57.0)), None),
        ((32, 32, (0.5,) * 3, (0.0, 1.0, 1.0)), "not meant for pixels in"),
    ],
)
def test_recipes_for_another_scale_are_refused(recipe, message):
    if message is None:
        # A recipe for 0 to 255 stays within bounds, but lets pictures differ by a hundredth only.
        with pytest.raises(ValueError, match="leave hardly any contrast"):
            Preprocessing(*recipe)
        return
    with pytest.raises(ValueError, match=message):
        Preprocessing(*recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has no 'size'"),
        ({"size": 32}, "has no 'image_mean'"),
        ({"size": {"height": 32, "width": 40}}, "one number for both sides"),
    ],
)
def test_bad_preprocessor_files_are_explained(tmp_path, settings, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        Preprocessing.read(tmp_path)
