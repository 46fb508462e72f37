"""Mean colour and sharpness: what is measured, what counts as moved, and what as off."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreamloom.data.image_io import to_rgb
from dreamloom.evaluation.metrics.appearance import (
    AXES,
    LEAST_FREEDOM,
    LEAST_LIMITS,
    PREDICTED_SHARE,
    measure_appearance,
    measure_deviation,
    measure_limits,
    measure_shift,
    measure_spread,
)

# Colours of Lindbloom's calculator for sRGB and D65, to 0.1.
KNOWN = {
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (255, 0, 0): (53.2, 80.1, 67.2),
    (0, 0, 255): (32.3, 79.2, -107.9),
    (128, 128, 128): (53.6, 0.0, 0.0),
}


def textured(seed: int = 0, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3))
    return Image.fromarray(pixels.astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize("srgb", KNOWN)
def test_one_colour_is_its_own_mean(srgb: tuple[int, int, int]):
    found = measure_appearance(Image.new("RGB", (8, 8), srgb))
    assert found[:3] == pytest.approx(KNOWN[srgb], abs=0.1)
    assert found[3] == -1  # nothing is less sharp


def test_the_mean_is_over_the_picture_and_does_not_know_its_size():
    image = Image.new("RGB", (400, 400), "white")
    image.paste("black", (0, 0, 200, 400))
    assert measure_appearance(image)[:3] == pytest.approx([50, 0, 0], abs=0.5)
    small = measure_appearance(image.resize((100, 100)))
    assert small[:3] == pytest.approx(measure_appearance(image)[:3], abs=0.5)


def test_a_blurred_picture_is_less_sharp_and_keeps_its_colour():
    sharp = textured()
    blurred = sharp.filter(ImageFilter.GaussianBlur(2))
    moved = measure_appearance(blurred) - measure_appearance(sharp)
    assert moved[3] < -2
    assert moved[:3] == pytest.approx([0, 0, 0], abs=6)


def test_a_picture_of_two_pixels_is_refused():
    with pytest.raises(ValueError, match="3 px"):
        measure_appearance(to_rgb(Image.new("RGB", (2, 2))))


def looks(seed: int, prompts: int = 8, seeds: int = 3) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    of_prompts = rng.normal(0, 8, (prompts, 1, 4))
    rows = of_prompts + rng.normal(0, 2, (prompts, seeds, 4))
    return rows.reshape(-1, 4), [f"prompt {k}" for k in range(prompts) for _ in range(seeds)]


def test_a_shift_is_measured_pair_by_pair_with_its_interval():
    before, prompts = looks(0)
    noise = np.random.default_rng(1).normal(0, 1, before.shape)
    shift = measure_shift(before, before + noise + [0, 0, -12, -1], prompts)
    assert shift.n == 24
    assert shift.difference == pytest.approx(12, abs=1)
    low, high = shift.difference_interval
    assert 8 < low < shift.difference < high
    assert shift.has_moved
    assert shift.axes[2].interval[1] < 0 < shift.axes[0].interval[1]
    assert shift.sharpness.interval[1] < 0


def test_what_did_not_move_is_rarely_said_to_have():
    moved = 0
    for seed in range(200):
        before, prompts = looks(seed)
        after = before + np.random.default_rng(1000 + seed).normal(0, 3, before.shape)
        moved += measure_shift(before, after, prompts).has_moved
    assert moved <= 200 * 0.05 + 2 * np.sqrt(200 * 0.05 * 0.95)


def test_the_same_pictures_have_not_moved_at_all():
    before, prompts = looks(0)
    shift = measure_shift(before, before, prompts)
    assert (shift.difference, shift.has_moved, shift.sharpness.value) == (0, False, 0)


def test_a_single_pair_has_no_interval():
    before, prompts = looks(0)
    shift = measure_shift(before[:1], before[:1] + 9, prompts[:1])
    assert shift.difference_interval is None
    assert not shift.has_moved


def test_the_spread_is_of_pictures_around_their_own_prompt():
    rng = np.random.default_rng(0)
    groups = [100 * k + rng.normal(0, [3, 5, 7, 1], (12, 4)) for k in range(40)]
    spread = measure_spread(groups)
    assert spread.deviation == pytest.approx([3, 5, 7, 1], rel=0.1)
    assert spread.freedom == 40 * 11


def test_too_few_pictures_have_no_spread():
    groups = [np.zeros((2, 4))] * (LEAST_FREEDOM - 1)
    assert measure_spread(groups) is None
    assert measure_spread([*groups, np.zeros((2, 4))]) is not None


@pytest.mark.parametrize("seeds", [2, 4])
def test_another_picture_of_the_prompt_is_rarely_off_however_few_there_are(seeds: int):
    rng = np.random.default_rng(seeds)
    off = total = 0
    for _ in range(300):
        groups = list(rng.normal(0, 30, (8, 1, 4)) + rng.normal(0, 9, (8, seeds, 4)))
        spread = measure_spread(groups)
        own = groups[0].mean(axis=0)
        others = own + rng.normal(0, 9 * np.sqrt(1 + 1 / seeds), (50, 4))
        off += sum(np.abs(measure_deviation(one, groups[0], spread)).max() > 1 for one in others)
        total += len(others)
    assert off / total <= 2 * len(AXES) * (1 - PREDICTED_SHARE)


def test_a_difference_that_nobody_sees_is_not_off():
    spread = measure_spread([np.zeros((3, 4))] * 8)
    assert measure_limits(3, spread) == pytest.approx(LEAST_LIMITS)
    assert measure_deviation(np.array([0, 0, -5.0, 0]), np.zeros((3, 4)), spread)[2] == -0.5
