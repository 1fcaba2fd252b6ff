"""The losses, as pure functions in log space.

Legend: B samples, C classes, n_k the count of class k (of the batch or of the training set; 0 = absent). Every loss
reads log-probabilities [B, C]; ARB-Loss differs from cross-entropy only in adding log n to the logits first
(Xie et al., Neurocomputing 527, 2023, eq. 14):

    L(z, y) = -log( exp(z_y) / sum_k (n_k / n_y) exp(z_k) ) = -log_softmax(z + log n)_y

A class with n_k = 0 has log n_k = -inf and drops out of the sum, exactly. Half-precision logits are raised to float32
before anything else; float32 and float64 stay as they are.

The ``*_terms`` functions are what training composes: ``arb_terms(logits, counts)(targets)`` gives the loss of every
sample for T targets of each, ``targets [T, B]`` -> [T, B], so that both targets of mixup share all other work.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.fused import fused_nll

Terms = Callable[[Tensor], Tensor]  # targets [T, B] -> losses [T, B]

FUSED_ABOVE = 1000  # classes

REDUCTIONS = ("none", "mean", "sum")


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over dimension 1 in at least float32."""
    return F.log_softmax(_at_least_float32(logits), dim=1)


def arb_log_probabilities(logits: Tensor, class_counts: Tensor, clamp: float | None = 30.0, tau: float = 1.0) -> Tensor:
    """Log of ARB's adjusted probabilities: log_softmax(clamp(z) + tau log n) over dimension 1, ``logits [B, C, ...]``.

    ``clamp``: the released code clamps logits to +-30 (beyond, the gradient is zero); None leaves them (eq. 14).
    ``tau``: 1 is ARB-Loss; absent classes stay absent at every tau, 0 included. Where every class is absent (a dense
    batch without one labelled pixel) there is no prior to add and none is.
    """
    logits = _at_least_float32(logits)
    if clamp is not None:
        logits = logits.clamp(-clamp, clamp)
    log_counts = _log_counts(class_counts, logits, tau)
    return F.log_softmax(logits + log_counts.reshape(-1, *[1] * (logits.dim() - 2)), dim=1)


def negative_log_likelihoods(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor | None = None,
    clamp: float | None = None,
    ignore_index: int = -100,
    tau: float = 1.0,
) -> Tensor:
    """``-log p_y`` of ARB's adjusted probabilities (without counts: of the plain ones), [T, B, ...], 0 where ignored.

    ``logits [B, C, ...]``, ``targets [T, B, ...]``. Rows of many classes take the fused form: the same numbers, sooner.
    """
    if logits.dim() == 2 and logits.shape[1] > FUSED_ABOVE:
        labelled = targets != ignore_index
        log_counts = None if class_counts is None else _log_counts(class_counts, logits, tau)
        return torch.where(labelled, fused_nll(logits, torch.where(labelled, targets, 0), log_counts, clamp), 0.0)
    if class_counts is None:
        log_probs = log_probabilities(logits)
    else:
        log_probs = arb_log_probabilities(logits, class_counts, clamp, tau)
    return _picked(log_probs, targets, ignore_index)


def count_classes(targets: Tensor, num_classes: int, ignore_index: int = -100) -> Tensor:
    """Labels per class, int64 [C]; never waits for the device, as ``bincount`` does."""
    counted = targets.flatten() != ignore_index
    labels = torch.where(counted, targets.flatten(), 0)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=targets.device)
    return counts.scatter_add_(0, labels, counted.to(torch.int64))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _log_counts(class_counts: Tensor, logits: Tensor, tau: float = 1.0) -> Tensor:
    """``tau log n``; -inf for absent classes."""
    counts = class_counts.to(logits.device, torch.float64)
    log_counts = torch.where(counts > 0, tau * counts.log(), -torch.inf)
    log_counts = torch.where((class_counts > 0).any(), log_counts, 0.0)
    return log_counts.to(torch.promote_types(logits.dtype, torch.float32))


