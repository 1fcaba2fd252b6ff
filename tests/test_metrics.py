"""Accuracy, groups, calibration and the report, against plain loops and numbers worked by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import InputError
from utils.metrics import (
    Predictions,
    calibration_error,
    class_accuracy,
    cross_fitted,
    group_calibration,
    group_sizes,
    groups_by_count,
    groups_by_index,
    half_accuracies,
    halves,
    report,
    shot_accuracy,
    shot_groups,
)

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
COUNTS = torch.tensor([500, 101, 100, 20, 19, 0])


def lists(masks):
    """name -> indices, easier to read than masks."""
    return {name: m.nonzero().flatten().tolist() for name, m in masks.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def test_groups_split_at_20_and_100_or_at_half_open_ranges_that_may_leave_classes_out():
    assert lists(groups_by_count(COUNTS)) == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}
    groups = groups_by_index([[0, 2], [2, 3], [4, 6]], 6)
    assert lists(groups) == {"many": [0, 1], "medium": [2], "few": [4, 5]}


@pytest.mark.parametrize(
    ("rule", "ranges", "rules"),
    [
        (None, None, ["count"]),
        (None, [[0, 2], [2, 4], [4, 6]], ["index", "count"]),
        ("index", [[0, 2], [2, 4], [4, 6]], ["index", "count"]),
        ("count", [[0, 2], [2, 4], [4, 6]], ["count", "index"]),
    ],
)
def test_the_headline_rule_comes_first(rule, ranges, rules):
    groups = shot_groups(rule, ranges, COUNTS)
    assert list(groups) == rules
    assert lists(groups["count"]) == lists(groups_by_count(COUNTS))
    if ranges:
        assert lists(groups["index"]) == lists(groups_by_index(ranges, 6))


@pytest.mark.parametrize(
    ("rule", "ranges", "fragment"),
    [("index", None, "head_class_idx"), (None, [[0, 3], [3, 7], [7, 10]], "reach to 10, but there are 6 classes")],
)
def test_ranges_that_are_missing_or_too_long_are_refused(rule, ranges, fragment):
    with pytest.raises(InputError, match=fragment):
        shot_groups(rule, ranges, COUNTS)


def test_group_sizes_are_counted_by_every_rule():
    sizes = group_sizes(shot_groups(None, [[0, 1], [1, 2], [2, 6]], COUNTS))
    assert sizes["index"] == {"many": 1, "medium": 1, "few": 4}
    assert sizes["count"] == {"many": 2, "medium": 2, "few": 2}


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


def test_class_accuracy_is_the_share_of_hits_and_nan_where_nothing_was_tested():
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    classes = torch.tensor([0, 0, 0, 3, 0, 1, 2])
    accuracy, totals = class_accuracy(classes, targets, 5)
    assert totals.tolist() == [4, 2, 0, 1, 0]
    np.testing.assert_array_equal(accuracy.numpy(), [0.75, 0.5, np.nan, 0.0, np.nan])
    assert accuracy.dtype == torch.float64


def test_group_accuracy_is_the_mean_over_tested_classes_and_empty_groups_are_absent():
    groups = groups_by_index([[0, 2], [2, 2], [2, 4]], 4)
    accuracy = torch.tensor([1.0, 0.5, 0.25, 0.0])
    assert shot_accuracy(accuracy, torch.tensor([1, 999, 7, 7]), groups) == {"many": 0.75, "few": 0.125}
    accuracy = torch.tensor([80.0, math.nan, math.nan, math.nan])
    assert shot_accuracy(accuracy, torch.tensor([10, 0, 0, 0]), groups) == {"many": 80.0}


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def calibration_by_loops(confidences, predictions, targets, num_bins):
    """Guo et al.'s definition over bins (low, high], one sample after the other; 0 belongs to the first bin."""
    bins = [[] for _ in range(num_bins)]
    for confidence, prediction, target in zip(confidences, predictions, targets, strict=True):
        for position in range(num_bins):
            low, high = position / num_bins, (position + 1) / num_bins
            if low < confidence <= high or (confidence == 0 and position == 0):
                bins[position].append((prediction == target, confidence))
    gaps, accuracies, means = [], [], []
    for content in bins:
        accuracies.append(sum(hit for hit, _ in content) / len(content) if content else 0.0)
        means.append(sum(confidence for _, confidence in content) / len(content) if content else 0.0)
        gaps.append(abs(accuracies[-1] - means[-1]))
    counts = [len(content) for content in bins]
    assert sum(counts) == len(targets)
    ece = sum(gap * count for gap, count in zip(gaps, counts, strict=True)) / len(targets)
    return ece, max(gaps), accuracies, means, counts


