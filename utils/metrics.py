"""Accuracy, groups and calibration: pure functions of predictions; and the running sums of training.

Legend: N samples, C classes.

Accuracies and calibration errors in reports are percent; ``calibration_error`` itself gives fractions of 1.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils import distributed
from utils.errors import DivergenceError, InputError

ADVICE = "a smaller lr, more warmup_epochs or max_grad_norm may help"
GROUPS = ("many", "medium", "few")
NEVER = torch.iinfo(torch.int64).max  # later than any step


class Predictions(NamedTuple):
    """What a model said of N samples, in the data set's order; all on the CPU."""

    classes: Tensor  # [N] int64, the most probable class
    confidences: Tensor  # [N] float32, its probability
    top5_hits: Tensor  # [N] bool, the label is among the min(5, C) most probable
    nll: Tensor  # [N] float32, -log probability of the label
    targets: Tensor  # [N] int64

    def select(self, chosen: Tensor) -> "Predictions":
        """The samples at ``chosen`` (mask or indices)."""
        return Predictions(*(field[chosen] for field in self))


# ---------------------------------------------------------------------------------------------------------------------
# Groups of classes


def groups_by_index(ranges: Sequence[Sequence[int]], num_classes: int) -> dict[str, Tensor]:
    """Boolean masks ``[C]`` of many / medium / few from their three ``[first, last + 1]`` index ranges."""
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

    ``rule``: "index", "count", or None for "index" where there are ``ranges`` and "count" elsewhere. ``ranges``: three
    ``[first, last + 1]`` or None. Raises :class:`InputError` for ranges that do not fit.
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
    """(share of hits ``[C]`` float64, samples ``[C]`` int64); the share of a class without samples is NaN."""
    totals = torch.bincount(targets, minlength=num_classes)
    hits = torch.bincount(targets[classes == targets], minlength=num_classes)
    return hits.double() / totals, totals


