"""Run a model over a data set: predictions, features and the metrics of an evaluation."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import distributed
from utils.errors import DivergenceError, InputError, Interrupted
from utils.metrics import Predictions, half_accuracies, report
from utils.precision import at_least_float32, autocast


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[torch.device]:
    """Put ``model`` in eval mode for the block, and yield its device."""
    training = model.training
    model.eval()
    try:
        yield next(model.parameters(), torch.empty(0)).device
    finally:
        model.train(training)


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Collection[tuple[Tensor, Tensor]],
    precision: str = "fp32",
    signal: Callable[[], int] = lambda: 0,
    shift: Tensor | None = None,
) -> Predictions:
    """Predict every sample in eval mode. Results move to the CPU once, at the end.

    A compiled model runs eagerly, so that a checkpoint reproduces the numbers.

    Args:
        batches: This process's share; the result has the samples of all processes, rank after rank.
        precision: See :mod:`utils.precision`.
        signal: Returns the number of a signal that this process has received, or 0.
        shift: Subtracted from the logits, [C]; see :func:`methods.losses.post_hoc_shift`.

    Raises:
        Interrupted: A process has received a signal; raised on all processes after the same number of batches.
        DivergenceError: A logit is not finite.
    """
    with eval_mode(model) as device:
        parts, shift = [_no_predictions(device)], None if shift is None else shift.to(device)
        for images, targets in stop_on_signal(batches, signal):
            with autocast(precision, device):
                logits = model.forward(images)
            if shift is not None:
                logits = logits.float() - shift
            parts.append(predict_batch(logits, targets))
    fields = (distributed.gather_rows(torch.cat(field)) for field in zip(*parts, strict=True))
    predictions = Predictions(*(field.cpu() for field in fields))
    if not len(predictions.targets):
        raise InputError("the test set is empty: there is nothing to evaluate on")
    if not predictions.nll.isfinite().all():
        raise DivergenceError("the model's logits are not finite on the images it was evaluated on")
    return predictions


@torch.no_grad()
def feature_batches(
    model: nn.Module,
    batches: Collection[tuple[Tensor, Tensor]],
    precision: str = "fp32",
    signal: Callable[[], int] = lambda: 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (features [B, D], raw logits [B, C], targets [B]) in eval mode, float32, on the model's device.

    ``model(images, with_features=True)`` returns (logits, features), see :class:`models.model.Model`. The mode is
    restored when the batches end or the generator is closed. Other arguments as in :func:`predict`.
    """
    with eval_mode(model) as device:
        for images, targets in stop_on_signal(batches, signal):
            with autocast(precision, device):
                logits, features = model.forward(images, with_features=True)
            yield at_least_float32(features), at_least_float32(logits), targets


class Outputs(NamedTuple):
    """Features and logits of N images in the data set's order, on the CPU."""

    features: Tensor  # [N, D] float32
    targets: Tensor  # [N] int64
    logits: Tensor | None = None  # [N, C] float32


def gather_outputs(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str = "fp32", with_logits: bool = True
) -> Outputs:
    """Gather the features and logits of all processes; ``batches`` are this process's share.

    Raises :class:`DivergenceError` if a feature or logit is not finite.
    """
    features, targets, logits = [], [torch.empty(0, dtype=torch.int64)], []
    for features_batch, logits_batch, targets_batch in feature_batches(model, batches, precision):
        features.append(features_batch.cpu())
        targets.append(targets_batch.cpu())
        if with_logits:
            logits.append(logits_batch.cpu())
    outputs = Outputs(
        _gather_parts(features),
        distributed.gather_rows(torch.cat(targets)),
        _gather_parts(logits) if with_logits else None,
    )
    if not all(tensor.isfinite().all() for tensor in outputs if tensor is not None):
        raise DivergenceError(
            "the model's features or logits are not finite on some images; there is nothing to compare"
        )
    return outputs


def _gather_parts(parts: Sequence[Tensor]) -> Tensor:
    """Gather the rows of all processes' ``parts`` ([B, K] each, on the CPU); a process may have no part."""
    width = distributed.greatest(parts[0].shape[1] if parts else 0)
    return distributed.gather_rows(torch.cat([torch.empty(0, width), *parts]))


def stop_on_signal(
    batches: Collection[tuple[Tensor, Tensor]], signal: Callable[[], int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches until a process has received a signal, see :func:`predict`.

    All processes agree before each batch; processes with fewer batches still take part.
    """
    more = distributed.greatest(len(batches)) - len(batches)
    for batch in itertools.chain(batches, [None] * more):
        stop = distributed.greatest(signal())
        if stop:
            raise Interrupted(stop)
        if batch is not None:
            yield batch


def predict_batch(logits: Tensor, targets: Tensor) -> Predictions:
    """Compute predictions from ``logits`` [B, C] of any precision, on their device."""
    log_probs = F.log_softmax(logits.float(), dim=1)  # [B, C]
    top = log_probs.topk(min(5, logits.shape[1]), dim=1)
    return Predictions(
        classes=top.indices[:, 0],
        confidences=top.values[:, 0].exp(),
        top5_hits=(top.indices == targets[:, None]).any(dim=1),
        nll=F.nll_loss(log_probs, targets, reduction="none"),
        targets=targets,
    )


def _no_predictions(device: torch.device) -> Predictions:
    """Empty predictions, for processes without a batch."""
    kinds = (torch.int64, torch.float32, torch.bool, torch.float32, torch.int64)
    return Predictions(*(torch.empty(0, dtype=kind, device=device) for kind in kinds))


class Evaluation(NamedTuple):
    """Metrics of an epoch and the predictions behind them."""

    # Of the epoch's row: "test", "halves", with held-out images "val", with averaged weights "ema" (on the test set);
    # see utils.metrics.report.
    entries: dict
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
    average: nn.Module | None = None,
) -> Evaluation:
    """Evaluate the bare model, with rank 0's batch-norm statistics on every rank; see :func:`predict`.

    ``average``: the model with averaged weights.
    """
    distributed.broadcast_buffers(model)
    predictions = predict(model, test, precision, signal, shift)
    entries = {"test": report(predictions, class_counts, groups), "halves": half_accuracies(predictions)}
    if held_out is not None:
        entries["val"] = report(predict(model, held_out, precision, signal, shift), class_counts, groups)
    if average is not None:
        distributed.broadcast_buffers(average)
        entries["ema"] = report(predict(average, test, precision, signal, shift), class_counts, groups)
    return Evaluation(entries, predictions)
