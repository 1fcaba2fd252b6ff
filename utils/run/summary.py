"""Summary of a run, the most trustworthy number first: last epoch, cross-fitted best, best on the test set."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.files import write_text
from utils.metrics import GROUPS, calibration_error, class_accuracy, cross_fitted, halves, shot_accuracy
from utils.report.text import table
from utils.run.epoch_arrays import read_arrays

AVERAGED = "last epoch, averaged weights"
SHOWN = ("top1", *GROUPS, "ece")


def summarise(rows: Sequence[Mapping], predictions: Path, groups: Mapping[str, Tensor]) -> dict[str, dict]:
    """Summarise a run as label -> metrics in percent.

    Args:
        rows: Rows of ``metrics.jsonl`` with an evaluation.
        predictions: Folder of the predictions per epoch; without them the cross-fitted row has top-1 only.
        groups: Masks ``[C]`` of the headline rule.

    Returns:
        Metrics by label; averaged weights, and the epoch that held-out images select, have rows of their own.
    """
    last, best = rows[-1], max(rows, key=lambda row: row["test"]["top1"])
    top1, (first, second) = cross_fitted([row["halves"] for row in rows])
    epochs = [rows[first]["epoch"], rows[second]["epoch"]]
    summary = {
        "last epoch": _shown(last),
        **({AVERAGED: _shown(last, "ema")} if "ema" in last else {}),
        "cross-fitted best": {
            **_cross_fitted_groups(predictions, *epochs, groups),
            "top1": top1,
            "epochs": epochs,
        },
        "best on the test set": _shown(best),
    }
    if "val" in last:
        chosen = max(rows, key=lambda row: row["val"]["top1"])
        summary["chosen on held-out images"] = _shown(chosen)
    return summary


def summary_table(summary: Mapping[str, Mapping]) -> str:
    """Format the summary; the epoch that was selected on the test set is marked."""
    remarks = {"best on the test set": ", chosen by it"}
    return table(
        {
            f"{label} ({_epochs(metrics['epochs'])}{remarks.get(label, '')})": metrics
            for label, metrics in summary.items()
        }
    )


def write_summary(path: Path, summary: Mapping[str, Mapping]) -> None:
    write_text(path, json.dumps(summary, indent=2) + "\n")


def _shown(row: Mapping, entry: str = "test") -> dict:
    return {key: row[entry][key] for key in SHOWN if key in row[entry]} | {"epochs": [row["epoch"]]}


def _epochs(epochs: Sequence[int]) -> str:
    return f"epoch {epochs[0]}" if len(set(epochs)) == 1 else f"epochs {epochs[0]}, {epochs[1]}"


def _cross_fitted_groups(folder: Path, first: int, second: int, groups: Mapping[str, Tensor]) -> dict[str, float]:
    """Groups and ECE of the cross-fitted choice: each half is predicted by the epoch that the other half selects."""
    files = [folder / f"{second}.npz", folder / f"{first}.npz", folder / "targets.npz"]
    if not all(file.exists() for file in files):
        return {}
    on_first, on_second, truth = map(read_arrays, files)
    targets = torch.from_numpy(truth["targets"].astype(np.int64))
    in_second = halves(targets).numpy()
    classes, confidences = (
        torch.from_numpy(np.where(in_second, on_second[key], on_first[key])) for key in ("classes", "confidences")
    )
    num_classes = len(next(iter(groups.values())))
    accuracy, totals = class_accuracy(classes.long(), targets, num_classes)
    ece = calibration_error(confidences, classes, targets)["ece"]
    return {**shot_accuracy(100 * accuracy, totals, groups), "ece": 100 * ece}
