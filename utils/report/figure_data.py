"""The numbers behind the figures, without matplotlib.

Legend: N test images, C classes, D features, E epochs, K cells. Classes are ordered by their number of training images,
the most frequent first (ties by index).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_CELLS, BINS = 200, 100  # classes up to which each has a cell of its own; cells beyond that
MIN_DENOMINATOR = 0.1  # in units of ||w_i||^2, see row_similarity


class Similarity(NamedTuple):
    """Similarity of classifier rows, relative to its ideal."""

    cells: NDArray  # [K, K], mean of (C - 1) M_ij over the pairs i != j of the cell; NaN where no pair is defined
    undefined: int  # rows whose denominator is positive or near 0


def by_frequency(class_counts: ArrayLike) -> NDArray:
    """Return the class indices [C], the most frequent class first."""
    return np.argsort(-np.asarray(class_counts), kind="stable")


def frequency_bins(class_counts: ArrayLike) -> tuple[NDArray, int]:
    """Return the cell of every class [C] in the order of frequency, and the number of cells K."""
    order = by_frequency(class_counts)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return (rank, len(order)) if len(order) <= MAX_CELLS else (rank * BINS // len(order), BINS)


def count_bins(counts: NDArray, bins: int = 14) -> list[NDArray]:
    """Return masks of classes with similar counts; the bins' edges are even on a logarithmic scale."""
    edges = np.geomspace(counts.min(), counts.max(), bins + 1)[1:-1]
    members = np.searchsorted(edges, counts, side="right")
    return [members == number for number in range(bins)]


def confusion_cells(classes: ArrayLike, targets: ArrayLike, class_counts: ArrayLike) -> NDArray:
    """Return the confusion matrix [K, K] in percent of each row's images; rows without images are NaN.

    ``classes`` (predicted) and ``targets`` (true): [N]. Rows and columns are :func:`frequency_bins`.
    """
    bins, size = frequency_bins(class_counts)
    pairs = bins[np.asarray(targets, np.int64)] * size + bins[np.asarray(classes, np.int64)]
    counted = np.bincount(pairs, minlength=size * size).reshape(size, size).astype(float)
    totals = counted.sum(axis=1, keepdims=True)
    return 100 * np.divide(counted, totals, out=np.full_like(counted, np.nan), where=totals > 0)


def row_similarity(weight: ArrayLike, class_counts: ArrayLike) -> Similarity:
    """Compute M_ij = w_i . w_j / sum_{k != i} w_i . w_k (the ARB-Loss paper's Fig. 4), times C - 1, in sorted cells.

    The definition assumes negative dot products. Rows whose sum of dot products exceeds -``MIN_DENOMINATOR``
    ||w_i||^2 are left out: their signs are flipped or their magnitude is arbitrary. (Rows that sum to 0, as softmax
    losses with weight decay produce, have the sum -||w_i||^2.) ``weight``: [C, D]. No [C, C] matrix is formed.
    """
    weight = np.asarray(weight, float)
    bins, size = frequency_bins(class_counts)
    squares = (weight**2).sum(axis=1)
    denominators = weight @ weight.sum(axis=0) - squares
    defined = (denominators < -MIN_DENOMINATOR * squares) & (squares > 0)
    scale = np.where(defined, 1 / np.where(defined, denominators, 1), 0)
    members = np.equal.outer(np.arange(size), bins).astype(float)  # [K, C], 1 where the class lies in the cell
    sums = ((members * scale) @ weight) @ (members @ weight).T - np.diag(members @ (squares * scale))
    own, others = members @ defined, members.sum(axis=1)
    pairs = np.outer(own, others) - np.diag(own)
    cells = np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)
    return Similarity(cells * (len(bins) - 1), int((~defined).sum()))


def smoothing_window(epochs: int) -> int:
    """Return the window over which component curves are averaged: odd, about a twentieth of the epochs."""
    return 1 + 2 * round(epochs / 40)


def smoothed(values: NDArray, window: int) -> NDArray:
    """Return centred means of [E, ...] over ``window`` epochs; windows are cut off at both ends."""
    half = window // 2
    return np.stack([values[max(0, e - half) : e + half + 1].mean(axis=0) for e in range(len(values))])
