"""Order of classes by frequency. List data sets number their classes from the most to the least frequent."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.source import DataError


def class_map_for(choice: str | Sequence[int], counts: np.ndarray) -> np.ndarray:
    """Label in the lists -> class, int64 [C]. ``counts`` [C]: training images per label.

    ``choice``: "stable" or "legacy" (see below), the path of a text file with C integers, or the integers themselves:
    number i is the class that label i trains as.
    """
    orders = {"stable": stable_order, "legacy": legacy_order}
    if isinstance(choice, str) and choice in orders:
        return np.argsort(orders[choice](counts))
    numbers, name = (_read_map(choice), choice) if isinstance(choice, str) else (choice, "that of the checkpoint")
    chosen = np.asarray(numbers).reshape(-1)
    if not np.array_equal(np.sort(chosen), np.arange(len(counts))):
        raise DataError(
            f"class_map: {name} must hold each of 0 .. {len(counts) - 1} once, one number per label; "
            f"it holds {len(chosen)} numbers"
        )
    return chosen.astype(np.int64)


def _read_map(path: str) -> np.ndarray:
    try:
        return np.array(Path(path).read_text(encoding="utf-8").split(), dtype=np.int64)
    except OSError as error:
        known = "known are stable, legacy, FILE"
        raise DataError(f"class_map: {path}: cannot be read ({error.strerror}); {known}") from None
    except (ValueError, OverflowError):
        raise DataError(f"class_map: {path}: must hold whole numbers and nothing else") from None


def stable_order(counts: Sequence[int]) -> np.ndarray:
    """Classes from the most to the least frequent, ties by index; int64 [C]."""
    return np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")


def legacy_order(counts: Sequence[int]) -> np.ndarray:
    """``np.argsort(-counts)`` as NumPy before 1.25 gave it, int64 [C]: the order of MiSLAS's published checkpoints.

    That sort was a quicksort: the pivot is the median of first, middle and last; the larger part is deferred; parts of
    at most 16 are sorted by insertion. The order of ties depends on these details, so they are repeated here. (NumPy's
    switch to heapsort after 2 log2 C levels does not occur with any published data set, and is refused.)
    """
    keys = [-int(count) for count in counts]
    order = list(range(len(keys)))
    stack = [(0, len(keys) - 1, 2 * max(len(keys).bit_length() - 1, 0))]
    while stack:
        low, high, depth = stack.pop()
        if depth < 0:
            raise DataError("class_map: the legacy order of these counts would need NumPy's heapsort; take stable")
        while high - low > 15:
            cut = _partition(keys, order, low, high)
            depth -= 1
            if cut - low < high - cut:
                stack.append((cut + 1, high, depth))
                high = cut - 1
            else:
                stack.append((low, cut - 1, depth))
                low = cut + 1
        _insertion_sort(keys, order, low, high)
    return np.array(order, dtype=np.int64)


def _partition(keys: list[int], order: list[int], low: int, high: int) -> int:
    """Split ``order[low..high]`` around its pivot; return the pivot's position."""

    def swap(a: int, b: int) -> None:
        order[a], order[b] = order[b], order[a]

    middle = low + (high - low) // 2
    for left, right in ((low, middle), (middle, high), (low, middle)):
        if keys[order[right]] < keys[order[left]]:
            swap(left, right)
    pivot = keys[order[middle]]
    swap(middle, high - 1)
    i, j = low, high - 1
    while True:
        i += 1
        while keys[order[i]] < pivot:
            i += 1
        j -= 1
        while pivot < keys[order[j]]:
            j -= 1
        if i >= j:
            swap(i, high - 1)
            return i
        swap(i, j)


def _insertion_sort(keys: list[int], order: list[int], low: int, high: int) -> None:
    for i in range(low + 1, high + 1):
        moved, j = order[i], i
        while j > low and keys[moved] < keys[order[j - 1]]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = moved
