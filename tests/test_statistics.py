"""Intervals cover what they promise, and follow the structure of the pictures."""

import doctest

import numpy as np
import pytest

from dreamloom import statistics
from dreamloom.significance import student_quantile
from dreamloom.statistics import (
    Sampled,
    draw,
    interval,
    lift,
    mean_over_runs,
    mean_with_interval,
    sample_mean,
    sample_pairs,
    sample_photo_pairs,
    wilson_interval,
)


def coverage(clusters, between, within, trials=200):
    """Share of simulated samples whose interval holds the true mean, which is 0."""
    dice = np.random.default_rng(7)
    names, of = np.unique(clusters, return_inverse=True)
    hits = 0
    for trial in range(trials):
        values = dice.normal(0, between, len(names))[of] + dice.normal(0, within, len(of))
        low, high = mean_with_interval(values, clusters, resamples=300, seed=trial).interval
        hits += low <= 0 <= high
    return hits / trials


def test_the_examples_run():
    assert doctest.testmod(statistics).failed == 0


@pytest.mark.parametrize(
    ("clusters", "between", "within"),
    [
        ([0] * 8, 0, 1),
        ([0] * 24, 0, 1),
        (list(range(10)), 1, 0),
        ([prompt for prompt in range(8) for _ in range(4)], 1, 1),
    ],
    ids=["eight pictures", "one prompt", "one picture each", "prompts"],
)
def test_intervals_cover_the_truth_nearly_as_often_as_they_say(clusters, between, within):
    assert 0.90 <= coverage(clusters, between, within) <= 1.0


def test_pictures_of_one_prompt_are_not_independent():
    dice = np.random.default_rng(0)
    prompts = np.repeat(np.arange(6), 8)
    values = dice.normal(0, 1, 6)[prompts] + dice.normal(0, 0.1, 48)
    clustered = mean_with_interval(values, prompts.tolist()).interval
    naive = mean_with_interval(values).interval
    assert clustered[1] - clustered[0] > 2 * (naive[1] - naive[0])


def test_photos_are_a_sample_too():
    dice = np.random.default_rng(0)
    by_photo = dice.normal(0, 1, 6)
    values = by_photo + dice.normal(0, 0.1, (24, 6))
    with_photos = mean_with_interval(values).interval
    without = mean_with_interval(values.mean(axis=1)).interval
    assert with_photos[1] - with_photos[0] > 3 * (without[1] - without[0])


def test_known_answers():
    estimate = mean_with_interval(np.array([1.0, 1.0, 1.0, 5.0]), ["a", "a", "a", "b"])
    assert estimate.value == 3.0  # prompts count alike, not pictures
    assert estimate.n == 4
    even = mean_with_interval(np.full(5, 0.25)).interval
    assert even == pytest.approx((0.25, 0.25))
    # Against the t interval, which values without any skew should resemble and never undercut.
    half = np.random.default_rng(3).normal(0, 1, 10)
    values = np.concatenate([half, -half])
    low, high = mean_with_interval(values, resamples=20_000).interval
    reach = 2.0930 * values.std(ddof=1) / np.sqrt(20)
    assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.06)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 5, 2.5706), (0.025, 30, -2.0423), (0.5, 3, 0.0)],
)
def test_students_quantiles_are_those_of_the_tables(probability, freedom, expected):
    found = student_quantile(probability, freedom)
    assert found == pytest.approx(expected, abs=2e-3)


def test_one_seed_gives_one_interval():
    values = np.random.default_rng(0).exponential(size=12)
    first, again, other = (mean_with_interval(values, seed=seed).interval for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("values", [np.array([0.5]), np.array([[0.5, 0.7]])])
def test_a_single_picture_has_no_interval(values):
    assert mean_with_interval(values).interval is None


def test_pairs_leave_out_oneself_and_ones_own_copies():
    values = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 5.0], [3.0, 5.0, 0.0]])
    draws = draw(["a"] * 3, resamples=200)
    sampled = sample_pairs(values, np.ones((3, 3)), draws)
    assert sampled.value == 3.0
    # Of three pictures, a resample has one to three different pairs: never a 0 from the diagonal.
    defined = sampled.resampled[~np.isnan(sampled.resampled)]
    assert defined.min() >= 1.0
    assert np.isnan(sampled.resampled).any()


