"""Accuracy, groups and calibration: pure functions of predictions.

Legend: N samples, C classes.

Accuracies and calibration errors in reports are percent; ``calibration_error`` itself returns fractions of 1.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError

GROUPS = ("many", "medium", "few")


class Predictions(NamedTuple):
    """Per-sample predictions in the data set's order, on the CPU."""

    classes: Tensor  # [N] int64, the most probable class
    confidences: Tensor  # [N] float32, its probability
    top5_hits: Tensor  # [N] bool, the label is among the min(5, C) most probable
    nll: Tensor  # [N] float32, -log probability of the label
    targets: Tensor  # [N] int64

    def select(self, chosen: Tensor) -> "Predictions":
        """Select samples by mask or indices."""
        return Predictions(*(field[chosen] for field in self))


# ---------------------------------------------------------------------------------------------------------------------
# Groups of classes


def groups_by_index(ranges: Sequence[Sequence[int]], num_classes: int) -> dict[str, Tensor]:
    """Boolean masks ``[C]`` of many / medium / few from three index ranges ``[first, last + 1]``."""
    index = torch.arange(num_classes)
    return {name: (index >= a) & (index < b) for name, (a, b) in zip(GROUPS, ranges, strict=True)}


def groups_by_count(class_counts: Tensor) -> dict[str, Tensor]:
    """Boolean masks ``[C]``: more than 100 training images, 20 to 100, fewer than 20 (Liu et al., CVPR 2019)."""
    many, few = class_counts > 100, class_counts < 20
    return {"many": many, "medium": ~many & ~few, "few": few}


