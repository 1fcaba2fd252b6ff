"""Losses for long-tailed recognition, as pure functions in log space.

This file needs PyTorch alone, so it can be copied into any project.

Legend: B samples, C classes, T targets of each sample (two under mixup), n_k the count of class k in the batch or in
the training set (0: absent). ARB-Loss is cross-entropy with log n added to the logits (Xie et al., Neurocomputing 527,
2023, eq. 14):

    L(z, y) = -log( exp(z_y) / sum_k (n_k / n_y) exp(z_k) ) = -log_softmax(z + log n)_y

A class with n_k = 0 has log n_k = -inf and drops out of the sum exactly. Half-precision logits are raised to float32
first; float32 and float64 stay as they are.

:func:`arb_loss`, :class:`ARBLoss` and :func:`label_aware_smoothing` are for any training loop. The per-sample losses
above them map ``logits [B, C]`` and ``targets [T, B]`` to [T, B]: all targets of a sample share one log-softmax. A
target of -100 has loss 0 where the loss is made of log-probabilities, as in :func:`torch.nn.functional.nll_loss`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTIONS = ("none", "mean", "sum")


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def log_probabilities(
    logits: Tensor, class_counts: Tensor | None = None, clamp: float | None = None, tau: float = 1.0
) -> Tensor:
    """Log-softmax of ``clamp(logits) + tau log n``, [B, C], in at least float32.

    ``clamp``: bound of the logits' absolute value, from which on the gradient is zero. Absent classes stay absent at
    every ``tau``, 0 included.
    """
    logits = _at_least_float32(logits)
    if clamp is not None:
        # torch.clamp's mask would make the whole loss take half as long again. Only at exactly +-clamp the gradients
        # differ: 0 here, 1 there.
        logits = F.hardtanh(logits, -clamp, clamp)
    if class_counts is not None:
        counts = class_counts.to(logits.device, torch.float64)
        logits = logits + torch.where(counts > 0, tau * counts.log(), -torch.inf).to(logits.dtype)
    return F.log_softmax(logits, dim=1)


def count_classes(targets: Tensor, num_classes: int, ignore_index: int = -100) -> Tensor:
    """Labels per class, int64 [C]. Unlike ``bincount`` it does not synchronise with the device."""
    counted = targets.flatten() != ignore_index
    labels = torch.where(counted, targets.flatten(), 0)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=targets.device)
    return counts.scatter_add_(0, labels, counted.to(torch.int64))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    return torch.stack([F.nll_loss(log_probs, y, reduction="none") for y in targets])


# ---------------------------------------------------------------------------------------------------------------------
# Per-sample losses: logits [B, C], targets [T, B] -> [T, B]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p_y``."""
    return _nll(log_probabilities(logits), targets)


def arb(logits: Tensor, targets: Tensor, class_counts: Tensor, clamp: float | None = 30.0, tau: float = 1.0) -> Tensor:
    """ARB-Loss with counts n^tau; with the training set's counts, tau 1 and no clamp it is Balanced Softmax."""
    return _nll(log_probabilities(logits, class_counts, clamp, tau), targets)


def focal_arb(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    clamp: float | None = 30.0,
    focal_alpha: float = 1.0,
    focal_gamma: float = 2.0,
) -> Tensor:
    """``-alpha (1 - p_y)^gamma log p_y`` of ARB's probabilities p (a variant in the released code)."""
    nll = arb(logits, targets, class_counts, clamp)
    miss = -torch.expm1(-nll)  # 1 - p, without cancellation for p near 1
    # A power below 1 has an infinite slope at 0, where a label that is certain would turn the gradient into NaN.
    return focal_alpha * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** focal_gamma * nll


def weighted_arb(logits: Tensor, targets: Tensor, class_counts: Tensor, clamp: float | None = 30.0) -> Tensor:
    """``-omega_y log p_y``, omega_y = (mean count of the classes present) / n_y (a variant in the released code).

    Corrects the prior twice: in the probabilities, and again by the weights (with batch counts in part, see EXACT.md).
    """
    counts = class_counts.to(torch.promote_types(logits.dtype, torch.float32))
    omega = torch.where(counts > 0, counts.sum() / (counts > 0).sum() / counts, 0.0)
    return omega[targets] * arb(logits, targets, class_counts, clamp)


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
    """``(1 - e_y) nll + e_y mean_k(-log p_k)``, e = ``smoothing [C]`` (MiSLAS, Zhong et al., CVPR 2021).

    Of plain probabilities only. With ARB's it would pull towards uniform *adjusted* probabilities, which moves
    decisions to rare classes, and be infinite for classes absent from the batch.
    """
    log_probs = log_probabilities(logits)
    uniform = -log_probs.mean(dim=1)
    share = smoothing.to(log_probs.device, log_probs.dtype)[targets]
    return (1 - share) * _nll(log_probs, targets) + share * uniform


