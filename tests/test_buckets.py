"""Where pictures are cut: always inside, always with the subject, and never twice by other dice."""

import doctest
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.data import buckets as crops
from dreamloom.data.buckets import (
    choose_bucket,
    list_buckets,
    list_places,
    mirror_left,
    place_crop,
    scale_box,
    scale_to_cover,
    suggest_step,
)

# Podell et al., SDXL, appendix I: heights and widths.
SDXL = """
512 2048, 512 1984, 512 1920, 512 1856, 576 1792, 576 1728, 576 1664, 640 1600, 640 1536, 704 1472,
704 1408, 704 1344, 768 1344, 768 1280, 832 1216, 832 1152, 896 1152, 896 1088, 960 1088, 960 1024,
1024 1024, 1024 960, 1088 960, 1088 896, 1152 896, 1152 832, 1216 832, 1280 768, 1344 768, 1408 704,
1472 704, 1536 640, 1600 640, 1664 576, 1728 576, 1792 576, 1856 512, 1920 512, 1984 512, 2048 512
"""
SIDES = st.integers(1, 400)
SIZES = st.tuples(SIDES, SIDES)


def test_the_examples_hold():
    assert doctest.testmod(crops).failed == 0


# Buckets


def test_buckets_are_those_that_sdxl_was_trained_on():
    published = [tuple(map(int, pair.split())) for pair in SDXL.split(",")]
    assert set(list_buckets(1024, 64, max_aspect=4)) == {*published, (1344, 704)}


@settings(max_examples=40)
@given(
    resolution_px=st.integers(8, 1500),
    step_px=st.sampled_from([8, 16, 32, 64]),
    max_aspect=st.floats(1, 4),
)
def test_buckets_keep_their_bounds(resolution_px, step_px, max_aspect):
    step_px = min(step_px, resolution_px)
    buckets = list_buckets(resolution_px, step_px, max_aspect)
    for height, width in buckets:
        assert height % step_px == width % step_px == 0
        assert height * width <= resolution_px**2
        assert max(height, width) <= max_aspect * min(height, width)
        assert (width, height) in buckets
    assert len(set(buckets)) == len(buckets)
    assert buckets == sorted(buckets, key=lambda size: size[0] / size[1])
    side = resolution_px // step_px * step_px
    assert (side, side) in buckets


def test_small_bases_have_as_many_buckets_as_their_latents_allow():
    steps = {(res, per): suggest_step(res, per) for res, per in [(1024, 8), (512, 8), (128, 4)]}
    assert steps == {(1024, 8): 64, (512, 8): 32, (128, 4): 8}
    assert suggest_step(64, 8) == suggest_step(8, 8) == 8
    assert len(list_buckets(128, 8)) == len(list_buckets(1024, 64)) == 21
    assert list_buckets(64, 8) == [(48, 80), (56, 72), (64, 64), (72, 56), (80, 48)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "resolution_px must be 1 or more, got 0"),
        ((64, 0), "step_px must be 1 or more, got 0"),
        ((64, 128), "step_px must be 64 or less, got 128"),
        ((64, 8, 0.5), "max_aspect must be 1 or more, got 0.5"),
        ((64, 8, math.nan), "max_aspect must be 1 or more, got nan"),
    ],
)
def test_impossible_buckets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        list_buckets(*arguments)
    with pytest.raises(ValueError, match="pixels_per_latent must be 1 or more, got 0"):
        suggest_step(64, 0)


@given(size=SIZES, buckets=st.lists(SIZES, min_size=1, max_size=9), rng=st.randoms())
def test_the_nearest_bucket_is_chosen_in_whatever_order_they_come(size, buckets, rng):
    chosen = choose_bucket(size, buckets)

    def distance(bucket):
        return abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1]))

    assert distance(chosen) <= min(map(distance, buckets)) + 1e-12
    shuffled = rng.sample(buckets, len(buckets))
    assert choose_bucket(size, shuffled) == chosen


def test_of_equally_near_buckets_the_largest_and_then_the_lying_one_is_chosen():
    assert choose_bucket((50, 50), [(20, 40), (40, 20), (10, 20)]) == (20, 40)
    assert choose_bucket((50, 50), [(30, 60), (40, 20)]) == (30, 60)
    assert choose_bucket((1, 1), list_buckets(1024, 64)) == (1024, 1024)


def test_a_choice_among_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one bucket"):
        choose_bucket((1, 1), [])
    with pytest.raises(ValueError, match="height must be 1 or more, got 0"):
        choose_bucket((0, 1), [(8, 8)])


@given(size=SIZES, bucket=SIZES)
def test_a_scaled_picture_just_covers_its_bucket(size, bucket):
    scaled = scale_to_cover(size, bucket)
    assert scaled[0] >= bucket[0]
    assert scaled[1] >= bucket[1]
    assert scaled[0] == bucket[0] or scaled[1] == bucket[1]
    exact = max(Fraction(bucket[0], size[0]), Fraction(bucket[1], size[1]))
    assert all(abs(new - old * exact) <= 1 for new, old in zip(scaled, size, strict=True))


def test_a_bucket_without_sides_is_refused():
    with pytest.raises(ValueError, match="bucket_px width must be 1 or more, got 0"):
        scale_to_cover((5, 5), (8, 0))


