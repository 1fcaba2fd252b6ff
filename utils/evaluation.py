"""Running a model over a test set, and writing what came out."""

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import distributed
from utils.errors import DivergenceError, InputError, Interrupted
from utils.files import atomic_file, write_text
from utils.metrics import GROUPS, Predictions, class_accuracy
from utils.precision import autocast

NPZ_LIMIT = 50_000  # per-sample predictions are kept for test sets of at most this many images


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Collection[tuple[Tensor, Tensor]],
    precision: str = "fp32",
    signal: Callable[[], int] = lambda: 0,
) -> Predictions:
    """The model's word on every sample, in eval mode, from raw logits; numbers leave the device once, at the end.

    ``batches`` are this process's share; the result holds all processes' samples, rank after rank. ``precision``: see
    :mod:`utils.precision`. A compiled model runs as it was written, so that a checkpoint gives the same numbers again.
    ``signal``: the number of one that this process got, or 0; raises :class:`Interrupted` on all processes, after as
    many batches, where one of them got one.
    """
    training = model.training
    model.eval()
    device = next(model.parameters(), torch.empty(0)).device
    parts = [_nothing(device)]
    stop = 0
    for batch in _as_many_as_others(batches):
        stop = distributed.greatest(signal())
        if stop:
            break
        if batch is not None:
            images, targets = batch
            with autocast(precision, device):
                logits = model.forward(images)
            parts.append(_predict_batch(logits, targets))
    model.train(training)
    if stop:
        raise Interrupted(stop)
    fields = (distributed.gather_rows(torch.cat(field)) for field in zip(*parts, strict=True))
    predictions = Predictions(*(field.cpu() for field in fields))
    if not len(predictions.targets):
        raise InputError("the test set is empty: there is nothing to evaluate on")
    if not predictions.nll.isfinite().all():
        raise DivergenceError("the model's logits are not finite on the images it was evaluated on; nothing was saved")
    return predictions


def _as_many_as_others(batches: Collection[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The batches, and None in place of those that other processes have more, so that all can speak after each."""
    most = distributed.greatest(len(batches))
    yield from batches
    yield from [None] * (most - len(batches))


def _predict_batch(logits: Tensor, targets: Tensor) -> Predictions:
    log_probs = F.log_softmax(logits.float(), dim=1)  # [B, C]
    top = log_probs.topk(min(5, logits.shape[1]), dim=1)
    return Predictions(
        classes=top.indices[:, 0],
        confidences=top.values[:, 0].exp(),
        top5_hits=(top.indices == targets[:, None]).any(dim=1),
        nll=F.nll_loss(log_probs, targets, reduction="none"),
        targets=targets,
    )


def _nothing(device: torch.device) -> Predictions:
    """Predictions on no sample: the share of a process when there are fewer batches than processes."""
    kinds = (torch.int64, torch.float32, torch.bool, torch.float32, torch.int64)
    return Predictions(*(torch.empty(0, dtype=kind, device=device) for kind in kinds))


# ---------------------------------------------------------------------------------------------------------------------
# On paper


def percent(value: float | None, digits: int = 2) -> str:
    """A number, or ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Label -> metrics as a small table: top-1, many / medium / few, ECE, all in percent."""
    columns = ("top1", *GROUPS, "ece")
    width = max(len(label) for label in rows)
    lines = [" " * width + "".join(f"{c:>9}" for c in ("top-1", *GROUPS, "ECE"))]
    for label, metrics in rows.items():
        lines.append(f"{label:<{width}}" + "".join(f"{percent(metrics.get(c)):>9}" for c in columns))
    return "\n".join(lines)


def details(metrics: Mapping) -> str:
    """The scalars beside the table, in one line."""
    uneven = f"macro top-1 {percent(metrics['macro'])}, " if abs(metrics["macro"] - metrics["top1"]) > 1e-6 else ""
    return (
        f"top-5 {percent(metrics['top5'])}, {uneven}worst class {metrics['worst_class']} "
        f"({percent(metrics['worst_class_top1'])}), NLL {metrics['nll']:.4f}, MCE {percent(metrics['mce'])}; "
        f"{metrics['samples']} images"
    )


def class_table(predictions: Predictions, class_counts: Tensor, names: Sequence[str], most: int = 100) -> str:
    """Top-1 in percent per class as text; beyond ``most`` classes a line that points to ``per_class.csv``."""
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


def group_line(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """How large the groups are, by every rule: "classes by index: many 3, medium 4, few 3"."""
    return "; ".join(
        f"classes by {rule}: " + ", ".join(f"{name} {size}" for name, size in by_name.items())
        for rule, by_name in sizes.items()
    )


def mislas_lines(metrics: Mapping) -> tuple[str, str]:
    """The two lines that scripts of the field parse."""
    many, medium, few = (f"{percent(metrics.get(g), 3)}%" if g in metrics else "-" for g in GROUPS)
    return (
        f"* Acc@1 {metrics['top1']:.3f}% Acc@5 {metrics['top5']:.3f}% HAcc {many} MAcc {medium} TAcc {few}.",
        f"* ECE   {metrics['ece']:.3f}%.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def save_predictions(folder: Path, epoch: int, predictions: Predictions) -> None:
    """``<epoch>.npz`` (uncompressed: class, confidence, top-5 hit) and, once, ``targets.npz``; see ``NPZ_LIMIT``."""
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


def write_report(folder: Path, metrics: Mapping, predictions: Predictions, class_counts: Tensor, names: list[str]):
    """``metrics.json`` (units as in :func:`utils.metrics.report`) and ``per_class.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    accuracy, totals = class_accuracy(predictions.classes, predictions.targets, len(class_counts))
    with atomic_file(folder / "per_class.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "name", "train_images", "test_images", "top1_percent"])
        for index, (name, train, test) in enumerate(zip(names, class_counts.tolist(), totals.tolist(), strict=True)):
            writer.writerow([index, name, train, test, f"{100 * float(accuracy[index]):.4f}" if test else ""])