def logit_adjustment(logits: Tensor, targets: Tensor, prior: Tensor, tau: float = 1.0) -> Tensor:
    """Cross-entropy of ``z + tau log prior`` (Menon et al., ICLR 2021); tau 1 is Balanced Softmax (Ren et al., 2020).

    ``prior [C]``: of the training set, up to a factor.
    """
    return _nll(log_probabilities(logits, prior, tau=tau), targets)


def ldam(logits: Tensor, targets: Tensor, margins: Tensor, cosine_scale: float = 30.0) -> Tensor:
    """Cross-entropy with ``scale * (cos - margin_y)`` as the label's logit (LDAM, Cao et al., NeurIPS 2019).

    ``logits`` are ``scale * cos``, those of a cosine classifier; ``margins [C]``: see :func:`ldam_margins`.
    """
    logits = _at_least_float32(logits)
    margins = cosine_scale * margins.to(logits.device, logits.dtype)
    lowered = (logits.scatter_add(1, y[:, None], -margins[y][:, None]) for y in targets)
    return torch.stack([F.cross_entropy(z, y, reduction="none") for z, y in zip(lowered, targets, strict=True)])


def dot_regression(logits: Tensor, targets: Tensor) -> Tensor:
    """``0.5 (z_y - 1)^2`` (Yang et al., NeurIPS 2022), where logits are cosines with the rows of a fixed simplex.

    The other classes' logits are not in it, so the classifier must not learn.
    """
    return 0.5 * (_at_least_float32(logits).gather(1, targets.T).T - 1).square()


# ---------------------------------------------------------------------------------------------------------------------
# For any training loop


def arb_loss(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    reduction: str = "mean",
    clamp: float | None = 30.0,
    ignore_index: int = -100,
) -> Tensor:
    """ARB-Loss (Xie et al. 2023, eq. 14).

    Args:
        logits: [B, C], or dense [B, C, H, W].
        targets: int64 [B], or [B, H, W]; entries equal to ``ignore_index`` have no label and loss 0.
        class_counts: [C], any real dtype, of the batch or of the training set; 0 = absent. The loss of a label whose
            class is absent is infinite, as in eq. 14; counts that are all 0 mean no prior.
        reduction: "mean" (over labelled entries; 0 without any), "sum" or "none" (shape of ``targets``).
        clamp: 30 is the released code; None is eq. 14 as printed.
    """
    _check_reduction(reduction)
    if class_counts.shape != logits.shape[1:2]:
        raise ValueError(f"class_counts: shape {tuple(class_counts.shape)} does not fit {logits.shape[1]} classes")
    if targets.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"targets: shape {tuple(targets.shape)} does not fit logits of shape {tuple(logits.shape)}")
    # A batch without a label has no class at all: the softmax over none would be NaN.
    class_counts = torch.where((class_counts > 0).any(), class_counts, torch.ones_like(class_counts))
    ignored = targets == ignore_index
    flat = logits.movedim(1, -1).flatten(0, -2)  # [B H W, C]
    losses = arb(flat, targets.masked_fill(ignored, -100).reshape(1, -1), class_counts, clamp).view_as(targets)
    return _reduce(losses, reduction, (~ignored).sum())


class ARBLoss(nn.Module):
    """:func:`arb_loss` as a module; ``class_counts=None``: each batch's own counts (the paper's CIFAR protocol)."""

    def __init__(
        self,
        class_counts: Tensor | Sequence[float] | None = None,
        reduction: str = "mean",
        clamp: float | None = 30.0,
        ignore_index: int = -100,
    ):
        super().__init__()
        self.register_buffer("class_counts", None if class_counts is None else torch.as_tensor(class_counts))
        self.reduction, self.clamp, self.ignore_index = reduction, clamp, ignore_index

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        counts = self.class_counts
        if counts is None:
            counts = count_classes(targets, logits.shape[1], self.ignore_index)
        return arb_loss(logits, targets, counts, self.reduction, self.clamp, self.ignore_index)