def test_pairs_of_different_prompts_do_not_count():
    values = np.array([[0.0, 0.2, 9.0], [0.2, 0.0, 9.0], [9.0, 9.0, 0.0]])
    sampled = sample_pairs(values, np.ones((3, 3)), draw(["a", "a", "b"], resamples=50))
    assert sampled.value == pytest.approx(0.2)


def test_pairs_that_do_not_exist_have_no_mean():
    sampled = sample_pairs(np.zeros((2, 2)), np.ones((2, 2)), draw(["a", "b"], resamples=50))
    assert np.isnan(sampled.value)
    assert interval(sampled, 2, 0.95) is None


def test_the_mean_over_photo_pairs_ignores_the_diagonal():
    values = np.array([[np.nan, 0.5, 0.7], [0.5, np.nan, 0.6], [0.7, 0.6, np.nan]])
    draws = draw(["a", "b"], 3, resamples=100)
    assert sample_photo_pairs(values, draws).value == pytest.approx(0.6)
    assert np.isnan(sample_photo_pairs(np.ones((1, 1)), draw(["a"], 1, resamples=10)).value)


def test_lift_is_paired():
    dice = np.random.default_rng(0)
    by_prompt = np.repeat(dice.normal(0, 0.3, 10), 4)
    prompts = np.repeat(np.arange(10), 4).tolist()
    draws = draw(prompts, 6)
    floor = sample_mean(by_prompt[:, None] + np.zeros((40, 6)), draws)
    score = sample_mean(by_prompt[:, None] + np.full((40, 6), 0.5), draws)
    ceiling = sample_photo_pairs(np.full((6, 6), 2.0), draws)
    found = lift(score, floor, ceiling, draws.independent, 0.95)
    assert found.value == pytest.approx(0.5 / (2 - by_prompt.mean()))
    # Prompts differ by 0.3 and would hide the gain of 0.5 if they were not paired away.
    assert found.interval[1] - found.interval[0] < 0.15
    assert found.interval[0] < found.value < found.interval[1]


@pytest.mark.parametrize("top", [0.3, 0.25, 0.29])
def test_lift_needs_room_between_floor_and_ceiling(top):
    dice = np.random.default_rng(0)
    noisy = Sampled(0.3, 0.3 + dice.normal(0, 0.1, 500))
    found = lift(noisy, noisy, Sampled(top, np.full(500, top)), 8, 0.95)
    assert (found.value, found.interval) == (None, None)
    assert found.reason == "the ceiling does not lie clearly above the floor"


def test_lift_of_a_single_picture_is_absent():
    steady = Sampled(0.3, np.full(10, 0.3))
    found = lift(steady, steady, steady, 1, 0.95)
    assert found.reason == "there are too few pictures or photos to tell floor from ceiling"


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(0, 20, (0.0, 0.161)), (20, 20, (0.839, 1.0)), (5, 10, (0.237, 0.763))],
)
def test_rates_are_those_of_the_tables(successes, trials, expected):
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-3)


def test_a_rate_of_nothing_is_unknown():
    assert wilson_interval(0, 0) is None


@pytest.mark.parametrize("successes", [-1, 4])
def test_impossible_rates_are_refused(successes):
    with pytest.raises(ValueError, match=f"successes must be 0 to trials, got {successes} of 3"):
        wilson_interval(successes, 3)


def test_impossible_draws_are_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        draw([])
    with pytest.raises(ValueError, match=r"resamples must be 1 or more .* got 0 and 0\.95"):
        draw([1], resamples=0)
    with pytest.raises(ValueError, match=r"got 10 and 1\.0"):
        draw([1], resamples=10, confidence=1.0)


def test_the_mean_over_trainings_has_students_interval():
    # The tables: t is 4.303 for two degrees of freedom; the standard deviation here is 0.1.
    estimate = mean_over_runs([0.4, 0.6, 0.5])
    assert (estimate.value, estimate.n) == (pytest.approx(0.5), 3)
    reach = 4.3027 * 0.1 / 3**0.5
    assert estimate.interval == pytest.approx((0.5 - reach, 0.5 + reach), abs=1e-4)
    assert mean_over_runs([0.4]).interval is None
    with pytest.raises(ValueError, match="at least one"):
        mean_over_runs([])


def test_three_trainings_cover_the_truth_as_often_as_they_say():
    dice = np.random.default_rng(3)
    ends = [mean_over_runs(dice.normal(0, 1, 3).tolist()).interval for _ in range(2000)]
    assert 0.93 < np.mean([low <= 0 <= high for low, high in ends]) < 0.97
