"""Representation or classifier? Compare the model's classifier with others on the same features.

Errors on rare classes come from features that do not separate them, or from a classifier that does not use the features
well (Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020). From row to row
more of the classifier is replaced; the features stay the same.

Legend: N training samples, M test samples, D features, C classes. Accuracies are percent.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from methods.losses import post_hoc_shift
from methods.neural_collapse import class_sums
from utils.evaluation import Outputs, predict_batch
from utils.files import write_text
from utils.metrics import Predictions, class_accuracy, cross_fitted, half_accuracies, halves, shot_accuracy
from utils.report.text import table

TAUS = tuple(step / 10 for step in range(-10, 21))
MAX_CLASSES = 1000  # for logistic regression, whose time grows with N, D and C: beyond that it takes hours
# scikit-learn's C and max_iter. Fixed, since tuning them on the test set would bias the row. On features of CIFAR-10-LT
# (one epoch) L-BFGS converges in 150 iterations with C 0.1, and not in 300 with C 1.
INVERSE_PENALTY = 0.1
MAX_ITERATIONS = 1000
SMALL = 10**9  # N x D x C up to which several threads are slower than one
ROWS = 1000  # samples at a time, so that intermediate [ROWS, C] tensors stay small

MODEL = "model"
ADJUSTED = "logit adjustment, post hoc"
NEAREST_MEAN = "nearest class mean"
REFIT = "classifier refit, class-balanced"
PROBE = "linear probe between test halves (diagnostic)"


class Decomposition(NamedTuple):
    """The result of :func:`decompose`, by the groups of one rule; groups without tested classes are absent."""

    tau: dict[str, list[float]]  # "values"; at each of them "top1", "many", "medium", "few"; "best": see decompose
    rows: dict[str, dict[str, float]]  # label -> "top1", "many", "medium", "few"
    notes: list[str]  # what is left out or not reliable


def decompose(train: Outputs, test: Outputs, class_counts: Tensor, groups: Mapping[str, Tensor]) -> Decomposition:
    """Score all classifiers on ``test``; deterministic.

    ``train`` needs no logits. ``class_counts``: training images per class, int64 [C]; ``groups``: masks [C]. Logit
    adjustment is cross-fitted: each half of the test set (:func:`utils.metrics.halves`) is predicted with the tau that
    is best on the other half (the smallest of equals); ``tau["best"]`` is [the first half's choice, the second's].
    """
    second = halves(test.targets)
    curve = [adjusted(test, class_counts, tau) for tau in TAUS]
    first_choice, second_choice = cross_fitted([half_accuracies(predictions) for predictions in curve])[1]
    classes = {
        MODEL: curve[TAUS.index(0)].classes,
        ADJUSTED: torch.where(second, curve[first_choice].classes, curve[second_choice].classes),
        NEAREST_MEAN: nearest_mean_classes(train, test.features, len(class_counts)),
    }
    logistic, notes = _logistic_rows(train, test, second, len(class_counts))
    if not second.any():
        notes.append(f"{ADJUSTED}: one test image per class cannot be halved, so tau is scored where it was chosen")
    rows = {label: _scores(found, test.targets, groups) for label, found in (classes | logistic).items()}
    points = [_scores(predictions.classes, test.targets, groups) for predictions in curve]
    tau = {
        "values": list(TAUS),
        **{key: [point[key] for point in points] for key in points[0]},
        "best": [TAUS[first_choice], TAUS[second_choice]],
    }
    return Decomposition(tau, rows, notes)


def _scores(classes: Tensor, targets: Tensor, groups: Mapping[str, Tensor]) -> dict[str, float]:
    accuracy, totals = class_accuracy(classes, targets, len(next(iter(groups.values()))))
    return {"top1": 100 * float((classes == targets).double().mean()), **shot_accuracy(100 * accuracy, totals, groups)}


def adjusted(test: Outputs, class_counts: Tensor, tau: float) -> Predictions:
    """Predict from logits less :func:`methods.losses.post_hoc_shift`; with ``tau`` 0 these are the model's own."""
    shift = post_hoc_shift(class_counts, tau)
    parts = [
        predict_batch(logits - shift, targets)
        for logits, targets in zip(test.logits.split(ROWS), test.targets.split(ROWS), strict=True)
    ]
    return Predictions(*(torch.cat(field) for field in zip(*parts, strict=True)))


