"""Numbers of a sweep's results: values, paired differences, waterfalls.

``results`` is the content of ``results.json`` (see :func:`utils.sweep.results.results_of`). Accuracies are in percent,
differences in points.

Arms are compared by their paired differences: over the seeds (and subset seeds) that both have, on the same images.
Runs of older versions do not record their images; they have means, and are compared with nothing. Where there are
several subset seeds, the runs of one cut are not independent, so intervals are over the cuts' means. Intervals are per
comparison, and not widened for their number.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from utils.sweep.intervals import Estimate, estimate

MEASURES = {
    **{"last": "last epoch", "cross_fitted": "cross-fitted", "best": "best on the test set", "val": "held-out"},
    "ema": "averaged weights",
}

Row = Mapping[str, Any]
Results = Mapping[str, Any]
Seeds = tuple[int, int]  # seed, subset seed


class Bar(NamedTuple):
    """One step of a waterfall."""

    name: str
    change: Estimate


class Waterfall(NamedTuple):
    """From one arm's accuracy to the best arm's, on the seeds that all steps have."""

    start: Bar
    steps: list[Bar]  # the last one is the remainder
    end: Bar
    tried: int  # arms that the best one is the best of
    missing: list[str]  # steps with no runs, or too few

    def bars(self) -> list[Bar]:
        return [self.start, *self.steps, self.end]


def cells(results: Results) -> list[dict]:
    """The points of the grid that have runs, in the order of the axes' values; a single empty one without axes."""
    points = [dict(zip(results["axes"], point, strict=True)) for point in itertools.product(*results["axes"].values())]
    return [point for point in points if any(row["axes"] == point for row in results["runs"])]


def values(results: Results, arm: str, cell: Mapping, measure: str = "last", key: str = "top1") -> dict[Seeds, float]:
    """Seeds -> top-1 (or another ``key``) in percent, of an arm's runs at a point of the grid."""
    rows = [row for row in results["runs"] if row["arm"] == arm and row["axes"] == cell]
    return {_seeds(row): row[measure][key] for row in rows if key in row.get(measure, {})}


def contrast(
    results: Results, terms: Mapping[str, float], cell: Mapping, seeds: Iterable[Seeds] | None = None
) -> dict[Seeds, float]:
    """Seeds -> ``sum of weight * top-1`` over the terms, by default for the seeds that all terms share.

    A term is an arm, or ``arm.best`` and the like for another measure than the last epoch's.
    """
    parts = {term: values(results, arm_of(term), cell, measure_of(term)) for term in terms}
    if seeds is None:
        seeds = common_seeds(results, terms, cell)
    return {key: sum(weight * parts[term][key] for term, weight in terms.items()) for key in seeds}


def common_seeds(results: Results, terms: Iterable[str], cell: Mapping) -> list[Seeds]:
    """Seeds for which every term has a run, all on the same images."""
    terms = list(terms)
    shared = set.intersection(*(set(values(results, arm_of(term), cell, measure_of(term))) for term in terms))
    images: dict[Seeds, set[str]] = {key: set() for key in shared}
    for row in results["runs"]:
        if row["arm"] in map(arm_of, terms) and row["axes"] == cell and _seeds(row) in shared:
            images[_seeds(row)].add(row["data"])
    return sorted(key for key, found in images.items() if len(found) == 1 and "" not in found)


def independent(by_seeds: Mapping[Seeds, float]) -> list[float]:
    """The values that an interval is over: the runs of one cut, or the means of several cuts."""
    cuts: dict[int, list[float]] = {}
    for (_, cut), value in by_seeds.items():
        cuts.setdefault(cut, []).append(value)
    return list(by_seeds.values()) if len(cuts) == 1 else [_mean(found) for found in cuts.values()]


def estimated(results: Results, terms: Mapping[str, float], cell: Mapping, seeds: Iterable[Seeds] | None = None):
    """The :class:`Estimate` of a :func:`contrast`; None without common seeds."""
    found = contrast(results, terms, cell, seeds)
    return estimate(independent(found)) if found else None


def arm_of(term: str) -> str:
    return term.partition(".")[0]


def measure_of(term: str) -> str:
    _, dot, measure = term.partition(".")
    return measure if dot else "last"


def pairs(results: Results) -> list[tuple[str, str]]:
    """Every arm with the sweep's ``against``, if any, then the pairs that it asks for."""
    against = results["against"]
    usual = [(arm, against) for arm in results["arms"] if arm != against] if against else []
    return list(dict.fromkeys([*usual, *map(tuple, results["pairs"])]))


def waterfall(results: Results, cell: Mapping) -> Waterfall | None:
    """The steps of the sweep's ``waterfall``, over the seeds that all of them have; None if none was run.

    A step that would leave fewer than two seeds of several is missing. The end is the arm with the highest mean at the
    last epoch, of all arms that have these seeds, measured as ``end`` says; the remainder is what the steps, added up,
    leave of the way to it.
    """
    plan, end = results["waterfall"], f".{results['waterfall']['end']}"
    start = {plan["start"]: 1.0}
    terms, have = {*start, plan["start"] + end}, {}
    seeds = common_seeds(results, terms, cell)
    for name, step in plan["steps"].items():
        left = common_seeds(results, [*terms, *step], cell)
        if len(left) >= max(1, min(2, len(seeds))):
            terms, seeds, have[name] = {*terms, *step}, left, step
    if not have:
        return None
    tried = [a for a in results["arms"] if set(seeds) <= set(common_seeds(results, [*terms, a, a + end], cell))]
    best = max(tried, key=lambda arm: _mean(contrast(results, {arm: 1.0}, cell, seeds).values()))
    rest = {best + end: 1.0}
    for step in (start, *have.values()):
        for term, weight in step.items():
            rest[term] = rest.get(term, 0.0) - weight

    def bar(name: str, terms: Mapping[str, float]) -> Bar:
        return Bar(name, estimated(results, terms, cell, seeds))

    steps = [*(bar(name, step) for name, step in have.items()), bar("remainder", rest)]
    final = bar(f"{best}, {MEASURES[plan['end']]}", {best + end: 1.0})
    missing = [name for name in plan["steps"] if name not in have]
    return Waterfall(bar(plan["start"], start), steps, final, len(tried), missing)


def _seeds(row: Row) -> Seeds:
    return row["seed"], row["subset_seed"]


def _mean(numbers: Collection[float]) -> float:
    return sum(numbers) / len(numbers)