def shot_groups(
    rule: str | None, ranges: Sequence[Sequence[int]] | None, class_counts: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Groups by every rule that applies, the headline rule first.

    Args:
        rule: Headline rule, "index" or "count"; None: "index" if there are ``ranges``, else "count".
        ranges: Three ``[first, last + 1]``, or None.
        class_counts: Training images per class, [C].

    Raises:
        InputError: The ranges do not fit the classes.
    """
    groups = {"count": groups_by_count(class_counts)}
    if ranges is not None:
        last = max(end for _, end in ranges)
        if last > len(class_counts):
            raise InputError(f"head/med/tail_class_idx reach to {last}, but there are {len(class_counts)} classes")
        groups = {"index": groups_by_index(ranges, len(class_counts)), **groups}
    elif rule == "index":
        raise InputError("shots: index needs head_class_idx, med_class_idx and tail_class_idx for this data set")
    headline = rule or next(iter(groups))
    return {headline: groups.pop(headline), **groups}


def group_sizes(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, int]]:
    """Classes per group, by every rule."""
    return {rule: {name: int(mask.sum()) for name, mask in masks.items()} for rule, masks in groups.items()}


def class_accuracy(classes: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return (accuracy ``[C]`` float64, samples ``[C]`` int64); accuracy is NaN for a class without samples."""
    totals = torch.bincount(targets, minlength=num_classes)
    hits = torch.bincount(targets[classes == targets], minlength=num_classes)
    return hits.double() / totals, totals


def shot_accuracy(accuracy: Tensor, totals: Tensor, groups: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of class accuracies per group, in the unit of ``accuracy [C]``.

    Classes without test samples (``totals [C]`` is 0) do not count; a group without any such class is absent from the
    result.
    """
    result = {}
    for name, mask in groups.items():
        counted = mask & (totals > 0)
        if counted.any():
            result[name] = float(accuracy[counted].mean())
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def calibration_error(confidences: Tensor, predictions: Tensor, targets: Tensor, num_bins: int = 15) -> dict:
    """Expected and maximum calibration error over ``num_bins`` equal bins (low, high] (Guo et al., ICML 2017).

    All arguments are ``[N]``. Returns fractions of 1: ``ece``, ``mce`` (floats), ``bin_accuracy``, ``bin_confidence``
    (float64 ``[num_bins]``, 0 for an empty bin) and ``bin_count`` (int64). A confidence of 0 is in the first bin.
    """
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)[1:-1]
    confidences = confidences.double()
    bins = torch.bucketize(confidences, edges)
    count = torch.bincount(bins, minlength=num_bins)
    filled = count.clamp(min=1)
    accuracy = torch.bincount(bins, weights=(predictions == targets).double(), minlength=num_bins) / filled
    confidence = torch.bincount(bins, weights=confidences, minlength=num_bins) / filled
    gaps = (accuracy - confidence).abs()
    return {
        "ece": float((gaps * count).sum() / count.sum().clamp(min=1)),
        "mce": float(gaps.max()),
        "bin_accuracy": accuracy,
        "bin_confidence": confidence,
        "bin_count": count,
    }


def group_calibration(
    confidences: Tensor, classes: Tensor, targets: Tensor, groups: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Expected calibration error in percent of the samples whose label lies in a group, by every rule.

    ``confidences``, ``classes``, ``targets``: ``[N]``, see :class:`Predictions`. ``groups``: masks ``[C]``. A group
    without samples is absent from the result.
    """
    result = {}
    for rule, masks in groups.items():
        members = {name: mask[targets] for name, mask in masks.items()}  # [N] each
        result[rule] = {
            name: 100 * calibration_error(confidences[chosen], classes[chosen], targets[chosen])["ece"]
            for name, chosen in members.items()
            if chosen.any()
        }
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(predictions: Predictions, class_counts: Tensor, groups: Mapping[str, Mapping[str, Tensor]]) -> dict:
    """Compute all scalars of one evaluation; accuracies and errors in percent, nll in nats.

    ``groups``: group masks by rule, the headline rule first; its many / medium / few are repeated at the top level.
    ``macro`` is the mean of class accuracies; it differs from ``top1`` on an imbalanced test set.
    """
    num_classes = len(class_counts)
    accuracy, totals = class_accuracy(predictions.classes, predictions.targets, num_classes)
    accuracy = accuracy * 100
    tested = totals > 0
    worst = int(torch.where(tested, accuracy, torch.inf).argmin())
    calibration = calibration_error(predictions.confidences, predictions.classes, predictions.targets)
    shots = {rule: shot_accuracy(accuracy, totals, masks) for rule, masks in groups.items()}
    return {
        "top1": 100 * float((predictions.classes == predictions.targets).double().mean()),
        "top5": 100 * float(predictions.top5_hits.double().mean()),
        **next(iter(shots.values())),
        "macro": float(accuracy[tested].mean()),
        "worst_class": worst,
        "worst_class_top1": float(accuracy[worst]),
        "nll": float(predictions.nll.double().mean()),
        "ece": 100 * calibration["ece"],
        "mce": 100 * calibration["mce"],
        "ece_groups": group_calibration(predictions.confidences, predictions.classes, predictions.targets, groups),
        "samples": len(predictions.targets),
        "shots": shots,
        "group_sizes": group_sizes(groups),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased selection of an epoch


def halves(targets: Tensor) -> Tensor:
    """Split a test set into two class-balanced halves, bool ``[N]``: alternating within a class, True = second half."""
    order = torch.argsort(targets, stable=True)
    starts = torch.cumsum(torch.bincount(targets), 0) - torch.bincount(targets)
    position = torch.empty_like(targets)
    position[order] = torch.arange(len(targets)) - starts[targets[order]]
    return position % 2 == 1


def half_accuracies(predictions: Predictions) -> list[float]:
    """Top-1 in percent on each of the :func:`halves`; for an empty half (one sample per class) on all samples."""
    hits = (predictions.classes == predictions.targets).double()
    second = halves(predictions.targets)
    return [100 * float(hits[half].mean() if half.any() else hits.mean()) for half in (~second, second)]


def cross_fitted(curves: Sequence[Sequence[float]]) -> tuple[float, list[int]]:
    """Top-1 of the best epoch, selected on one half of the test set and scored on the other.

    Args:
        curves: (first half, second half) per evaluation, see :func:`half_accuracies`.

    Returns:
        Mean of the two scores (selected on the first half, on the second), and the two selected positions; of equals
        the earliest is selected.
    """
    table = np.asarray(curves)
    chosen = [int(table[:, half].argmax()) for half in (0, 1)]
    return float((table[chosen[0], 1] + table[chosen[1], 0]) / 2), chosen
