"""Means with intervals by Student's t, for a handful of seeds, and what so few of them can show."""

import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from scipy import optimize, stats

LEVEL = 0.95  # of intervals; a t-test's level is 1 - LEVEL, two-sided
EQUIVALENCE_LEVEL = 0.9  # inside a margin: two one-sided t-tests at level 0.05 (Schuirmann, 1987)
POWER = 0.8


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


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """``mean +- t s / sqrt(n)``, t with n - 1 degrees of freedom, of one value or more."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, 1, None, None)
    deviation = statistics.stdev(values)
    half = _t(count, level) * deviation / count**0.5
    return Estimate(mean, deviation, count, mean - half, mean + half)


def prediction_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where one further value would lie: ``mean +- t s sqrt(1 + 1/n)``; None for one value."""
    if len(values) == 1:
        return None
    mean, half = statistics.fmean(values), _t(len(values)) * statistics.stdev(values) * (1 + 1 / len(values)) ** 0.5
    return mean - half, mean + half


def detectable(deviation: float, count: int) -> float:
    """The true mean that a t-test of ``count`` values (two or more) tells from 0 with probability ``POWER``.

    ``deviation``: of single values. For differences of pairs: the smallest difference that so many pairs can show.
    """
    return _noncentrality(count) * deviation / count**0.5


@cache
def _noncentrality(count: int) -> float:
    """Where the noncentral t distribution has a share of ``POWER`` above ``t``; below ``-t`` it has less than 1e-5."""
    t = _t(count)
    return optimize.brentq(lambda shift: stats.nct.sf(t, count - 1, shift) - POWER, 0, 3 * t)


@cache
def _t(count: int, level: float = LEVEL) -> float:
    return float(stats.t.ppf((1 + level) / 2, count - 1))
