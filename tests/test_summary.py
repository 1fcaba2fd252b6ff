"""The summary of a run, on rows and predictions small enough to check by hand."""

import json

import numpy as np
import pytest
import torch

from utils.metrics import Predictions, half_accuracies, report, shot_groups
from utils.report.text import save_predictions
from utils.run.summary import summarise, summary_table, write_summary

TARGETS = [0] * 6 + [1] * 4 + [2] * 2  # halves by position within the class: 121212 1212 12
COUNTS = torch.tensor([300, 50, 5])
GROUPS = shot_groups(None, None, COUNTS)
CONFIDENCE = {2: 0.9, 5: 0.6, 7: 0.4}
CLASSES = {
    2: "000101 1010 20",  # first half 6 of 6, second half 1 of 6
    5: "001010 0101 00",  # first half 1 of 6, second half 5 of 6
    7: "000001 1110 00",  # first half 5 of 6, second half 3 of 6
}


def predictions_of(epoch):
    return Predictions(
        classes=torch.tensor([int(digit) for digit in CLASSES[epoch].replace(" ", "")]),
        confidences=torch.full((12,), CONFIDENCE[epoch]),
        top5_hits=torch.ones(12, dtype=torch.bool),
        nll=torch.ones(12),
        targets=torch.tensor(TARGETS),
    )


def row_of(epoch, **more):
    predictions = predictions_of(epoch)
    return {"epoch": epoch, "test": report(predictions, COUNTS, GROUPS), "halves": half_accuracies(predictions), **more}


@pytest.fixture
def folder(tmp_path):
    for epoch in CLASSES:
        save_predictions(tmp_path / "predictions", epoch, predictions_of(epoch))
    return tmp_path / "predictions"


ROWS = [row_of(epoch) for epoch in CLASSES]


def test_rows_match_the_comments():
    assert [row["halves"] for row in ROWS] == [
        pytest.approx([100, 100 / 6]),
        pytest.approx([100 / 6, 500 / 6]),
        pytest.approx([500 / 6, 50]),
    ]


def test_last_and_best_are_rows_of_the_run(folder):
    summary = summarise(ROWS, folder, GROUPS["count"])
    assert list(summary) == ["last epoch", "cross-fitted best", "best on the test set"]
    # Epoch 7: 8 of 12, the most; by class 5 of 6, 3 of 4, 0 of 2.
    assert summary["last epoch"] == {
        "top1": pytest.approx(800 / 12),
        "many": pytest.approx(500 / 6),
        "medium": 75.0,
        "few": 0.0,
        "ece": pytest.approx(100 * (8 / 12 - 0.4), abs=1e-4),
        "epochs": [7],
    }
    assert summary["best on the test set"] == summary["last epoch"]


def test_the_best_on_the_test_set_is_the_earliest_of_equals(folder):
    rows = [ROWS[2] | {"epoch": 3}, ROWS[1], ROWS[2] | {"epoch": 9}, ROWS[0]]
    summary = summarise(rows, folder, GROUPS["count"])
    assert summary["best on the test set"]["epochs"] == [3]
    assert summary["last epoch"]["epochs"] == [2]


def test_the_cross_fitted_choice_by_hand(folder):
    # The first half chooses epoch 2 (6 of 6), which has 1 of 6 on the second; the second chooses epoch 5 (5 of 6),
    # which has 1 of 6 on the first. Epoch 5 on the first half and epoch 2 on the second: 001111 0000 00.
    summary = summarise(ROWS, folder, GROUPS["count"])
    assert summary["cross-fitted best"] == {
        "many": pytest.approx(100 / 3),
        "medium": 0.0,
        "few": 0.0,
        # The first half is 1 of 6 right at confidence 0.6, the second 1 of 6 at 0.9; no bin has both.
        "ece": pytest.approx(100 * (0.5 * (0.6 - 1 / 6) + 0.5 * (0.9 - 1 / 6)), abs=1e-4),
        "top1": pytest.approx(100 / 6),
        "epochs": [2, 5],
    }


def test_groups_of_the_cross_fitted_choice_follow_the_rule_that_is_given(folder):
    by_index = shot_groups(None, [[0, 1], [1, 3], [3, 3]], COUNTS)["index"]
    summary = summarise(ROWS, folder, by_index)
    best = summary["cross-fitted best"]
    assert best["many"] == pytest.approx(100 / 3)
    assert best["medium"] == 0.0
    assert "few" not in best


def test_with_one_epoch_all_rows_are_equal(folder):
    summary = summarise(ROWS[:1], folder, GROUPS["count"])
    last = summary["last epoch"]
    assert {key: summary["cross-fitted best"][key] for key in last if key != "epochs"} == pytest.approx(
        {key: last[key] for key in last if key != "epochs"}
    )
    assert summary["cross-fitted best"]["epochs"] == [2, 2]


@pytest.mark.parametrize("missing", ["2.npz", "5.npz", "targets.npz"])
def test_without_predictions_the_cross_fitted_row_has_its_top_1_only(folder, missing):
    (folder / missing).unlink()
    summary = summarise(ROWS, folder, GROUPS["count"])
    assert summary["cross-fitted best"] == {"top1": pytest.approx(100 / 6), "epochs": [2, 5]}


def test_held_out_images_select_an_epoch(folder):
    rows = [row_of(2, val={"top1": 60.0}), row_of(5, val={"top1": 70.0}), row_of(7, val={"top1": 70.0})]
    summary = summarise(rows, folder, GROUPS["count"])
    assert list(summary)[-1] == "chosen on held-out images"
    assert summary["chosen on held-out images"]["epochs"] == [5]
    assert summary["chosen on held-out images"]["top1"] == pytest.approx(50.0)


def test_the_table_shows_the_epochs_and_what_selected_them(folder):
    rows = [row_of(epoch, val={"top1": 60.0}) for epoch in CLASSES]
    assert summary_table(summarise(rows, folder, GROUPS["count"])).splitlines() == [
        "                                                top-1     many   medium      few      ECE",
        "last epoch (epoch 7)                            66.67    83.33    75.00     0.00    26.67",
        "cross-fitted best (epochs 2, 5)                 16.67    33.33     0.00     0.00    58.33",
        "best on the test set (epoch 7, chosen by it)    66.67    83.33    75.00     0.00    26.67",
        "chosen on held-out images (epoch 2)             58.33    66.67    50.00    50.00    31.67",
    ]


def test_the_summary_is_written_as_json(tmp_path, folder):
    summary = summarise(ROWS, folder, GROUPS["count"])
    write_summary(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_predictions_of_many_classes_survive_being_stored_as_small_integers(tmp_path):
    classes = torch.tensor([9_999, 3, 9_999, 3])
    predictions = Predictions(classes, torch.full((4,), 0.5), torch.ones(4).bool(), torch.ones(4), classes.clone())
    save_predictions(tmp_path, 0, predictions)
    counts = torch.ones(10_000, dtype=torch.long)
    row = {"epoch": 0, "test": report(predictions, counts, shot_groups(None, None, counts)), "halves": [100.0, 100.0]}
    best = summarise([row], tmp_path, shot_groups(None, None, counts)["count"])["cross-fitted best"]
    assert (best["few"], best["top1"]) == (100.0, 100.0)
    assert best["ece"] == pytest.approx(50.0)
    with np.load(tmp_path / "0.npz") as kept:
        assert kept["classes"].max() == 9_999