SAMPLES = st.lists(st.tuples(st.integers(0, 1024), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@PROPERTY
@given(samples=SAMPLES, num_bins=st.sampled_from([1, 2, 4, 10, 15, 16]), double=st.booleans())
def test_calibration_agrees_with_a_plain_loop(samples, num_bins, double):
    steps, predictions, targets = zip(*samples, strict=True)
    # 1/1024 steps are exact numbers, and meet the edges of 2, 4 and 16 bins exactly.
    confidences = torch.tensor([step / 1024 for step in steps], dtype=torch.float64 if double else torch.float32)
    result = calibration_error(confidences, torch.tensor(predictions), torch.tensor(targets), num_bins)
    ece, mce, accuracies, means, counts = calibration_by_loops(confidences.tolist(), predictions, targets, num_bins)
    assert result["ece"] == pytest.approx(ece, abs=1e-12)
    assert result["mce"] == pytest.approx(mce, abs=1e-12)
    np.testing.assert_allclose(result["bin_accuracy"], accuracies, atol=1e-12)
    np.testing.assert_allclose(result["bin_confidence"], means, atol=1e-12)
    assert result["bin_count"].tolist() == counts


@pytest.mark.parametrize(
    ("confidence", "position"),
    [(0.0, 0), (0.25, 0), (0.2500001, 1), (0.75, 2), (1.0, 3), (1.0000001, 3)],
)
def test_bins_are_open_below_and_closed_above_and_take_0_and_1(confidence, position):
    one = torch.tensor([confidence])
    counts = calibration_error(one, torch.tensor([1]), torch.tensor([1]), num_bins=4)["bin_count"].tolist()
    assert counts == [int(i == position) for i in range(4)]


@PROPERTY
@given(samples=SAMPLES)
def test_group_calibration_uses_samples_with_the_groups_labels(samples):
    steps, classes, targets = zip(*samples, strict=True)
    predictions = predictions_of(classes, targets, [step / 1024 for step in steps])
    groups = {"index": groups_by_index([[0, 1], [1, 3], [4, 5]], 5), "count": groups_by_index([[0, 4]] * 3, 5)}
    result = group_calibration(predictions.confidences, predictions.classes, predictions.targets, groups)
    expected = {}
    for name, labels in (("many", [0]), ("medium", [1, 2]), ("few", [4])):
        rows = zip(predictions.confidences.tolist(), classes, targets, strict=True)
        members = [row for row in rows if row[2] in labels]
        if members:
            expected[name] = pytest.approx(100 * calibration_by_loops(*zip(*members, strict=True), 15)[0], abs=1e-9)
    assert result["index"] == expected
    whole = 100 * calibration_error(predictions.confidences, predictions.classes, predictions.targets)["ece"]
    assert result["count"] == dict.fromkeys(("many", "medium", "few"), whole)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def predictions_of(classes, targets, confidences=None, top5_hits=None, nll=None):
    size = len(targets)
    return Predictions(
        classes=torch.tensor(classes),
        confidences=torch.tensor(confidences or [0.5] * size),
        top5_hits=torch.tensor(top5_hits or [True] * size),
        nll=torch.tensor(nll or [1.0] * size),
        targets=torch.tensor(targets),
    )


def finite(value):
    """Whether no number in nested dicts is NaN or infinite."""
    return all(map(finite, value.values())) if isinstance(value, dict) else math.isfinite(value)


def test_a_report_of_an_uneven_test_set_worked_by_hand():
    # Class 0: 6 of 8 right; class 1: 1 of 2; class 2: 0 of 2; class 3 is untested.
    predictions = predictions_of(
        classes=[0] * 6 + [1, 2] + [1, 0] + [0, 0],
        targets=[0] * 8 + [1] * 2 + [2] * 2,
        confidences=[1.0] * 12,
        top5_hits=[True] * 9 + [False] * 3,
        nll=[0.5] * 6 + [2.0] * 6,
    )
    counts = torch.tensor([500, 50, 5, 3])
    groups = shot_groups(None, [[0, 2], [2, 3], [3, 4]], counts)
    result = report(predictions, counts, groups)
    assert result == {
        "top1": pytest.approx(700 / 12),
        "top5": 75.0,
        "many": 62.5,
        "medium": 0.0,
        "macro": pytest.approx(125 / 3),
        "worst_class": 2,
        "worst_class_top1": 0.0,
        "nll": 1.25,
        "ece": pytest.approx(500 / 12),
        "mce": pytest.approx(500 / 12),
        "ece_groups": {
            "index": {"many": pytest.approx(30.0), "medium": 100.0},
            "count": {"many": 25.0, "medium": 50.0, "few": 100.0},
        },
        "samples": 12,
        "shots": {"index": {"many": 62.5, "medium": 0.0}, "count": {"many": 75.0, "medium": 50.0, "few": 0.0}},
        "group_sizes": group_sizes(groups),
    }
    assert list(result)[2] == "many"


@PROPERTY
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_a_report_agrees_with_a_plain_loop(pairs):
    classes, targets = zip(*pairs, strict=True)
    counts = torch.tensor([200, 150, 50, 10, 0])
    result = report(predictions_of(classes, targets), counts, shot_groups(None, None, counts))
    shares = {}
    for label in sorted(set(targets)):
        of_class = [c for c, t in pairs if t == label]
        shares[label] = 100 * of_class.count(label) / len(of_class)
    assert result["top1"] == pytest.approx(100 * sum(c == t for c, t in pairs) / len(pairs))
    assert result["macro"] == pytest.approx(sum(shares.values()) / len(shares))
    assert result["worst_class"] == min(shares, key=shares.get)
    for name, members in {"many": [0, 1], "medium": [2], "few": [3, 4]}.items():
        tested = [shares[label] for label in members if label in shares]
        assert result.get(name) == (pytest.approx(sum(tested) / len(tested)) if tested else None)
    assert finite(json.loads(json.dumps(result, allow_nan=False)))


# ---------------------------------------------------------------------------------------------------------------------
# Choosing an epoch


def test_halves_alternate_within_each_class():
    targets = torch.tensor([1, 0, 0, 1, 1, 0, 3, 0])
    assert halves(targets).tolist() == [False, False, True, True, False, False, False, True]


def test_half_accuracies():
    """Halves by position: 0 1 0 1 | 0 1 0 1 (class 0, then class 1). An empty half has all samples' accuracy."""
    predictions = predictions_of([0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1])
    assert half_accuracies(predictions) == [75.0, 25.0]
    assert half_accuracies(predictions_of([0, 0, 2, 0], [0, 1, 2, 3])) == [50.0, 50.0]


@pytest.mark.parametrize(
    ("curves", "score", "chosen"),
    [
        ([[50, 40]], 45, [0, 0]),
        ([[50, 40], [60, 30], [10, 70]], (30 + 10) / 2, [1, 2]),
        ([[50, 10], [50, 40], [20, 40]], (10 + 50) / 2, [0, 1]),  # ties: the earliest
        ([[1, 1], [3, 2], [2, 3], [3, 3]], (2 + 2) / 2, [1, 2]),
    ],
)
def test_cross_fitting_scores_each_choice_on_the_other_half(curves, score, chosen):
    assert cross_fitted(curves) == (score, chosen)


def test_a_selection_keeps_all_fields_together():
    predictions = predictions_of([0, 1, 2], [2, 1, 0], [0.1, 0.2, 0.3], [True, False, True], [3.0, 2.0, 1.0])
    chosen = predictions.select(torch.tensor([True, False, True]))
    expected = [[0, 2], pytest.approx([0.1, 0.3]), [True, True], [3.0, 1.0], [2, 0]]
    assert [field.tolist() for field in chosen] == expected
