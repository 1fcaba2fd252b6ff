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
import reprlib
import warnings
from collections.abc import Callable, Sequence

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
    counts = targets.new_zeros(num_classes, dtype=torch.int64)  # unlike torch.zeros, one per sample under vmap
    return counts.scatter_add_(0, labels, counted.to(torch.int64))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _nll(log_probs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    nll = torch.stack([F.nll_loss(log_probs, y, reduction="none") for y in targets])
    return nll if label_smoothing == 0 else _smoothed(nll, log_probs, label_smoothing)


def _smoothed(nll: Tensor, log_probs: Tensor, share: float | Tensor) -> Tensor:
    """``(1 - e) nll + e mean_k(-log p_k)``, e = ``share``, a number or [T, B]; infinite if any p_k is 0."""
    return (1 - share) * nll - share * log_probs.mean(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Per-sample losses: logits [B, C], targets [T, B] -> [T, B]


# ``label_smoothing`` e (Szegedy et al., CVPR 2016): (1 - e) l(y) + e / C sum_k l(k), l(k) = -log p_k of the loss's own
# probabilities, so every class needs a count above 0.


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-log p_y``."""
    return _nll(log_probabilities(logits), targets, label_smoothing)


def arb(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    clamp: float | None = 30.0,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """ARB-Loss with counts n^tau; with the training set's counts, tau 1 and no clamp it is Balanced Softmax."""
    return _nll(log_probabilities(logits, class_counts, clamp, tau), targets, label_smoothing)


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
    share = smoothing.to(log_probs.device, log_probs.dtype)[targets]
    return _smoothed(_nll(log_probs, targets), log_probs, share)


def logit_adjustment(
    logits: Tensor, targets: Tensor, prior: Tensor, tau: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of ``z + tau log prior`` (Menon et al., ICLR 2021); tau 1 is Balanced Softmax (Ren et al., 2020).

    ``prior [C]``: of the training set, up to a factor.
    """
    return _nll(log_probabilities(logits, prior, tau=tau), targets, label_smoothing)


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
    class_counts: Tensor | None = None,
    reduction: str = "mean",
    clamp: float | None = 30.0,
    ignore_index: int = -100,
) -> Tensor:
    """ARB-Loss (Xie et al. 2023, eq. 14), with the shapes of :func:`torch.nn.functional.cross_entropy`.

    Args:
        logits: [B, C], dense [B, C, H, W], or [C] of a single sample.
        targets: labels of any integer type, [B], [B, H, W] or []; those equal to ``ignore_index`` have loss 0. Or class
            probabilities, floats of the logits' shape, if ``class_counts`` are given.
        class_counts: [C], any real dtype, of the training set; None: of this batch. 0 = absent. The loss of a label
            whose class is absent is infinite, as in eq. 14; counts that are all 0 mean no prior.
        reduction: "mean" (over labelled entries; 0 without any), "sum" or "none" (one loss per label).
        clamp: 30 is the released code; None is eq. 14 as printed.

    Raises ``ValueError`` for arguments that do not fit each other and, on the CPU, for labels out of range.
    """
    _check_reduction(reduction)
    rows, labels, shape = _as_rows("arb_loss", logits, targets, ignore_index)
    soft = labels.ndim == 2
    if class_counts is None:
        if soft:
            raise ValueError("arb_loss: class probabilities have no batch counts; they need class_counts")
        class_counts = count_classes(labels, rows.shape[1])
    if class_counts.shape != rows.shape[1:]:
        raise ValueError(
            f"arb_loss: class_counts of shape {tuple(class_counts.shape)} do not fit {rows.shape[1]} classes"
        )
    class_counts = class_counts.double()
    # A batch without a label has no class at all: the softmax over none would be NaN.
    class_counts = class_counts + ~class_counts.any()
    log_probs = log_probabilities(rows, class_counts, clamp)
    if soft:
        absent = (labels == 0) & (log_probs == -torch.inf)  # 0 * inf would be NaN
        losses = -(labels.to(log_probs.dtype) * log_probs.masked_fill(absent, 0)).sum(dim=1)
        labelled = torch.ones_like(losses, dtype=torch.bool)
    else:
        losses, labelled = _nll(log_probs, labels[None])[0], labels != -100
    return _reduce(losses.view(shape), reduction, labelled)


class ARBLoss(nn.Module):
    """:func:`arb_loss` as a module; ``class_counts=None``: each batch's own counts (the paper's CIFAR protocol).

    ``class_counts`` are copied, and no conversion of the module changes their type: float16 ends at 65,504 images.
    ``load_state_dict`` replaces counts by counts; a criterion without any stays without, and the other way round, with
    a warning.

    Raises ``ValueError`` for counts that are not finite, negative or all 0. ``forward`` also does so for a label whose
    class has count 0, on the CPU; elsewhere its loss is infinite, as a check would synchronise every step.
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[float] | None = None,
        reduction: str = "mean",
        clamp: float | None = 30.0,
        ignore_index: int = -100,
    ):
        super().__init__()
        _check_reduction(reduction)
        self.register_buffer("class_counts", None if class_counts is None else _checked_counts(class_counts))
        self.reduction, self.clamp, self.ignore_index = reduction, clamp, ignore_index

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = arb_loss(logits, targets, self.class_counts, self.reduction, self.clamp, self.ignore_index)
        if self.class_counts is not None and _fails(loss, lambda: (loss < torch.inf).all()):
            # Without logits, the loss is infinite for absent classes alone.
            prior = arb_loss(torch.zeros_like(logits), targets, self.class_counts, "none", None, self.ignore_index)
            if (absent := prior.isinf()).any():
                soft = targets.is_floating_point()
                named = "a probability above 0" if soft else f"label {int(targets.long()[absent][0])}"
                raise ValueError(f"ARBLoss: {named} is of a class that has count 0 in class_counts")
        return loss

    def _apply(self, fn, recurse=True):
        counts = self.class_counts
        super()._apply(fn, recurse)
        if counts is not None and self.class_counts.dtype != counts.dtype:
            self.class_counts = counts.to(self.class_counts.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key, own = f"{prefix}class_counts", self.class_counts
        if own is None and key in state_dict:
            warnings.warn(
                "ARBLoss: the state_dict's class_counts are not used: this criterion counts each batch", stacklevel=2
            )
            state_dict = {name: value for name, value in state_dict.items() if name != key}
        elif own is not None and key not in state_dict:
            warnings.warn("ARBLoss: the state_dict has no class_counts: this criterion keeps its own", stacklevel=2)
            state_dict = {**state_dict, key: own}
        elif own is not None:  # an integer buffer would cut frequencies down to 0
            state_dict = {**state_dict, key: _checked_counts(state_dict[key])}
            self.class_counts = own.to(state_dict[key].dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def label_aware_smoothing(
    logits: Tensor, targets: Tensor, smoothing: Tensor, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """Label-aware smoothing (MiSLAS): ``smoothing [C]`` in [0, 1]; for labels as :func:`arb_loss` takes them."""
    _check_reduction(reduction)
    rows, labels, shape = _as_rows("label_aware_smoothing", logits, targets, ignore_index)
    if labels.ndim == 2:
        raise ValueError("label_aware_smoothing: targets are probabilities; it smooths labels")
    labelled = labels != -100
    losses = smoothed_cross_entropy(rows, torch.where(labelled, labels, 0)[None], smoothing)[0]
    return _reduce(losses.where(labelled, 0).view(shape), reduction, labelled)


def _as_rows(loss: str, logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, torch.Size]:
    """Logits [N, C]; labels, int64 [N], -100 if ignored, or probabilities [N, C]; the shape of the N losses."""
    class_dim = min(logits.ndim, 2) - 1
    shape = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    soft = targets.is_floating_point()
    if not logits.is_floating_point() or logits.ndim == 0 or targets.shape != (logits.shape if soft else shape):
        raise ValueError(
            f"{loss}: targets ({targets.dtype}, {tuple(targets.shape)}) do not fit logits ({logits.dtype}, "
            f"{tuple(logits.shape)}): labels are integers {tuple(shape)}, probabilities floats of the logits' shape"
        )
    classes = logits.shape[class_dim]
    rows = logits.movedim(class_dim, -1).reshape(-1, classes)
    if soft:
        return rows, targets.movedim(class_dim, -1).reshape(-1, classes), shape
    labels = targets.reshape(-1).long()
    ignored = labels == ignore_index
    if _fails(labels, lambda: torch.equal(kept := labels.masked_fill(ignored, 0), kept.clamp(0, classes - 1))):
        wrong = labels[~ignored & (labels != labels.clamp(0, classes - 1))]
        raise ValueError(f"{loss}: label {wrong[0]} is neither 0 to {classes - 1} nor ignore_index, {ignore_index}")
    return rows, labels.masked_fill(ignored, -100), shape


def _fails(tensor: Tensor, condition: Callable[[], Tensor | bool]) -> bool:
    """Whether ``condition`` is known not to hold; unknown where reading it would synchronise or break a graph."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        return not condition()
    except RuntimeError:  # under vmap it has no single value
        return False


def _checked_counts(class_counts: Tensor | Sequence[float]) -> Tensor:
    """A copy as a tensor [C]."""
    try:
        counts = torch.as_tensor(class_counts).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        counts = torch.tensor(torch.nan)
    numbers = counts.double()  # unsigned integers do not compare
    if counts.ndim != 1 or not (counts.is_meta or ((numbers >= 0) & numbers.isfinite()).all() & numbers.any()):
        given = reprlib.repr(class_counts)
        raise ValueError(f"ARBLoss: class_counts {given} are not [C] finite numbers, none negative and not all 0")
    return counts


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; known are {', '.join(REDUCTIONS)}")


def _reduce(losses: Tensor, reduction: str, labelled: Tensor) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / labelled.sum().clamp(min=1)


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
