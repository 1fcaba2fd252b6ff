"""What a run writes as it goes: settings, starts, metrics, TensorBoard, predictions, diagnostics, the final table."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from datasets import Data
from methods.component_meter import ComponentMeter
from utils import distributed
from utils.checkpoint import TrainState
from utils.config import dump_config
from utils.evaluation import Evaluation, group_line, mislas_lines, save_predictions
from utils.files import write_text
from utils.metrics import GROUPS, class_accuracy, group_sizes
from utils.run.epoch_arrays import EpochArrays
from utils.run.log import RunLog, count_lines
from utils.run.provenance import commit, machine
from utils.run.summary import summarise, summary_table, write_summary


def write_settings(folder: Path, settings: Mapping) -> None:
    """``config.yaml``: with this file alone the run can be repeated."""
    if distributed.is_main():
        write_text(folder / "config.yaml", dump_config(settings))


def record_start(folder: Path, state: TrainState, data: Data, device: torch.device) -> None:
    """A line of ``starts.jsonl``: from where the run goes on, with which commit, on which machine, on which data."""
    if not distributed.is_main():
        return
    start = {
        "epoch": state.epoch,
        "step": state.step,
        "commit": commit(),
        "processes": distributed.world_size(),
        "data": data.content_hash(),
        "class_counts": data.class_counts.tolist(),
        **machine(device),
    }
    with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def announce(run: RunLog, evaluation: Evaluation) -> None:
    """MiSLAS's two lines, in the log."""
    for line in mislas_lines(evaluation.entries["test"]):
        run.info(line)


def publish(run: RunLog, epoch: int, evaluation: Evaluation, data: Data) -> None:
    """The lines in the log, the predictions, and accuracy per class for TensorBoard."""
    announce(run, evaluation)
    predictions = evaluation.predictions
    accuracy, _ = class_accuracy(predictions.classes, predictions.targets, data.num_classes)
    run.class_accuracies(epoch, 100 * accuracy, data.class_names)
    if distributed.is_main():
        save_predictions(run.folder / "predictions", epoch, predictions)


def record(run: RunLog, row: Mapping, clamp: float | None) -> None:
    """What was counted in the epoch, its line in ``metrics.jsonl`` and its TensorBoard scalars."""
    for line in count_lines(row["epoch"], row["train"], clamp):
        run.info(line)
    run.write_epoch(row)
    scalars = {"loss/train": row["train"]["loss"], "top1/train": row["train"]["top1"], "lr": row["lr"]}
    scalars |= {f"collapse/{key}": value for key, value in row.get("nc", {}).items()}
    for split in ("test", "val"):
        shown = {key: row[split][key] for key in ("top1", *GROUPS, "ece", "nll") if key in row.get(split, {})}
        scalars |= {f"{key}/{split}": value for key, value in shown.items()}
    run.scalars(row["epoch"], scalars)


def diagnostics_file(
    folder: Path, components: ComponentMeter | None, data: Data, first_epoch: int
) -> EpochArrays | None:
    """``diagnostics.npz``, which rank 0 writes; None where there are no components."""
    if components is None or not distributed.is_main():
        return None
    fixed = {"class_counts": data.class_counts.numpy(), "rows": np.array(components.chosen)}
    return EpochArrays(folder / "diagnostics.npz", fixed, first_epoch, last=["table"])


def record_components(run: RunLog, epoch: int, components: ComponentMeter | None, arrays: EpochArrays | None) -> None:
    """The epoch's row of ``diagnostics.npz``, and the chosen rows' attraction and repulsion as TensorBoard scalars."""
    if components is None:
        return
    means = components.averages()
    if arrays is None:
        return
    arrays.add(epoch, means)
    for row in components.chosen:
        attraction = float(means["diagonal"][row])
        repulsion = float(means["row_sums"][row]) - attraction
        run.scalars(epoch, {f"row {row}/attraction": attraction, f"row {row}/repulsion": repulsion})


def finish(run: RunLog, state: TrainState, evaluation: Evaluation, groups: dict) -> None:
    """The table of the three numbers, in the log and as ``summary.json``."""
    if not distributed.is_main():
        return
    rows = [row for row in run.history() if "test" in row]
    if not rows or rows[-1]["epoch"] != state.epoch - 1:  # a checkpoint that came without its run's folder
        rows.append({"epoch": state.epoch - 1, **evaluation.entries})
    headline = next(iter(groups))
    summary = summarise(rows, run.folder / "predictions", groups[headline])
    write_summary(run.folder / "summary.json", summary)
    run.info(f"\n{summary_table(summary)}\n\n{group_line(group_sizes(groups))} (in the table: by {headline})")