def shot_accuracy(accuracy: Tensor, totals: Tensor, groups: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of class accuracies per group, in the unit of ``accuracy [C]``.

    Classes without test samples (``totals [C]`` is 0) do not count; a group without any class left is absent from the
    result: there is no number to give.
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

    All arguments ``[N]``. Returns fractions of 1: ``ece``, ``mce`` (floats), ``bin_accuracy``, ``bin_confidence``
    (float64 ``[num_bins]``, 0 where a bin is empty) and ``bin_count`` (int64). A confidence of 0 is in the first bin.
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
    """Expected calibration error in percent over the samples whose label lies in a group, by every rule.

    ``confidences``, ``classes``, ``targets``: ``[N]``, see :class:`Predictions`. ``groups``: masks ``[C]``. A group
    without samples is absent from the result. Bins as in :func:`calibration_error`.
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
# A report


def report(predictions: Predictions, class_counts: Tensor, groups: Mapping[str, Mapping[str, Tensor]]) -> dict:
    """Every scalar that is reported of one evaluation; accuracies and errors in percent, nll in nats.

    ``groups``: one set of group masks per rule, the headline rule first ("index" and "count", or "count" and "index").
    Its many / medium / few stand at the top level too. ``macro`` is the mean of class accuracies, ``top1`` (micro)
    the share of hits; they differ where the test set is uneven.
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
# Choosing an epoch without fooling oneself


def halves(targets: Tensor) -> Tensor:
    """Cuts a test set into two class-balanced halves by position within the class: bool ``[N]``, True = second half."""
    order = torch.argsort(targets, stable=True)
    starts = torch.cumsum(torch.bincount(targets), 0) - torch.bincount(targets)
    position = torch.empty_like(targets)
    position[order] = torch.arange(len(targets)) - starts[targets[order]]
    return position % 2 == 1


def half_accuracies(predictions: Predictions) -> list[float]:
    """Top-1 in percent on the two halves of :func:`halves`; an empty half (one sample per class) gives the whole's."""
    hits = (predictions.classes == predictions.targets).double()
    second = halves(predictions.targets)
    return [100 * float(hits[half].mean() if half.any() else hits.mean()) for half in (~second, second)]


def cross_fitted(curves: Sequence[Sequence[float]]) -> tuple[float, list[int]]:
    """Top-1 of the best epoch, chosen and scored on different halves of the test set.

    ``curves``: one pair (first half, second half) per evaluation, see :func:`half_accuracies`. The evaluation that is
    best on one half (the earliest of equals) is scored on the other, both ways; returns (mean of the two scores,
    [position chosen on the first half, on the second]).
    """
    table = np.asarray(curves)
    chosen = [int(table[:, half].argmax()) for half in (0, 1)]
    return float((table[chosen[0], 1] + table[chosen[1], 0]) / 2), chosen


# ---------------------------------------------------------------------------------------------------------------------
# Running sums of training


SUMS = ("loss", "top-1 hits", "top-5 hits", "samples", "clamped_logits", "skipped_steps")


class TrainMeter:
    """Sums over the steps of an epoch, kept on the device until somebody asks: a step never waits for a number.

    Also keeps the first step whose loss or logits (as the model gave them, before any clamp) were not finite. All of it
    is changed in place, so that a recorded step can do it.
    """

    def __init__(self, device: torch.device, clamp: float | None = None):
        """``clamp``: logits beyond +-this are counted; None: the loss does not clamp."""
        self.clamp = clamp
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.last = torch.zeros(4, dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)  # finished
        self.first_bad = torch.full((), NEVER, device=device)

    def tensors(self) -> list[Tensor]:
        """All that it keeps."""
        return [self.sums, self.last, self.steps, self.first_bad]

    def reset(self) -> None:
        """Before an epoch."""
        for tensor in (self.sums, self.last, self.steps):
            tensor.zero_()
        self.first_bad.fill_(NEVER)

    def rows(self) -> Tensor:
        """The sums of every process, float64 [W, len(SUMS)] on the CPU: what :meth:`go_on` needs."""
        return distributed.gather_rows(self.sums[None]).cpu()

    def go_on(self, rows: Tensor, steps: int) -> None:
        """After ``steps`` steps of an epoch, from the :meth:`rows` of then: to the last bit, if as many processes."""
        mine, others = distributed.rank(), distributed.world_size() != len(rows)
        row = rows.sum(dim=0) * (mine == 0) if others else rows[mine]
        self.sums.copy_(row)
        self.steps.fill_(steps)

    @torch.no_grad()
    def update(
        self, loss: Tensor, logits: Tensor, targets: Tensor, weight: float = 1.0, ends_step: bool = True
    ) -> None:
        """One pass: ``loss`` is its mean; under mixup, hits are counted against the unmixed ``targets [B]``.

        A pass of ``weight`` 0 is looked at for numbers that are not finite, and counted nowhere.
        """
        size = len(targets)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # [B, 5]
        values = (loss.double() * size, top[:, 0].sum(), top.sum(), torch.full((), size, device=logits.device))
        self.last.copy_(torch.stack([value.double() for value in values]))
        if weight > 0:
            self.sums[:4] += self.last
            if self.clamp is not None:
                self.sums[4] += (logits.abs() > self.clamp).sum()
        bad = ~(torch.isfinite(loss) & torch.isfinite(logits).all())
        self.first_bad.copy_(torch.where(bad, self.first_bad.clamp(max=self.steps), self.first_bad))
        if ends_step:
            self.steps += 1

    @torch.no_grad()
    def skipped(self, overflow: Tensor) -> None:
        """A step that fp16 leaves out, since its gradients overflowed (1, else 0); all processes do alike."""
        if distributed.is_main():
            self.sums[5] += overflow.reshape(())

    def first_bad_step(self) -> int | None:
        """The first step at which some process met a number that is not finite; the same on all of them."""
        step = int(distributed.all_reduce_min(self.first_bad.clone()))
        return step if step < NEVER else None

    def averages(self) -> dict[str, float]:
        """Mean loss and accuracies in percent, over all processes."""
        return _averages(distributed.all_reduce_sum(self.sums.clone()))

    def counts(self) -> dict[str, int]:
        """``clamped_logits`` and ``skipped_steps`` (by fp16, whose gradients overflowed), over all processes."""
        return dict(zip(SUMS[4:], map(int, distributed.all_reduce_sum(self.sums.clone()).tolist()[4:]), strict=True))

    def last_step(self) -> dict[str, float]:
        """The same for the last step of this process alone."""
        return _averages(self.last)


def check_weights(model: nn.Module, epoch: int) -> None:
    """Raises :class:`DivergenceError` where a step left a weight that no forward pass has met yet."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise DivergenceError(f"epoch {epoch}, last step: a weight is not finite; {ADVICE}")


def _averages(sums: Tensor) -> dict[str, float]:
    loss, hits1, hits5, samples = sums[:4].tolist()
    samples = max(samples, 1)
    return {"loss": loss / samples, "top1": 100 * hits1 / samples, "top5": 100 * hits5 / samples}
