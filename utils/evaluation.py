"""Running a model over a test set, and writing what came out."""

import csv
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import distributed
from utils.errors import DivergenceError, InputError, Interrupted
from utils.files import atomic_file, write_text
from utils.metrics import GROUPS, Predictions, class_accuracy, half_accuracies, report
from utils.precision import at_least_float32, autocast

NPZ_LIMIT = 50_000  # per-sample predictions are kept for test sets of at most this many images


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Collection[tuple[Tensor, Tensor]],
    precision: str = "fp32",
    signal: Callable[[], int] = lambda: 0,
    shift: Tensor | None = None,
) -> Predictions:
    """The model's word on every sample, in eval mode; numbers leave the device once, at the end.

    From raw logits, or from those less ``shift [C]``, as :func:`methods.losses.post_hoc_shift` gives it.

    ``batches`` are this process's share; the result holds all processes' samples, rank after rank. ``precision``: see
    :mod:`utils.precision`. A compiled model runs as it was written, so that a checkpoint gives the same numbers again.
    ``signal``: the number of one that this process got, or 0; raises :class:`Interrupted` on all processes, after as
    many batches, where one of them got one.
    """
    training = model.training
    model.eval()
    device = next(model.parameters(), torch.empty(0)).device
    parts, shift = [_nothing(device)], None if shift is None else shift.to(device)
    try:
        for images, targets in until_signal(batches, signal):
            with autocast(precision, device):
                logits = model.forward(images)
            if shift is not None:
                logits = logits.float() - shift
            parts.append(predict_batch(logits, targets))
    finally:
        model.train(training)
    fields = (distributed.gather_rows(torch.cat(field)) for field in zip(*parts, strict=True))
    predictions = Predictions(*(field.cpu() for field in fields))
    if not len(predictions.targets):
        raise InputError("the test set is empty: there is nothing to evaluate on")
    if not predictions.nll.isfinite().all():
        raise DivergenceError("the model's logits are not finite on the images it was evaluated on; nothing was saved")
    return predictions


@torch.no_grad()
def feature_batches(
    model: nn.Module,
    batches: Collection[tuple[Tensor, Tensor]],
    precision: str = "fp32",
    signal: Callable[[], int] = lambda: 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(features [B, D], raw logits [B, C], targets [B]) batch by batch, in eval mode, on the model's device.

    ``model(images, with_features=True)`` gives (logits, features), see :class:`models.model.Model`. Numbers in half
    precision are raised to float32. A compiled model runs as it was written. The mode is restored when the batches have
    ended, or when the generator is closed. ``signal``: see :func:`predict`.
    """
    training = model.training
    model.eval()
    device = next(model.parameters(), torch.empty(0)).device
    try:
        for images, targets in until_signal(batches, signal):
            with autocast(precision, device):
                logits, features = model.forward(images, with_features=True)
            yield at_least_float32(features), at_least_float32(logits), targets
    finally:
        model.train(training)


class Outputs(NamedTuple):
    """What a model makes of N images, in the data set's order; all on the CPU."""

    features: Tensor  # [N, D] float32
    targets: Tensor  # [N] int64
    logits: Tensor | None = None  # [N, C] float32; None: not kept


def gather_outputs(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str = "fp32", with_logits: bool = True
) -> Outputs:
    """:func:`feature_batches` as a whole. ``batches`` are this process's share, the result has those of all processes.

    Without ``with_logits`` the memory is that of the features. Raises :class:`DivergenceError` where a feature or logit
    is not finite.
    """
    features, targets, logits = [], [torch.empty(0, dtype=torch.int64)], []
    for features_batch, logits_batch, targets_batch in feature_batches(model, batches, precision):
        features.append(features_batch.cpu())
        targets.append(targets_batch.cpu())
        if with_logits:
            logits.append(logits_batch.cpu())
    outputs = Outputs(
        _everyones_rows(features),
        distributed.gather_rows(torch.cat(targets)),
        _everyones_rows(logits) if with_logits else None,
    )
    if not all(tensor.isfinite().all() for tensor in outputs if tensor is not None):
        raise DivergenceError(
            "the model's features or logits are not finite on some images; there is nothing to compare"
        )
    return outputs


def _everyones_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all processes' ``parts`` ([B, K] each, on the CPU), of which some process may have none."""
    width = distributed.greatest(parts[0].shape[1] if parts else 0)
    return distributed.gather_rows(torch.cat([torch.empty(0, width), *parts]))


def until_signal(
    batches: Collection[tuple[Tensor, Tensor]], signal: Callable[[], int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; all processes speak before each, also those that have fewer, and stop alike.

    ``signal``: see :func:`predict`.
    """
    more = distributed.greatest(len(batches)) - len(batches)
    for batch in itertools.chain(batches, [None] * more):
        stop = distributed.greatest(signal())
        if stop:
            raise Interrupted(stop)
        if batch is not None:
            yield batch


def predict_batch(logits: Tensor, targets: Tensor) -> Predictions:
    """Predictions from ``logits`` [B, C] of any precision, on their device."""
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


class Evaluation(NamedTuple):
    """One evaluation: what goes into the epoch's row, and what it was computed from."""

    entries: dict  # "test", "halves" and, where training images are held out, "val"; see utils.metrics.report
    predictions: Predictions  # on the test set


def evaluate(
    model: nn.Module,
    test: Collection,
    held_out: Collection | None,
    class_counts: Tensor,
    groups: dict,
    precision: str,
    shift: Tensor | None = None,
    signal: Callable[[], int] = lambda: 0,
) -> Evaluation:
    """Evaluates the bare model, with rank 0's batch-norm statistics on every rank.

    ``shift``, ``signal``: see :func:`predict`.
    """
    distributed.broadcast_buffers(model)
    predictions = predict(model, test, precision, signal, shift)
    entries = {"test": report(predictions, class_counts, groups), "halves": half_accuracies(predictions)}
    if held_out is not None:
        entries["val"] = report(predict(model, held_out, precision, signal, shift), class_counts, groups)
    return Evaluation(entries, predictions)


# ---------------------------------------------------------------------------------------------------------------------
# On paper


def percent(value: float | None, digits: int = 2) -> str:
    """A number, or ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Label -> metrics as a small table: top-1, many / medium / few, and ECE where a row has it; all in percent."""
    columns = {"top1": "top-1", **{group: group for group in GROUPS}}
    columns |= {"ece": "ECE"} if any("ece" in metrics for metrics in rows.values()) else {}
    width = max(len(label) for label in rows)
    lines = [" " * width + "".join(f"{head:>9}" for head in columns.values())]
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


def calibration_line(errors: Mapping[str, Mapping[str, float]]) -> str:
    """ECE in percent per group, by every rule: "ECE by index: many 4.10, medium 7.25, few -"."""
    return "; ".join(
        f"ECE by {rule}: " + ", ".join(f"{name} {percent(by_name.get(name))}" for name in GROUPS)
        for rule, by_name in errors.items()
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
