"""Sentences about runs that follow from their numbers, held against the statements of the ARB-Loss paper."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.compare.read import Runs, confounders, loss_pairs
from utils.report.figure_data import row_similarity

# Balance metrics that do not depend on the scale of the rows; the others repeat these.
SCALE_FREE = ("b_a", "b_d_relative", "b_l_relative")
QUARTER = 4  # numbers on components are means over the last quarter of the epochs
NO_PAIR = "without a cross-entropy run and an ARB-Loss run on the same data, nothing is said of the paper"


def agreement(held: int, of: int) -> str:
    """Return the predicate for ``held`` of ``of`` statements of the paper."""
    if held == of:
        return "agrees with"
    return "does not agree with" if held == 0 else f"agrees in part ({held} of {of}) with"


def confounded(runs: Runs, plain: str, arb: str) -> list[str]:
    """Return a clause if the two runs differ in more than the loss."""
    others = confounders(runs[arb], runs[plain])
    return [f"the two runs also differ in {', '.join(others)}, so the loss alone does not explain it"] if others else []


def similarity_sentence(runs: Runs, balance: Mapping[str, Mapping[str, float]]) -> str:
    """Describe Fig. 4: whose balance metrics are smaller, and how far M is from its ideal.

    ``balance``: :func:`methods.neural_collapse.balance_metrics` by label.
    """
    spread, complete, ranges = {}, set(), []
    for label, run in runs.items():
        similarity = row_similarity(run.weight, run.class_counts)
        cells = similarity.cells[~np.isnan(similarity.cells)]
        if len(cells):
            low, high = np.percentile(cells, [5, 95])
            spread[label] = high - low
            ranges.append(f"90 % of the cells of {label} lie between {low:.2f} and {high:.2f} times the ideal")
            complete |= set() if similarity.undefined else {label}
        if similarity.undefined:
            rows = f"{similarity.undefined:,} of the {len(run.class_counts):,} rows of {label}"
            ranges.append(f"M is undefined for {rows}, whose dot products do not have a clearly negative sum")
    pairs, clauses = loss_pairs(runs), []
    for plain, arb in pairs:
        clauses.append(_balance_clause(plain, balance[plain], arb, balance[arb]))
        if {plain, arb} <= complete and not math.isclose(spread[arb], spread[plain], rel_tol=1e-3):
            closer = arb if spread[arb] < spread[plain] else plain
            clauses.append(f"in the figure, the cells of {closer} lie closer together")
        clauses += confounded(runs, plain, arb)
    sentence = "; ".join([*clauses, *ranges, *([] if pairs else [NO_PAIR])]) + "."
    return sentence[0].upper() + sentence[1:]


def _balance_clause(plain: str, before: Mapping[str, float], arb: str, after: Mapping[str, float]) -> str:
    if all(after[key] == before[key] for key in SCALE_FREE):
        return f"the balance metrics of {arb} and {plain} are equal"
    smaller = sum(after[key] < before[key] for key in SCALE_FREE)
    return (
        f"under ARB-Loss ({arb}) {smaller} of the {len(SCALE_FREE)} scale-invariant balance metrics (B_A and the "
        f"relative B_D and B_L) are smaller than under cross-entropy ({plain}), which "
        f"{agreement(smaller, len(SCALE_FREE))} the paper's claim that ARB-Loss balances the rows"
    )


class RowNumbers(NamedTuple):
    """Gradient components on one classifier row, means over the last quarter of the epochs."""

    attraction: float  # norm
    repulsion: float  # sum of norms
    ratio: float  # largest over smallest repulsion component; infinite if the smallest is 0
    frequent: float  # share of the more frequent half of the other classes in it; a class in the middle is left out
    attraction_mass: float
    repulsion_mass: float
    cosine: float = math.nan  # mean between the repulsion of two classes


def row_numbers(diagnostics: Mapping[str, NDArray], row: int) -> RowNumbers:
    """Summarise ``diagnostics`` (the arrays of diagnostics.npz) for ``row``, one of its "rows"."""
    late = slice(-math.ceil(len(diagnostics["epochs"]) / QUARTER), None)
    place = diagnostics["rows"].tolist().index(row)
    norms = diagnostics["row_norms"][late, place].astype(float).mean(axis=0)  # [C]
    order = np.argsort(-diagnostics["class_counts"], kind="stable")
    others = norms[order[order != row]]  # [C - 1], the most frequent class first
    half = len(others) // 2
    frequent, rare, least = others[:half].sum(), others[len(others) - half :].sum(), others.min()
    return RowNumbers(
        float(norms[row]),
        float(others.sum()),
        float(others.max() / least) if least > 0 else math.inf,
        float(frequent / (frequent + rare)) if frequent + rare > 0 else math.nan,
        *(
            float(diagnostics[key][late, row].astype(float).mean())
            for key in ("attraction_mass", "repulsion_mass", "repulsion_cosine")
        ),
    )


def components_sentence(runs: Runs, rows: Mapping[str, int], numbers: Mapping[str, RowNumbers]) -> str:
    """Describe Fig. 5 in the last quarter of the epochs, and which of the paper's statements it supports.

    ``rows``: the row that is shown, by label; ``numbers``: :func:`row_numbers` of these.
    """
    pairs = [(plain, arb) for plain, arb in loss_pairs(runs) if rows[plain] == rows[arb]]
    clauses = []
    for plain, arb in pairs:
        clauses += [*claims(plain, numbers[plain], arb, numbers[arb]), *confounded(runs, plain, arb)]
    for label, now in numbers.items():
        if label not in {name for pair in pairs for name in pair}:
            clauses.append(f"in {label} the repulsion norms add up to {_repulsion(now)} the attraction")
    return "In the last quarter of the epochs: " + "; ".join([*clauses, *([] if pairs else [NO_PAIR])]) + "."


def claims(plain: str, before: RowNumbers, arb: str, after: RowNumbers) -> list[str]:
    """Hold the paper's three statements on a rare row against the numbers of cross-entropy and of ARB-Loss."""
    balanced = _imbalance(after) < _imbalance(before)
    held, clauses = [balanced], []
    if math.isfinite(before.frequent):  # with two classes, a row has one repulsion component only
        dominated, even = before.frequent > 0.5, after.ratio < before.ratio
        held += [dominated, even]
        clauses = [
            f"under cross-entropy ({plain}) {100 * before.frequent:.1f} % of the repulsion comes from the more "
            f"frequent half of the other classes, which is {'' if dominated else 'not '}the larger part",
            f"under ARB-Loss ({arb}) the largest repulsion is {_times(after.ratio)} the smallest, compared with "
            f"{_times(before.ratio)}, so the components are {'' if even else 'not '}more even",
        ]
    return [
        *clauses,
        f"the repulsion norms add up to {_repulsion(after)} the attraction, compared with {_repulsion(before)}, so the "
        f"two are {'' if balanced else 'not '}closer to each other",
        f"this {agreement(sum(held), len(held))} the paper's claim that frequent classes dominate a rare row under "
        "cross-entropy and ARB-Loss balances attraction and repulsion",
    ]


def _times(value: float) -> str:
    return f"{value:.3g} times" if math.isfinite(value) else "infinitely many times"


def _repulsion(numbers: RowNumbers) -> str:
    return _times(numbers.repulsion / numbers.attraction if numbers.attraction > 0 else math.inf)


def _imbalance(numbers: RowNumbers) -> float:
    """Log ratio of summed repulsion and attraction; infinite if one is 0."""
    if numbers.repulsion <= 0 or numbers.attraction <= 0:
        return math.inf
    return abs(math.log(numbers.repulsion / numbers.attraction))
