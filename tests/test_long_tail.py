"""Profiles of the long-tailed cut, the images that it keeps, and the hold-out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.long_tail import cut_counts, hold_out, long_tail_counts, long_tail_indices, positions_by_class
from datasets.source import DataError

CIFAR10_COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
TARGETS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [60, 20, 40, 0, 50]))
label_lists = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)


@pytest.mark.parametrize(
    ("images", "classes", "profile", "factor", "counts"),
    [
        (5000, 10, "exp", 0.01, CIFAR10_COUNTS),
        (5000, 10, "exp", 1.0, [5000] * 10),
        (5000, 10, "step", 0.01, [5000] * 5 + [50] * 5),
        (500, 3, "step", 0.1, [500, 50, 50]),
        (500, 1, "exp", 0.01, [500]),
        (500, 1, "step", 0.01, [5]),
        (10, 5, "exp", 0.01, [10, 3, 1, 0, 0]),
        (10, 4, "step", 0.01, [10, 10, 0, 0]),
        (100, 2, "exp", 0.29, [100, 28]),  # 100 * 0.29 is a hair below 29, and the reference truncates
    ],
)
def test_profile(images, classes, profile, factor, counts):
    ours = long_tail_counts(images, classes, profile, factor)
    assert ours == counts
    assert all(type(count) is int for count in ours)


@given(
    images=st.integers(0, 5000),
    classes=st.integers(1, 200),
    factor=st.floats(0.001, 1),
    profile=st.sampled_from(["exp", "step"]),
)
def test_profiles_never_rise_and_end_at_the_factor(images, classes, factor, profile):
    counts = long_tail_counts(images, classes, profile, factor)
    assert len(counts) == classes
    assert counts == sorted(counts, reverse=True)
    if classes > 1:
        assert (counts[0], counts[-1]) == (images, int(images * factor))


@given(targets=label_lists, counts=st.lists(st.integers(0, 30), min_size=5, max_size=5), seed=st.integers(0, 9))
def test_the_cut_keeps_that_many_images_of_each_class_class_by_class(targets, counts, seed):
    kept = long_tail_indices(targets, counts, seed)
    available = np.bincount(targets, minlength=5)
    assert kept.dtype == np.int64
    assert len(np.unique(kept)) == len(kept)
    np.testing.assert_array_equal(targets[kept], np.repeat(np.arange(5), np.minimum(counts, available)))


@given(targets=st.lists(st.integers(0, 4), max_size=80).map(lambda t: np.array(t, dtype=np.int64)))
def test_positions_by_class_ascend_and_cover_every_class(targets):
    for classes in (5, 7, 3):  # all; two more that have no image; labels beyond the classes asked for are left out
        positions = positions_by_class(targets, classes)
        assert len(positions) == classes
        for c, found in enumerate(positions):
            np.testing.assert_array_equal(found, np.flatnonzero(targets == c))


def test_a_harder_cut_keeps_a_part_of_what_a_milder_one_keeps():
    mild, hard = (set(long_tail_indices(TARGETS, counts).tolist()) for counts in ([30] * 5, [20, 10, 5, 0, 1]))
    assert hard < mild


def test_the_cut_depends_on_its_seed_alone():
    counts = [30, 10, 20, 0, 25]
    np.random.seed(1)
    first = long_tail_indices(TARGETS, counts)
    np.random.seed(2)
    np.testing.assert_array_equal(long_tail_indices(TARGETS, counts, seed=0), first)
    other = long_tail_indices(TARGETS, counts, seed=1)
    assert len(other) == len(first)
    assert set(other.tolist()) != set(first.tolist())


def test_cutting_and_holding_out_leave_the_global_generator_alone():
    before = np.random.get_state()
    long_tail_indices(TARGETS, [10] * 5, seed=3)
    hold_out(TARGETS[TARGETS != 3], 5, "abc", 3)
    after = np.random.get_state()
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2:] == after[2:]


@pytest.mark.parametrize(
    ("natural", "ranked", "counts"),
    [
        ([1000, 1000, 1000], False, [1000, 100, 10]),
        ([1000, 1000, 1000], True, [1000, 100, 10]),  # ties by index
        ([10, 1000, 500], False, [10, 100, 10]),  # a class that is smaller than its place keeps all it has
        ([10, 1000, 500], True, [10, 1000, 100]),
        ([5, 1000, 0], True, [5, 1000, 0]),
        ([0, 0, 1000], False, [0, 0, 10]),
    ],
)
def test_the_cut_of_unequal_classes(natural, ranked, counts):
    assert cut_counts(np.array(natural), "exp", 0.01, ranked) == counts


@given(
    natural=st.lists(st.integers(0, 3000), min_size=1, max_size=60).map(np.array),
    factor=st.floats(0.001, 1),
    profile=st.sampled_from(["exp", "step"]),
)
def test_a_ranked_cut_keeps_the_order_of_the_classes_and_no_more_than_there_is(natural, factor, profile):
    counts = np.array(cut_counts(natural, profile, factor, ranked=True))
    assert (counts <= natural).all()
    order = np.argsort(-natural, kind="stable")
    assert (np.diff(counts[order]) <= 0).all()
    np.testing.assert_array_equal(cut_counts(natural, profile, 1.0, ranked=True), natural)


@pytest.mark.parametrize(("ranked", "counts"), [(False, [500, 1000, 100, 100]), (True, [100, 1000, 1000, 100])])
def test_the_step_profile_is_laid_over_unequal_classes(ranked, counts):
    assert cut_counts(np.array([500, 1000, 1000, 300]), "step", 0.1, ranked) == counts


@given(targets=st.lists(st.integers(0, 2), max_size=60), per_class=st.integers(1, 6), seed=st.integers(0, 9))
def test_the_hold_out_is_disjoint_complete_and_balanced(targets, per_class, seed):
    targets = np.array([0, 1, 2] * (per_class + 1) + targets)
    remaining, held = hold_out(targets, per_class, "abc", seed)
    np.testing.assert_array_equal(np.bincount(targets[held], minlength=3), [per_class] * 3)
    np.testing.assert_array_equal(np.sort(np.concatenate([remaining, held])), np.arange(len(targets)))
    assert (np.diff(remaining) > 0).all() and (np.diff(held) > 0).all()
    np.testing.assert_array_equal(hold_out(targets, per_class, "abc", seed)[1], held)


@pytest.mark.parametrize(("images", "most"), [(20, 19), (12, 11), (1, 0)])
def test_a_class_too_small_for_the_hold_out_is_named_with_what_is_possible(images, most):
    targets = np.repeat([0, 1], [50, images])
    message = rf"^val_per_class: 20, but class 'rare fern' has only {images} training images; at most {most} can .*$"
    with pytest.raises(DataError, match=message):
        hold_out(targets, 20, ["moss", "rare fern"], 0)
    if most:
        assert len(hold_out(targets, most, ["moss", "rare fern"], 0)[1]) == 2 * most


def test_a_class_without_images_has_none_to_hold_out():
    targets = np.repeat([0, 2], [50, 30])
    remaining, held = hold_out(targets, 20, ["moss", "lost", "fern"], 0)
    assert np.bincount(targets[held]).tolist() == [20, 0, 20]
    assert len(remaining) == 40
