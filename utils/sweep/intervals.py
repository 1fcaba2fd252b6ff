"""Means with 95 % intervals by Student's t, for a handful of seeds."""

import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95


class Estimate(NamedTuple):
    """The mean of n values and its interval."""

    mean: float
    deviation: float | None  # of the sample; None for one value
    count: int
    low: float | None  # of the mean's interval; None for one value
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Never for values that are all equal: a deviation of 0 measures nothing."""
        return bool(self.deviation) and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    """``mean +- t s / sqrt(n)``, t with n - 1 degrees of freedom, of one value or more."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, 1, None, None)
    deviation = statistics.stdev(values)
    half = _t(count) * deviation / count**0.5
    return Estimate(mean, deviation, count, mean - half, mean + half)


def prediction_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where one further value would lie: ``mean +- t s sqrt(1 + 1/n)``; None for one value."""
    if len(values) == 1:
        return None
    mean, half = statistics.fmean(values), _t(len(values)) * statistics.stdev(values) * (1 + 1 / len(values)) ** 0.5
    return mean - half, mean + half


@cache
def _t(count: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
