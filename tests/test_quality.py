"""What is told from pixels alone."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreamloom.data.quality import (
    LEAST_SHARPNESS,
    NEAR_BITS,
    difference_hash,
    find_bars,
    group_alike,
    judge_light,
    nearly_same,
    sharpness,
)


def scene(seed, side=512):
    """A picture with edges everywhere, unlike that of every other seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST)


def grey_of(image):
    return np.asarray(image.convert("L"), dtype=np.float32)


def test_bars_lie_on_two_opposite_sides_and_are_black():
    grey = np.full((100, 200), 128.0, dtype=np.float32)
    assert find_bars(grey) == (0, 0, 100, 200)
    grey[:, :20] = 0
    assert find_bars(grey) == (0, 0, 100, 200)
    grey[:, 190:] = 8
    assert find_bars(grey) == (0, 20, 100, 190)
    grey[:, 190:] = 30
    assert find_bars(grey) == (0, 0, 100, 200)
    assert find_bars(np.zeros((9, 9), dtype=np.float32)) == (0, 0, 9, 9)


def test_edges_of_what_is_not_the_photos_are_not_its_sharpness():
    soft = grey_of(scene(1).filter(ImageFilter.GaussianBlur(12)))
    opaque = np.zeros(soft.shape, dtype=bool)
    opaque[100:300, 150:400] = True
    cut = np.where(opaque, soft, 255.0).astype(np.float32)
    assert sharpness(cut, opaque) < LEAST_SHARPNESS < sharpness(cut)
    assert sharpness(soft, np.ones_like(opaque)) == sharpness(soft)
    assert sharpness(soft, np.zeros_like(opaque)) == 0


def test_sharpness_falls_with_every_blur():
    figures = [
        sharpness(grey_of(scene(1).filter(ImageFilter.GaussianBlur(radius))))
        for radius in (0, 1, 2, 4, 8)
    ]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] > 100 > LEAST_SHARPNESS > figures[-1]


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1)])
def test_sharpness_falls_with_a_shake_in_any_direction(step):
    grey = grey_of(scene(1))
    shaken = sum(np.roll(grey, (k * step[0], k * step[1]), (0, 1)) for k in range(30)) / 30
    assert sharpness(shaken) < sharpness(grey) / 10


def test_a_single_colour_has_no_sharpness():
    assert sharpness(np.full((3, 40), 9.0)) == 0.0


def test_sharpness_needs_three_pixels():
    with pytest.raises(ValueError, match="3 px or more"):
        sharpness(np.zeros((2, 40)))


@pytest.mark.parametrize(
    ("low", "high", "light"),
    [
        (0, 255, "good"),
        (0, 60, "good"),
        (0, 55, "dark"),
        (100, 145, "good"),
        (100, 140, "flat"),
        (250, 255, "overexposed"),
        (60, 255, "good"),
    ],
)
def test_light(low, high, light):
    assert judge_light(np.linspace(low, high, 900).reshape(30, 30)) == light


def test_white_paper_is_well_lit_while_there_is_something_dark_on_it():
    paper = np.full((30, 30), 255.0)
    paper[:8, :8] = 30.0
    assert judge_light(paper) == "good"
    paper[:8, :8] = 120.0
    assert judge_light(paper) == "overexposed"


def test_copies_look_alike_and_other_pictures_do_not():
    def distance(one, other):
        return int((difference_hash(one) != difference_hash(other)).sum())

    original = scene(1)
    for copy in (
        original.resize((200, 200)),
        original.point(lambda value: value // 2),
        original.crop((5, 5, 507, 507)),
        original.convert("L"),
    ):
        assert nearly_same(difference_hash(original), difference_hash(copy))
    assert min(distance(original, scene(seed)) for seed in range(2, 20)) > 2 * NEAR_BITS


def test_groups_reach_across_a_chain_and_keep_the_order():
    def near(one, other):
        return abs(one - other) < 2

    assert group_alike([1, 5, 3, 2, 9, 6], near) == [[1, 3, 2], [5, 6]]
    assert group_alike([1, 5], near) == []
    assert group_alike([], near) == []