def _picked(log_probs: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """``-log p_y``: ``log_probs [B, C, ...]``, ``targets [T, B, ...]`` -> [T, B, ...]."""
    return torch.stack([F.nll_loss(log_probs, y, ignore_index=ignore_index, reduction="none") for y in targets])


# ---------------------------------------------------------------------------------------------------------------------
# Per-sample losses


def ce_terms(logits: Tensor, class_counts: Tensor) -> Terms:
    """Cross-entropy; the counts are not read."""
    return lambda targets: negative_log_likelihoods(logits, targets)


def arb_terms(logits: Tensor, class_counts: Tensor, clamp: float | None = 30.0, tau: float = 1.0) -> Terms:
    """ARB-Loss, eq. 14, with counts n ** tau; with global counts, tau 1 and no clamp it is Balanced Softmax."""
    return lambda targets: negative_log_likelihoods(logits, targets, class_counts, clamp, tau=tau)


def focal_arb_terms(
    logits: Tensor, class_counts: Tensor, clamp: float | None = 30.0, alpha: float = 1.0, gamma: float = 2.0
) -> Terms:
    """``-alpha (1 - p)^gamma log p`` over ARB's adjusted probabilities p (a variant in the released code)."""

    def terms(targets: Tensor) -> Tensor:
        nll = negative_log_likelihoods(logits, targets, class_counts, clamp)
        miss = -torch.expm1(-nll)  # 1 - p, without cancellation for p near 1
        # A power below 1 has an infinite slope at 0, where a sample that cannot be missed would turn it into NaN.
        return alpha * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** gamma * nll

    return terms


def weighted_arb_terms(logits: Tensor, class_counts: Tensor, clamp: float | None = 30.0) -> Terms:
    """``-omega_y log p``, omega_y = (sum of counts / number of classes present) / n_y (a variant in the released code).

    Corrects the prior twice: the adjusted probabilities do it already, the weights do it again (with batch counts in
    part, see EXACT.md).
    """
    counts = class_counts.to(torch.promote_types(logits.dtype, torch.float32))
    omega = torch.where(counts > 0, counts.sum() / (counts > 0).sum() / counts, 0.0)
    return lambda targets: omega[targets] * negative_log_likelihoods(logits, targets, class_counts, clamp)


def smoothing_terms(logits: Tensor, class_counts: Tensor, smoothing: Tensor) -> Terms:
    """``(1 - e_y) nll + e_y mean_k(-log p_k)``, e = ``smoothing [C]`` (MiSLAS, Zhong et al., CVPR 2021).

    Over plain probabilities only. Over ARB's it would pull towards uniform *adjusted* probabilities, which moves
    decisions to rare classes, and be infinite for classes absent from the batch; the configuration refuses that.
    """
    log_probs = log_probabilities(logits)
    smoothing = smoothing.to(log_probs.device, log_probs.dtype)
    uniform = -log_probs.mean(dim=1)

    def terms(targets: Tensor) -> Tensor:
        share = smoothing[targets]
        return (1 - share) * _picked(log_probs, targets) + share * uniform

    return terms


def logit_adjustment_terms(logits: Tensor, class_counts: Tensor, prior: Tensor, tau: float = 1.0) -> Terms:
    """Cross-entropy on ``z + tau log prior`` (Menon et al., ICLR 2021); tau 1 is Balanced Softmax (Ren et al., 2020).

    ``prior [C]`` is the training set's, up to a factor, whatever the step's counts are: ``class_counts`` is not read.
    """
    return lambda targets: negative_log_likelihoods(logits, targets, prior, tau=tau)


def ldam_terms(logits: Tensor, class_counts: Tensor, margins: Tensor, scale: float = 30.0) -> Terms:
    """Cross-entropy where the label's logit is ``scale * (cos - margin_y)`` (LDAM, Cao et al., NeurIPS 2019).

    ``logits`` are ``scale * cos``, those of a cosine classifier; ``margins [C]``: see :func:`ldam_margins`. The counts
    of the step are not read.
    """
    logits = _at_least_float32(logits)
    margins = scale * margins.to(logits.device, logits.dtype)

    def terms(targets: Tensor) -> Tensor:
        handicapped = (logits.scatter_add(1, y[:, None], -margins[y][:, None]) for y in targets)
        pairs = zip(handicapped, targets, strict=True)
        return torch.stack([F.cross_entropy(z, y, reduction="none") for z, y in pairs])

    return terms


def dot_regression_terms(logits: Tensor, class_counts: Tensor) -> Terms:
    """``0.5 (z_y - 1)^2`` (Yang et al., NeurIPS 2022): logits are the features' cosines with a fixed simplex's rows.

    Of no use where the classifier learns: the other classes' logits are not in it.
    """
    logits = _at_least_float32(logits)
    return lambda targets: 0.5 * (logits.gather(1, targets.T).T - 1).square()


# ---------------------------------------------------------------------------------------------------------------------
# One call


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
        targets: int64 [B], or [B, H, W]; ``ignore_index`` marks entries without a label.
        class_counts: [C], any real dtype, of the batch or of the training set; 0 = absent. A class that occurs among
            the targets must be present: with count 0 its loss is infinite, as eq. 14 has it.
        reduction: "mean" (over labelled entries; 0 where there are none), "sum" or "none" (shape of ``targets``).
        clamp: 30 is the released code; None is eq. 14 as printed.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; known are {', '.join(REDUCTIONS)}")
    if class_counts.shape != logits.shape[1:2]:
        raise ValueError(f"class_counts: shape {tuple(class_counts.shape)} does not fit {logits.shape[1]} classes")
    losses = negative_log_likelihoods(logits, targets[None], class_counts, clamp, ignore_index)[0]
    return _reduce(losses, reduction, (targets != ignore_index).sum())


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
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; known are {', '.join(REDUCTIONS)}")
    losses = smoothing_terms(logits, torch.ones_like(smoothing), smoothing)(targets[None])[0]
    return _reduce(losses, reduction, torch.tensor(len(targets)))


def _reduce(losses: Tensor, reduction: str, count: Tensor) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers per class, from the counts of the training set


def smoothing_by_count(
    class_counts: Tensor | Sequence[float],
    smooth_head: float,
    smooth_tail: float,
    shape: str = "concave",
    power: float | None = None,
) -> Tensor:
    """Smoothing e_y per class, float32 [C], from ``smooth_tail`` (rarest) to ``smooth_head`` (most frequent).

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


def ldam_margins(class_counts: Tensor | Sequence[float], max_margin: float = 0.5) -> Tensor:
    """LDAM's margins n^(-1/4), scaled such that the rarest class has ``max_margin``; float32 [C].

    An absent class has none: it is never a label.
    """
    counts = torch.as_tensor(class_counts).double()
    margins = torch.where(counts > 0, counts.clamp(min=1e-300) ** -0.25, 0.0)
    return (max_margin * margins / margins.max()).float()


def drw_weights(class_counts: Tensor | Sequence[float], beta: float = 0.9999) -> Tensor:
    """Weights (1 - beta) / (1 - beta^n), scaled to sum C; 0 for absent classes; float32 [C].

    Those of deferred re-weighting (Cao et al., NeurIPS 2019): the inverse of a class's effective number of samples.
    ``beta`` 0 weighs all classes alike, 1 by 1 / n, its limit. Over a loss that has the prior in it (ARB-Loss, logit
    adjustment) the weights correct it a second time.
    """
    counts = torch.as_tensor(class_counts).double()
    effective = counts if beta == 1 else (1 - beta**counts) / (1 - beta)
    weights = torch.where(counts > 0, 1 / effective, 0.0)
    return (len(counts) * weights / weights.sum()).float()


def post_hoc_shift(class_counts: Tensor | Sequence[float], tau: float) -> Tensor:
    """``tau log(n / N)``, float32 [C]: what post-hoc logit adjustment subtracts from the logits (Menon et al., 2021).

    It is meant for a network trained with plain cross-entropy: a loss that has the prior in it (ARB-Loss, logit
    adjustment) has corrected it already. A class without training images counts as one with a single image, as in
    :mod:`utils.report.decompose`: its prior 0 would win every image.
    """
    counts = torch.as_tensor(class_counts).double()
    return (tau * (counts.clamp(min=1) / counts.sum()).log()).float()
