"""Metrics as text tables, and the files that an evaluation writes."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.files import atomic_file, write_text
from utils.metrics import GROUPS, Predictions, class_accuracy
from utils.table import Table, text

NPZ_LIMIT = 50_000  # per-sample predictions are saved for test sets of at most this many images


def percent(value: float | None, digits: int = 2) -> str:
    """Format a number; None becomes ``-``."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Format label -> metrics as a table: top-1, many / medium / few, and ECE if a row has it; all in percent."""
    columns = {"top1": "top-1", **{group: group for group in GROUPS}}
    columns |= {"ece": "ECE"} if any("ece" in metrics for metrics in rows.values()) else {}
    cells = [[label, *(percent(metrics.get(column)) for column in columns)] for label, metrics in rows.items()]
    return text(Table(["", *columns.values()], cells), width=9, gap="")


def details(metrics: Mapping) -> str:
    """Format the remaining scalars in one line."""
    uneven = f"macro top-1 {percent(metrics['macro'])}, " if abs(metrics["macro"] - metrics["top1"]) > 1e-6 else ""
    return (
        f"top-5 {percent(metrics['top5'])}, {uneven}worst class {metrics['worst_class']} "
        f"({percent(metrics['worst_class_top1'])}), NLL {metrics['nll']:.4f}, MCE {percent(metrics['mce'])}; "
        f"{metrics['samples']} images"
    )


def class_table(predictions: Predictions, class_counts: Tensor, names: Sequence[str], most: int = 100) -> str:
    """Format top-1 in percent per class; beyond ``most`` classes, point to ``per_class.csv``."""
    if len(names) > most:
        return f"{len(names)} classes: accuracy per class is in per_class.csv"
    accuracy, totals = class_accuracy(predictions.classes, predictions.targets, len(names))
    width = max(5, *(len(name) for name in names))
    lines = [f"{'class':<{width + 4}}{'train':>8}{'test':>8}{'top-1':>9}"]
    for index, name in enumerate(names):
        value = 100 * float(accuracy[index]) if totals[index] else None
        lines.append(
            f"{index:>3} {name:<{width}}{int(class_counts[index]):>8}{int(totals[index]):>8}{percent(value):>9}"
        )
    return "\n".join(lines)


def group_line(values: Mapping[str, Mapping[str, object]], what: str = "classes") -> str:
    """Format a value per group, by default its size, by every rule: "classes by index: many 3, medium 4, few 3"."""
    return "; ".join(
        f"{what} by {rule}: " + ", ".join(f"{name} {value}" for name, value in by_name.items())
        for rule, by_name in values.items()
    )


def calibration_line(errors: Mapping[str, Mapping[str, float]]) -> str:
    """Format ECE in percent per group by every rule: "ECE by index: many 4.10, medium 7.25, few -"."""
    return group_line({rule: {name: percent(of.get(name)) for name in GROUPS} for rule, of in errors.items()}, "ECE")


def mislas_lines(metrics: Mapping) -> tuple[str, str]:
    """Format MiSLAS's two result lines, which other projects' scripts parse."""
    many, medium, few = (f"{percent(metrics.get(g), 3)}%" if g in metrics else "-" for g in GROUPS)
    return (
        f"* Acc@1 {metrics['top1']:.3f}% Acc@5 {metrics['top5']:.3f}% HAcc {many} MAcc {medium} TAcc {few}.",
        f"* ECE   {metrics['ece']:.3f}%.",
    )


def ema_line(metrics: Mapping) -> str:
    """Format the results of averaged weights as :func:`mislas_lines` does."""
    return "* EMA   " + " ".join(line.removeprefix("* ") for line in mislas_lines(metrics))


def save_predictions(folder: Path, epoch: int, predictions: Predictions) -> None:
    """Write ``<epoch>.npz`` (uncompressed) and, once, ``targets.npz``; nothing beyond ``NPZ_LIMIT`` images."""
    if len(predictions.targets) > NPZ_LIMIT:
        return
    folder.mkdir(exist_ok=True)
    with atomic_file(folder / f"{epoch}.npz") as file:
        np.savez(
            file,
            classes=predictions.classes.numpy().astype(np.int16),
            confidences=predictions.confidences.numpy(),
            top5_hits=predictions.top5_hits.numpy(),
        )
    if not (folder / "targets.npz").exists():
        with atomic_file(folder / "targets.npz") as file:
            np.savez(file, targets=predictions.targets.numpy().astype(np.int16))


def write_report(
    folder: Path, metrics: Mapping, predictions: Predictions, class_counts: Tensor, names: Sequence[str]
) -> None:
    """Write ``metrics.json`` (units as in :func:`utils.metrics.report`) and ``per_class.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    accuracy, totals = class_accuracy(predictions.classes, predictions.targets, len(class_counts))
    with atomic_file(folder / "per_class.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "name", "train_images", "test_images", "top1_percent"])
        for index, (name, train, test) in enumerate(zip(names, class_counts.tolist(), totals.tolist(), strict=True)):
            writer.writerow([index, name, train, test, f"{100 * float(accuracy[index]):.4f}" if test else ""])
