"""Student's t intervals: against scipy's own, against a table's values of t, and against what intervals promise.

And the smallest difference that some values can show: against published sample sizes, and by trying.
"""

import numpy as np
import pytest
from scipy import stats

from utils.sweep.intervals import detectable, estimate, prediction_interval

SAMPLES = [
    [70.1, 71.3],
    [83.3, 82.1, 84.0],
    [0.4, -0.2, 0.1, 0.7, 0.3],
    np.random.default_rng(0).normal(80, 2, 40).tolist(),
]
# Two-sided 95 %, as printed in tables of the t distribution: degrees of freedom -> t.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}


@pytest.mark.parametrize("sample", SAMPLES, ids=len)
def test_the_mean_s_interval_is_the_one_that_scipy_s_t_test_gives(sample):
    found, theirs = estimate(sample), stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert (found.mean, found.deviation) == pytest.approx((np.mean(sample), np.std(sample, ddof=1)), rel=1e-12)
    assert found.count == len(sample)
    found, theirs = estimate(sample, 0.9), stats.ttest_1samp(sample, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


@pytest.mark.parametrize("sample", SAMPLES, ids=len)
def test_excluding_zero_is_the_t_test_at_five_percent(sample):
    for shift in (0, 0.3, 0.6, 1.2, 80, -80):
        moved = [value - shift for value in sample]
        assert estimate(moved).excludes_zero == (stats.ttest_1samp(moved, 0).pvalue < 0.05)


@pytest.mark.parametrize("sample", SAMPLES, ids=len)
def test_the_prediction_interval_is_where_a_further_value_would_not_be_an_outlier(sample):
    """At its ends the two-sample t test of one value against the others, with their variance, has p = 0.05."""
    others = np.mean(sample), np.std(sample, ddof=1), len(sample)
    for end in prediction_interval(sample):
        assert stats.ttest_ind_from_stats(end, 0, 1, *others).pvalue == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize(("freedom", "t"), TABLE.items())
def test_half_widths_are_those_of_a_printed_table(freedom, t):
    count = freedom + 1
    sample = [10.0 + (-1) ** n for n in range(count)]
    deviation = np.std(sample, ddof=1)
    found, (low, high) = estimate(sample), prediction_interval(sample)
    assert (found.high - found.low) / 2 == pytest.approx(t * deviation / np.sqrt(count), rel=2e-4)
    assert (high - low) / 2 == pytest.approx(t * deviation * np.sqrt(1 + 1 / count), rel=2e-4)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_95_of_100_intervals_cover_what_they_are_of(count):
    draws = np.random.default_rng(count).normal(70, 3, (4000, count + 1))
    of_the_mean = of_the_next = 0
    for *sample, further in draws.tolist():
        found, (low, high) = estimate(sample), prediction_interval(sample)
        of_the_mean += found.low <= 70 <= found.high
        of_the_next += low <= further <= high
    for covered in (of_the_mean, of_the_next):
        assert covered / 4000 == pytest.approx(0.95, abs=0.014)  # four standard errors


def test_one_value_has_a_mean_and_nothing_else():
    assert estimate([83.3]) == (83.3, None, 1, None, None)
    assert not estimate([83.3]).excludes_zero
    assert prediction_interval([83.3]) is None


def test_without_deviation_an_interval_is_a_point():
    found = estimate([0.5, 0.5, 0.5])
    assert (found.deviation, found.low, found.high) == (0, 0.5, 0.5) and not found.excludes_zero
    assert not estimate([0.0, 0.0]).excludes_zero
    assert prediction_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("low", "high", "excludes"), [(0, 1, False), (-1, 0, False), (1e-9, 1, True), (-1, -1e-9, True)]
)
def test_an_end_at_zero_does_not_exclude_it(low, high, excludes):
    assert estimate([1.0, 2.0])._replace(low=low, high=high).excludes_zero is excludes


@pytest.mark.parametrize(("effect", "count"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_the_smallest_difference_needs_as_many_pairs_as_g_power_says(effect, count):
    """Two-sided paired t-test, level 0.05, power 0.8: Cohen's small, medium and large effect, in deviations."""
    assert detectable(1.0, count) <= effect < detectable(1.0, count - 1)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_smallest_difference_is_shown_by_80_of_100_samples(count):
    draws = np.random.default_rng(count).normal(detectable(3.0, count), 3, (20_000, count))
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.012)  # four s.e.
