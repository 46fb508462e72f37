"""Tests of chance agree with independent computations, and reject as seldom as they say."""

import doctest
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dreamloom.evaluation.stats import tests as significance
from dreamloom.evaluation.stats.tests import (
    MOST_EXACT,
    correct_by_holm,
    sign_flip_p,
    smallest_p,
    student_p,
    student_quantile,
)

differences = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=8)


def test_the_examples_run():
    assert doctest.testmod(significance).failed == 0


@pytest.mark.parametrize("size", [2, 5, 8, 10])
def test_sign_flips_agree_with_scipy(size: int):
    values = np.random.default_rng(size).normal(0.4, 1, size)
    found = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(values) == pytest.approx(found.pvalue, abs=1e-12)


@given(differences)
def test_sign_flips_agree_with_trying_each(values: list[float]):
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    expected = sum(total >= abs(sum(values)) - 1e-9 for total in sums) / len(sums)
    assert sign_flip_p(values) == pytest.approx(expected)


@given(differences, st.randoms(use_true_random=False), st.floats(0.1, 10))
def test_order_direction_and_scale_do_not_matter(values: list[float], luck, scale: float):
    p = sign_flip_p(values)
    shuffled = luck.sample(values, len(values))
    assert sign_flip_p(shuffled) == p
    assert sign_flip_p([-value for value in values]) == p
    assert sign_flip_p([scale * value for value in values]) == p


def test_many_differences_are_flipped_at_random():
    values = np.random.default_rng(1).normal(0.35, 1, MOST_EXACT + 4)
    found = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=200_000, rng=0
    )
    assert sign_flip_p(values) == pytest.approx(found.pvalue, abs=0.012)
    assert sign_flip_p(values) == sign_flip_p(values, seed=0) != sign_flip_p(values, seed=1)
    # Never 0, however clear it is.
    assert sign_flip_p(np.ones(40), flips=99) == 0.01 == smallest_p(40, flips=99)


@pytest.mark.parametrize("units", [1, 2, 6, MOST_EXACT])
def test_the_smallest_p_is_that_of_one_direction(units: int):
    assert sign_flip_p(np.arange(1.0, units + 1)) == smallest_p(units)


def test_no_difference_at_all_is_certain_to_be_matched():
    assert sign_flip_p([0.0] * 7) == 1.0
    assert sign_flip_p([0.3]) == 1.0


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [float("inf")]])
def test_what_is_no_difference_is_refused(values: list[float]):
    with pytest.raises(ValueError, match="at least one difference, and each must be a number"):
        sign_flip_p(values)


@pytest.mark.parametrize("size", [6, 12, 25])
def test_a_true_null_is_rejected_as_seldom_as_said(size: int):
    rng = np.random.default_rng(size)
    rejected = np.mean(
        [sign_flip_p(rng.standard_t(3, size), flips=499) <= 0.05 for _ in range(1500)]
    )
    assert rejected <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)


def test_holm_by_hand():
    # 4 × 0.01; 3 × 0.013 is less than that; 2 × 0.03; 0.04 is less than that.
    assert correct_by_holm([0.03, 0.01, 0.04, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert correct_by_holm([]) == []
    assert correct_by_holm([0.2]) == [0.2]
    assert correct_by_holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_holm_lies_between_no_correction_and_bonferroni(values: list[float], luck):
    corrected = correct_by_holm(values)
    for own, raised in zip(values, corrected, strict=True):
        assert own <= raised <= min(1.0, len(values) * own) + 1e-12
    order = luck.sample(range(len(values)), len(values))
    assert correct_by_holm([values[place] for place in order]) == [corrected[p] for p in order]


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 5, 7.31, 30, 400])
def test_students_distribution_agrees_with_scipy(freedom: float):
    for probability in (0.001, 0.025, 0.2, 0.5, 0.975):
        expected = stats.t.ppf(probability, freedom)
        assert student_quantile(probability, freedom) == pytest.approx(expected, rel=2e-3, abs=2e-3)
    for value in (-4.0, -0.3, 0.0, 2.2):
        expected = 2 * stats.t.sf(abs(value), freedom)
        assert student_p(value, 1.0, freedom) == pytest.approx(expected, abs=2e-4)


def test_students_p_is_that_of_scipys_test():
    values = np.random.default_rng(0).normal(0.4, 1, 9)
    expected = stats.ttest_1samp(values, 0).pvalue
    error = values.std(ddof=1) / 3
    assert student_p(values.mean(), error, 8) == pytest.approx(expected, abs=1e-5)
    assert student_p(0.0, 0.0, 3) == 1.0
    assert student_p(0.1, 0.0, 3) == 0.0