def nearest_mean_classes(train: Outputs, features: Tensor, num_classes: int) -> Tensor:
    """Return the class [M] whose mean training feature is nearest (Euclidean) to each of ``features`` [M, D].

    Classes without training images are never chosen.
    """
    zeros = torch.zeros(num_classes, features.shape[1])
    counts, sums = class_sums(lambda: [(train.features, train.targets)], zeros)
    means = sums / counts.clamp(min=1)[:, None]
    squares = means.square().sum(dim=1).masked_fill(counts == 0, torch.inf)
    return torch.cat([(squares - 2 * part.double() @ means.T).argmin(dim=1) for part in features.split(ROWS)])


def logistic_classes(features: Tensor, targets: Tensor, others: Tensor, balanced: bool = False) -> tuple[Tensor, bool]:
    """Fit multinomial logistic regression on ``features`` [N, D] and predict the classes [M] of ``others`` [M, D].

    Features are standardised with the statistics of ``features``. ``balanced``: weigh samples inversely to their
    class's count in ``targets`` [N], which needs at least two classes. Also returns whether the fit converged.
    """
    # Imported here: scikit-learn takes a second to load, which other evaluations need not wait for.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    weight = "balanced" if balanced else None
    regression = LogisticRegression(C=INVERSE_PENALTY, class_weight=weight, max_iter=MAX_ITERATIONS)
    classifier = make_pipeline(StandardScaler(), regression)
    threads = 1 if features.numel() * len(targets.unique()) <= SMALL else None  # None: all
    with threadpool_limits(threads), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(features.numpy(), targets.numpy())
        classes = classifier.predict(others.numpy())
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return torch.from_numpy(classes), converged


def _logistic_rows(
    train: Outputs, test: Outputs, second: Tensor, num_classes: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Return (label -> classes [M], notes) of the rows that use logistic regression."""
    if num_classes > MAX_CLASSES:
        return {}, [f"{label}: left out, {num_classes} classes would take hours" for label in (REFIT, PROBE)]
    everything = torch.ones_like(second)
    fits = {
        REFIT: [(train.features, train.targets, everything, True)],
        PROBE: [(test.features[half], test.targets[half], ~half, False) for half in (~second, second)],
    }
    rows, notes = {}, []
    for label, parts in fits.items():
        if any(len(targets.unique()) < 2 for _, targets, _, _ in parts):
            notes.append(f"{label}: left out, it needs training samples of at least two classes")
            continue
        rows[label] = torch.empty_like(test.targets)
        for features, targets, scored, balanced in parts:
            rows[label][scored], converged = logistic_classes(features, targets, test.features[scored], balanced)
            if not converged:
                notes.append(f"{label}: not converged after {MAX_ITERATIONS} iterations, scored as it is")
    return rows, list(dict.fromkeys(notes))


def decomposition_text(decomposition: Decomposition) -> str:
    """Format the table, the best taus and the notes."""
    first, second = decomposition.tau["best"]
    return "\n".join(
        [
            "other classifiers on the same features:",
            table(decomposition.rows),
            f"tau of logit adjustment: {first:g} chosen on the test set's first half, {second:g} on its second, each "
            f"scored on the other (tried: {TAUS[0]:g} to {TAUS[-1]:g}; 0 is the model)",
            *(f"note: {note}" for note in decomposition.notes),
        ]
    )


def write_decomposition(folder: Path, decomposition: Decomposition) -> None:
    """Write the fields of ``decomposition`` to ``decomposition.json``."""
    write_text(folder / "decomposition.json", json.dumps(decomposition._asdict(), indent=2) + "\n")
