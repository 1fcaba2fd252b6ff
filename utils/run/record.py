"""What a run writes besides checkpoints: config.yaml, starts.jsonl, metrics, predictions, diagnostics, summary.json."""

import json
import shlex
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from datasets import Data
from methods.component_meter import ComponentMeter
from utils import distributed
from utils.checkpoint import TrainState
from utils.config import dump_config
from utils.errors import describing
from utils.evaluation import Evaluation
from utils.files import write_text
from utils.metrics import GROUPS, class_accuracy, group_sizes
from utils.report.text import ema_line, group_line, mislas_lines, save_predictions
from utils.run.epoch_arrays import EpochArrays
from utils.run.log import RunLog, count_lines
from utils.run.provenance import commit, machine
from utils.run.summary import summarise, summary_table, write_summary


class Recorder:
    """Records a run in its log, its files and TensorBoard. All processes call every method; rank 0 writes."""

    def __init__(
        self,
        log: RunLog,
        state: TrainState,
        data: Data,
        groups: Mapping[str, Mapping[str, Tensor]],
        components: ComponentMeter | None = None,
    ):
        """``components``: of the diagnostics, written to ``diagnostics.npz``."""
        self.log, self.state, self.data, self.groups, self.components = log, state, data, groups, components
        self.arrays = None
        if components and distributed.is_main():
            fixed = {"class_counts": data.class_counts.numpy(), "rows": np.array(components.chosen)}
            self.arrays = EpochArrays(log.folder / "diagnostics.npz", fixed, state.epoch, last=["table"])

    def start(self, settings: Mapping, device: torch.device) -> None:
        """Write ``config.yaml``, which reproduces the run, and add a line to ``starts.jsonl``."""
        if not distributed.is_main():
            return
        write_text(self.log.folder / "config.yaml", dump_config(settings))
        start = {
            "epoch": self.state.epoch,
            "step": self.state.step,
            "processes": distributed.world_size(),
            "data": self.data.content_hash(),
            "class_counts": self.data.class_counts.tolist(),
        }
        with describing("the machine in starts.jsonl"):
            start |= {"commit": commit(), **machine(device)}
        with (self.log.folder / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")

    def end_evaluation(self, epoch: int, evaluation: Evaluation) -> None:
        """Log an epoch's evaluation, and write its predictions and accuracy per class."""
        self._log_evaluation(evaluation)
        predictions = evaluation.predictions
        accuracy, _ = class_accuracy(predictions.classes, predictions.targets, self.data.num_classes)
        self.log.class_accuracies(epoch, 100 * accuracy, self.data.class_names)
        if distributed.is_main():
            save_predictions(self.log.folder / "predictions", epoch, predictions)

    def end_epoch(self, row: Mapping, clamp: float | None) -> None:
        """Write the epoch's ``row`` of ``metrics.jsonl``, its scalars and its diagnostics."""
        for line in count_lines(row["epoch"], row["train"], clamp):
            self.log.info(line)
        self.log.write_epoch(row)
        scalars = {"loss/train": row["train"]["loss"], "top1/train": row["train"]["top1"], "lr": row["lr"]}
        scalars |= {f"collapse/{key}": value for key, value in row.get("nc", {}).items()}
        for split in ("test", "val", "ema"):
            shown = {key: row[split][key] for key in ("top1", *GROUPS, "ece", "nll") if key in row.get(split, {})}
            scalars |= {f"{key}/{split}": value for key, value in shown.items()}
        self.log.scalars(row["epoch"], scalars)
        if self.components:
            self._end_diagnostics(row["epoch"], self.components.averages())

    def _end_diagnostics(self, epoch: int, means: Mapping[str, np.ndarray]) -> None:
        if self.arrays is None:
            return
        self.arrays.add(epoch, means)
        for row in self.components.chosen:
            attraction = float(means["diagonal"][row])
            repulsion = float(means["row_sums"][row]) - attraction
            self.log.scalars(epoch, {f"row {row}/attraction": attraction, f"row {row}/repulsion": repulsion})

    def finish(self, evaluation: Evaluation) -> None:
        """Log the summary of the run and write ``summary.json``; ``evaluation``: of the last epoch."""
        if not distributed.is_main():
            return
        rows = [row for row in self.log.history() if "test" in row]
        if not rows or rows[-1]["epoch"] != self.state.epoch - 1:  # a checkpoint without its run's folder
            rows.append({"epoch": self.state.epoch - 1, **evaluation.entries})
        headline = next(iter(self.groups))
        summary = summarise(rows, self.log.folder / "predictions", self.groups[headline])
        write_summary(self.log.folder / "summary.json", summary)
        sizes = group_line(group_sizes(self.groups))
        self.log.info(f"\n{summary_table(summary)}\n\n{sizes} (in the table: by {headline})")
        folder = shlex.quote(str(self.log.folder))
        self.log.info(
            f"curves: tensorboard --logdir {folder}; figures: python -m utils.compare {folder} --out page.html"
        )

    def finish_again(self, evaluation: Evaluation) -> None:
        """Log the evaluation and the summary of a finished run that was resumed."""
        self._log_evaluation(evaluation)
        self.finish(evaluation)

    def _log_evaluation(self, evaluation: Evaluation) -> None:
        averaged = [ema_line(evaluation.entries["ema"])] if "ema" in evaluation.entries else []
        for line in (*averaged, *mislas_lines(evaluation.entries["test"])):
            self.log.info(line)