@given(data=st.data(), size=SIZES, scaled=SIZES)
def test_a_scaled_box_holds_what_it_held_and_stays_inside(data, size, scaled):
    top, bottom = sorted(data.draw(st.sets(st.integers(0, size[0]), min_size=2, max_size=2)))
    left, right = sorted(data.draw(st.sets(st.integers(0, size[1]), min_size=2, max_size=2)))
    box = scale_box((top, left, bottom, right), size, scaled)
    assert 0 <= box[0] <= top * scaled[0] / size[0]
    assert 0 <= box[1] <= left * scaled[1] / size[1]
    assert bottom * scaled[0] / size[0] - 1e-9 <= box[2] <= scaled[0]
    assert right * scaled[1] / size[1] - 1e-9 <= box[3] <= scaled[1]
    assert box[0] < box[2]
    assert box[1] < box[3]


# Places


@st.composite
def cuts(draw, with_box):
    """A picture, a crop that fits in it, a grid, and perhaps a box in the picture."""
    scaled = draw(SIZES)
    crop = tuple(draw(st.integers(1, side)) for side in scaled)
    box = None
    if with_box:
        spans = [
            sorted(draw(st.sets(st.integers(0, side), min_size=2, max_size=2))) for side in scaled
        ]
        box = (spans[0][0], spans[1][0], spans[0][1], spans[1][1])
    return scaled, crop, draw(st.integers(1, 40)), box


@given(cut=cuts(with_box=False) | cuts(with_box=True), seed=st.integers(0, 99))
def test_a_crop_lies_inside_the_picture_and_the_same_dice_place_it_alike(cut, seed):
    scaled, crop, grid, box = cut
    top, left = place_crop(scaled, crop, grid, random.Random(seed), box)
    assert 0 <= top <= scaled[0] - crop[0]
    assert 0 <= left <= scaled[1] - crop[1]
    assert (top, left) == place_crop(scaled, crop, grid, random.Random(seed), box)


@given(cut=cuts(with_box=True), seed=st.integers(0, 99))
def test_a_box_is_kept_whenever_it_fits_and_its_middle_otherwise(cut, seed):
    scaled, crop, grid, box = cut
    place = place_crop(scaled, crop, grid, random.Random(seed), box)
    for start, side, begin, end in zip(place, crop, box[:2], box[2:], strict=True):
        if end - begin <= side:
            assert start <= begin
            assert end <= start + side
        else:
            assert begin <= start
            assert start + side <= end
            assert abs((start + start + side) - (begin + end)) <= 1


@given(cut=cuts(with_box=False))
def test_without_a_box_crops_keep_to_the_middle_half(cut):
    scaled, crop, grid, _ = cut
    for starts, length, side in zip(list_places(scaled, crop, grid), scaled, crop, strict=True):
        room = length - side
        assert all(room / 4 - 0.5 <= start <= room * 3 / 4 for start in starts)


@given(cut=cuts(with_box=False) | cuts(with_box=True))
def test_places_lie_on_the_grid_wherever_it_allows(cut):
    scaled, crop, grid, box = cut
    for starts, length, side in zip(
        list_places(scaled, crop, grid, box), scaled, crop, strict=True
    ):
        assert starts == sorted(set(starts))
        assert len(starts) == 1 or all(
            start % grid == 0 or start == length - side for start in starts
        )


def test_all_places_that_keep_the_box_come_up():
    tops, lefts = list_places((64, 150), (64, 64), 8, box=(0, 70, 64, 110))
    assert (tops, lefts) == ([0], [48, 56, 64])
    rng = random.Random(0)
    thrown = {place_crop((64, 150), (64, 64), 8, rng, (0, 70, 64, 110)) for _ in range(60)}
    assert thrown == {(0, left) for left in lefts}


def test_the_far_edge_can_be_reached_though_the_grid_misses_it():
    box = (0, 95, 64, 107)
    assert list_places((64, 107), (64, 64), 8, box) == ([0], [43])
    assert list_places((64, 107), (64, 64), 8, (0, 60, 64, 90)) == ([0], [32, 40, 43])


def test_a_crop_as_large_as_the_picture_has_one_place():
    assert list_places((64, 64), (64, 64), 8) == ([0], [0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((64, 64), (65, 64), 8), r"a crop of \(65, 64\) cannot be cut"),
        (((64, 64), (64, 0), 8), r"a crop of \(64, 0\) cannot be cut"),
        (((64, 64), (8, 8), 0), "grid_px must be 1 or more, got 0"),
        (((64, 64), (8, 8), 8, (0, 0, 65, 9)), r"the box \(0, 0, 65, 9\) does not lie inside"),
        (((64, 64), (8, 8), 8, (5, 5, 5, 9)), r"the box \(5, 5, 5, 9\) does not lie inside"),
    ],
)
def test_impossible_cuts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        list_places(*arguments)


# Mirrors


@given(cut=cuts(with_box=True), seed=st.integers(0, 99))
def test_mirroring_the_picture_mirrors_the_crop_with_its_box(cut, seed):
    scaled, crop, grid, box = cut
    _, left = place_crop(scaled, crop, grid, random.Random(seed), box)
    turned = mirror_left(left, crop[1], scaled[1])
    assert 0 <= turned <= scaled[1] - crop[1]
    assert mirror_left(turned, crop[1], scaled[1]) == left
    # What lay left of the box in the crop lies right of it in the mirrored one.
    mirrored_right = scaled[1] - box[1]
    assert box[1] - left == (turned + crop[1]) - mirrored_right
