"""Orders of classes by frequency; the published orders themselves are checked with the goldens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from datasets.class_order import class_map_for, legacy_order, stable_order
from datasets.source import DataError

# Pivots that split off next to nothing: NumPy 1.24 ends in heapsort here, whose order of ties is another one.
BAD_PIVOTS = [20, 0, 18, 0, 16, 0, 14, 0, 12, 0, 10, 0, 8, 0, 6, 0, 4, 0, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1]
BAD_PIVOTS += [0, 0, 0, 0, 0, 0, 0, 2, 0]


@pytest.mark.parametrize("order", [legacy_order, stable_order])
@given(counts=st.integers(0, 60).flatmap(lambda top: st.lists(st.integers(0, top), max_size=300)))
def test_an_order_is_a_permutation_by_descending_count(order, counts):
    ranked = order(counts)
    assert ranked.dtype == np.int64
    assert_array_equal(np.sort(ranked), np.arange(len(counts)))
    assert [counts[label] for label in ranked] == sorted(counts, reverse=True)


@given(st.lists(st.integers(0, 10**12), unique=True, max_size=300))
def test_without_ties_both_orders_agree(counts):
    assert_array_equal(legacy_order(counts), stable_order(counts))


@given(st.lists(st.integers(0, 5), max_size=300))
def test_the_stable_order_breaks_ties_by_index(counts):
    assert stable_order(counts).tolist() == sorted(range(len(counts)), key=lambda label: (-counts[label], label))


@given(st.lists(st.integers(0, 3), max_size=16))
def test_up_to_16_classes_the_legacy_order_is_stable(counts):
    assert_array_equal(legacy_order(counts), stable_order(counts))


def test_beyond_16_classes_the_legacy_order_moves_ties():
    assert legacy_order([7] * 17).tolist() != list(range(17))


def test_counts_that_drove_numpy_to_heapsort_are_refused():
    with pytest.raises(DataError, match=r"^class_map: .* heapsort; take stable$"):
        legacy_order(BAD_PIVOTS)


@pytest.mark.parametrize(("choice", "order"), [("stable", stable_order), ("legacy", legacy_order)])
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_a_map_gives_each_label_its_place_in_the_order(choice, order, counts):
    class_map = class_map_for(choice, np.array(counts))
    assert class_map.dtype == np.int64
    assert [class_map[label] for label in order(counts)] == list(range(len(counts)))


def test_a_map_may_be_given_in_numbers_or_in_a_file(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("\n 2\t0  1\n\n")
    for choice in ([2, 0, 1], np.array([2, 0, 1]), str(path)):
        class_map = class_map_for(choice, np.array([1, 2, 3]))
        assert class_map.dtype == np.int64
        assert class_map.tolist() == [2, 0, 1]


@pytest.mark.parametrize("numbers", [[], [0, 1, 1], [0, 1, 2, 3], [-1, 0, 1]])
def test_a_map_that_is_no_permutation_is_refused(tmp_path, numbers):
    path = tmp_path / "map.txt"
    path.write_text(" ".join(map(str, numbers)))
    for choice, name in ((numbers, "that of the checkpoint"), (str(path), path)):
        with pytest.raises(DataError) as error:
            class_map_for(choice, np.array([1, 2, 3]))
        assert str(error.value) == (
            f"class_map: {name} must hold each of 0 .. 2 once, one number per label; it holds {len(numbers)} numbers"
        )


@pytest.mark.parametrize("content", [b"0 1 two", b"0 1 2.0", b"0 1 99999999999999999999", b"\xff\xfe"])
def test_a_file_of_other_things_is_refused(tmp_path, content):
    path = tmp_path / "map.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        class_map_for(str(path), np.array([1, 2, 3]))
    assert str(error.value) == f"class_map: {path}: must hold whole numbers and nothing else"


def test_an_unknown_map_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "stabel"
    with pytest.raises(DataError) as error:
        class_map_for(str(path), np.array([1, 2, 3]))
    assert str(error.value) == (
        f"class_map: {path}: cannot be read (No such file or directory); known are stable, legacy, FILE"
    )