def label_aware_smoothing(logits: Tensor, targets: Tensor, smoothing: Tensor, reduction: str = "mean") -> Tensor:
    """Label-aware smoothing (MiSLAS): ``logits [B, C]``, ``targets [B]``, ``smoothing [C]`` in [0, 1]."""
    _check_reduction(reduction)
    losses = smoothed_cross_entropy(logits, targets[None], smoothing)[0]
    return _reduce(losses, reduction, torch.tensor(len(targets)))


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; known are {', '.join(REDUCTIONS)}")


def _reduce(losses: Tensor, reduction: str, count: Tensor) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Values per class, float32 [C], from the counts of the training set


def smoothing_by_count(
    class_counts: Tensor | Sequence[float],
    smooth_head: float,
    smooth_tail: float,
    shape: str = "concave",
    power: float | None = None,
) -> Tensor:
    """Label smoothing, from ``smooth_tail`` for the rarest class to ``smooth_head`` for the most frequent one.

    With r = (n_y - n_min) / (n_max - n_min) in [0, 1]: concave sin(pi r / 2), linear r,
    convex 1 + sin(pi r / 2 - pi / 2), exp r^power (MiSLAS, eq. 7-9 and its code).
    Equal counts: ``smooth_head`` for all.
    """
    shapes = {
        "concave": lambda r: torch.sin(r * math.pi / 2),
        "linear": lambda r: r,
        "convex": lambda r: 1 + torch.sin((r - 1) * math.pi / 2),
        "exp": lambda r: r**power,
    }
    if shape not in shapes:
        raise ValueError(f"shape: {shape!r} is unknown; known are {', '.join(shapes)}")
    if shape == "exp" and power is None:
        raise ValueError("shape: exp needs a power, such as 2.0")
    counts = torch.as_tensor(class_counts).double()
    low, high = counts.min(), counts.max()
    rank = (counts - low) / (high - low) if high > low else torch.ones_like(counts)
    return (smooth_tail + (smooth_head - smooth_tail) * shapes[shape](rank)).float()


def class_prior(class_counts: Tensor | Sequence[float]) -> Tensor:
    """``n / N``."""
    counts = torch.as_tensor(class_counts)
    return counts / counts.sum()


def ldam_margins(class_counts: Tensor | Sequence[float], max_margin: float = 0.5) -> Tensor:
    """LDAM's margins n^(-1/4), scaled such that the rarest class has ``max_margin``; 0 for absent classes."""
    counts = torch.as_tensor(class_counts).double()
    margins = torch.where(counts > 0, counts.clamp(min=1e-300) ** -0.25, 0.0)
    return (max_margin * margins / margins.max()).float()


def drw_weights(class_counts: Tensor | Sequence[float], beta: float = 0.9999) -> Tensor:
    """Weights (1 - beta) / (1 - beta^n) of deferred re-weighting, scaled to sum C; 0 for absent classes.

    The inverse of a class's effective number of samples (Cao et al., NeurIPS 2019). ``beta`` 0 weights all classes
    alike, 1 by 1 / n, its limit. On top of a loss that has the prior in it (ARB-Loss, logit adjustment) the weights
    correct it a second time.
    """
    counts = torch.as_tensor(class_counts).double()
    effective = counts if beta == 1 else (1 - beta**counts) / (1 - beta)
    weights = torch.where(counts > 0, 1 / effective, 0.0)
    return (len(counts) * weights / weights.sum()).float()


def post_hoc_shift(class_counts: Tensor | Sequence[float], tau: float) -> Tensor:
    """``tau log(n / N)``, which post-hoc logit adjustment subtracts from the logits (Menon et al., ICLR 2021).

    For networks trained with plain cross-entropy: a loss that has the prior in it (ARB-Loss, logit adjustment) has
    corrected it already. A class without training images counts as one with a single image: its prior 0 would win every
    image.
    """
    counts = torch.as_tensor(class_counts).double()
    return (tau * (counts.clamp(min=1) / counts.sum()).log()).float()
