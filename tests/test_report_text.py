"""Text tables and files of an evaluation."""

import csv
import json

import numpy as np
import pytest
import torch

from utils.metrics import Predictions, report, shot_groups
from utils.report.text import (
    NPZ_LIMIT,
    calibration_line,
    class_table,
    details,
    group_line,
    mislas_lines,
    percent,
    save_predictions,
    table,
    write_report,
)

METRICS = {"top1": 85.25, "top5": 99.5, "many": 95.0, "medium": 86.0, "few": 74.0, "ece": 3.21}
COUNTS = torch.tensor([120, 30, 0])
NAMES = ["cat, wild", "Hündin", "yak"]
PREDICTIONS = Predictions(
    classes=torch.tensor([0, 1, 0, 1, 0]),
    confidences=torch.tensor([0.5, 0.75, 1.0, 0.25, 0.125]),
    top5_hits=torch.tensor([True, True, True, False, True]),
    nll=torch.ones(5),
    targets=torch.tensor([0, 0, 0, 1, 1]),
)


def test_mislas_lines():
    assert mislas_lines(METRICS) == (
        "* Acc@1 85.250% Acc@5 99.500% HAcc 95.000% MAcc 86.000% TAcc 74.000%.",
        "* ECE   3.210%.",
    )


def test_an_empty_group_is_a_dash():
    some = {key: value for key, value in METRICS.items() if key not in ("many", "few")}
    assert mislas_lines(some)[0] == "* Acc@1 85.250% Acc@5 99.500% HAcc - MAcc 86.000% TAcc -."
    assert table({"x": some}).splitlines()[1] == "x    85.25        -    86.00        -     3.21"


def test_percent_of_zero_and_of_none():
    assert [percent(v) for v in (0.0, 12.345678, None)] == ["0.00", "12.35", "-"]
    assert percent(1.23456, 3) == "1.235"


def test_table_columns_are_aligned():
    text = table({"last epoch": METRICS, "best": {"top1": 100.0}})
    assert text.splitlines() == [
        "              top-1     many   medium      few      ECE",
        "last epoch    85.25    95.00    86.00    74.00     3.21",
        "best         100.00        -        -        -        -",
    ]


def test_table_without_calibration_has_no_ece_column():
    text = table({"x": {"top1": 50.0, "few": 25.0}})
    assert text.splitlines() == ["     top-1     many   medium      few", "x    50.00        -        -    25.00"]


def test_calibration_line():
    errors = {"index": {"many": 4.1, "medium": 7.254}, "count": {"few": 0.0}}
    assert calibration_line(errors) == (
        "ECE by index: many 4.10, medium 7.25, few -; ECE by count: many -, medium -, few 0.00"
    )


def test_macro_accuracy_is_shown_if_it_differs():
    metrics = METRICS | {"macro": 80.0, "worst_class": 4, "worst_class_top1": 31.0, "nll": 1.5, "mce": 20.0}
    metrics["samples"] = 77
    assert details(metrics) == (
        "top-5 99.50, macro top-1 80.00, worst class 4 (31.00), NLL 1.5000, MCE 20.00; 77 images"
    )
    assert "macro" not in details(metrics | {"macro": 85.25})


def test_group_line():
    sizes = {"index": {"many": 3, "medium": 4, "few": 3}, "count": {"many": 0, "medium": 10, "few": 0}}
    assert group_line(sizes) == (
        "classes by index: many 3, medium 4, few 3; classes by count: many 0, medium 10, few 0"
    )


def test_the_class_table_has_a_dash_for_a_class_without_test_images():
    assert class_table(PREDICTIONS, COUNTS, NAMES).splitlines() == [
        "class           train    test    top-1",
        "  0 cat, wild     120       3    66.67",
        "  1 Hündin         30       2    50.00",
        "  2 yak             0       0        -",
    ]
    assert class_table(PREDICTIONS, COUNTS, NAMES, most=2) == "3 classes: accuracy per class is in per_class.csv"


def test_the_report_on_disk(tmp_path):
    metrics = report(PREDICTIONS, COUNTS, shot_groups(None, None, COUNTS))
    folder = tmp_path / "eval" / "model_best"
    for _ in range(2):  # a second report replaces the first
        write_report(folder, metrics, PREDICTIONS, COUNTS, NAMES)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "per_class.csv"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    with (folder / "per_class.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["class", "name", "train_images", "test_images", "top1_percent"],
            ["0", "cat, wild", "120", "3", "66.6667"],
            ["1", "Hündin", "30", "2", "50.0000"],
            ["2", "yak", "0", "0", ""],
        ]


def test_predictions_are_saved_per_epoch_and_targets_once(tmp_path):
    folder = tmp_path / "predictions"
    save_predictions(folder, 0, PREDICTIONS)
    written = (folder / "targets.npz").stat()
    save_predictions(folder, 12, PREDICTIONS._replace(classes=torch.tensor([364, 1, 0, 1, 0])))
    assert sorted(path.name for path in folder.iterdir()) == ["0.npz", "12.npz", "targets.npz"]
    assert (folder / "targets.npz").stat() == written
    with np.load(folder / "12.npz") as kept, np.load(folder / "targets.npz") as truth:
        assert (kept["classes"].dtype, kept["confidences"].dtype) == (np.int16, np.float32)
        assert kept["classes"].tolist() == [364, 1, 0, 1, 0]
        assert kept["confidences"].tolist() == PREDICTIONS.confidences.tolist()
        assert kept["top5_hits"].tolist() == PREDICTIONS.top5_hits.tolist()
        assert truth["targets"].tolist() == PREDICTIONS.targets.tolist()


@pytest.mark.parametrize(("size", "kept"), [(NPZ_LIMIT, True), (NPZ_LIMIT + 1, False)])
def test_predictions_of_very_large_test_sets_are_not_saved(tmp_path, size, kept):
    save_predictions(tmp_path / "predictions", 0, PREDICTIONS.select(torch.zeros(size, dtype=torch.long)))
    assert (tmp_path / "predictions").exists() is kept
