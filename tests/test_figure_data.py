"""What figures draw, computed without matplotlib: against formulas and by hand."""

import numpy as np
import pytest

from utils.report import figure_data


def counts_of(classes):
    return np.round(1000 * 0.005 ** (np.arange(classes) / max(classes - 1, 1))).astype(int)


def simplex(classes):
    return np.eye(classes) - 1 / classes


def naive_similarity(weight):
    dots = weight @ weight.T
    np.fill_diagonal(dots, 0)
    return dots / dots.sum(axis=1, keepdims=True)


def test_classes_of_equal_counts_are_in_the_order_of_the_index():
    assert figure_data.by_frequency([5, 9, 5, 7]).tolist() == [1, 3, 0, 2]
    bins, size = figure_data.frequency_bins([5, 9, 5, 7])
    assert bins.tolist() == [2, 0, 3, 1] and size == 4


def test_count_bins_are_even_on_a_logarithmic_scale():
    counts = np.array([1, 3, 10, 50, 100])
    masks = figure_data.count_bins(counts, 2)
    assert [mask.tolist() for mask in masks] == [[True, True, False, False, False], [False, False, True, True, True]]
    assert sum(figure_data.count_bins(counts_of(100))).tolist() == [1] * 100


def test_confusion_by_hand():
    # Class 1 is the most frequent, then 2, then 0; class 0 has no test image.
    cells = figure_data.confusion_cells([1, 1, 2, 0, 2], [1, 1, 1, 1, 2], [5, 50, 20])
    assert cells[:2].tolist() == [[50, 25, 25], [0, 100, 0]]
    assert np.isnan(cells[2]).all()


@pytest.mark.parametrize(("classes", "cells"), [(200, 200), (201, 100), (8142, 100)])
def test_large_confusion_matrices_are_binned_by_rank(classes, cells):
    draw = np.random.default_rng(0)
    counts = counts_of(classes)[::-1]  # the last class is the most frequent
    targets = np.repeat(np.arange(classes), 3)
    guessed = np.where(draw.random(len(targets)) < 0.75, targets, draw.integers(0, classes, len(targets)))
    found = figure_data.confusion_cells(guessed, targets, counts)
    assert found.shape == (cells, cells)
    assert found.sum(axis=1) == pytest.approx(100)
    rank = np.empty(classes, int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(classes)
    inside = rank[targets] * cells // classes == 7
    for column in (3, 7):
        assert found[7, column] == pytest.approx(100 * (rank[guessed[inside]] * cells // classes == column).mean())


def test_a_simplex_is_the_ideal_everywhere():
    found = figure_data.row_similarity(simplex(7), counts_of(7))
    assert found.undefined == 0
    assert np.isnan(np.diag(found.cells)).all()
    assert found.cells[~np.eye(7, dtype=bool)] == pytest.approx(1)


def test_similarity_is_the_papers_formula_sorted_by_frequency():
    weight = np.random.default_rng(1).normal(size=(6, 4))
    weight -= weight.mean(axis=0)
    counts = np.array([5, 9, 1, 7, 3, 2])
    order = np.argsort(-counts)
    expected = 5 * naive_similarity(weight)[order][:, order]
    off = ~np.eye(6, dtype=bool)
    assert figure_data.row_similarity(weight, counts).cells[off] == pytest.approx(expected[off])


def test_rows_whose_dot_products_are_not_negative_are_undefined():
    weight = simplex(6)
    weight[0] = 0.5 * weight[1]  # its dot product with row 1 is positive and outweighs the others
    found = figure_data.row_similarity(weight, np.arange(6, 0, -1))
    assert found.undefined == 1
    assert np.isnan(found.cells).all(axis=1).tolist() == [True, False, False, False, False, False]


def test_with_many_classes_a_cell_is_the_mean_over_its_pairs():
    weight = np.random.default_rng(1).normal(size=(500, 8))
    weight -= weight.mean(axis=0)
    cells = figure_data.row_similarity(weight, np.arange(500, 0, -1)).cells
    each = 499 * naive_similarity(weight)
    assert cells.shape == (100, 100)
    assert cells[2, 30] == pytest.approx(each[10:15, 150:155].mean())
    block = each[10:15, 10:15][~np.eye(5, dtype=bool)]
    assert cells[2, 2] == pytest.approx(block.mean())


@pytest.mark.parametrize(("epochs", "window"), [(1, 1), (12, 1), (40, 3), (200, 11), (400, 21)])
def test_the_window_of_smoothing_is_odd_and_a_twentieth(epochs, window):
    assert figure_data.smoothing_window(epochs) == window


def test_smoothing_is_a_centred_mean():
    values = np.array([[1.0], [2.0], [6.0], [4.0]])
    assert figure_data.smoothed(values, 3).ravel().tolist() == [1.5, 3, 4, 5]
    assert figure_data.smoothed(values, 1).tolist() == values.tolist()
