"""Regularizers that induce neural collapse.

Legend: B samples, C classes, D features; h_i the feature of sample i, n_k the batch's count of class k, w_k the
classifier's rows, x^ = x / ||x||. Everything is computed in at least float32.

With learnable class means mu_k (Liu et al., AISTATS 2023), mu_C the mean of them:

    L = L_sup + lambda1 L_W + lambda2 L_B
    L_W = (1/C) sum_k (1/n_k) sum_{i in class k} ||h_i - mu_k||^2                  over classes in the batch
    L_B = -(1/C) sum_k min_{k' != k} arccos( cos(mu_k - mu_C, mu_k' - mu_C) )

L_W pulls features to their class's mean, L_B pushes the means apart. L_B is a function of the means alone, as in the
released code, so it acts on the features through L_W alone.

With moving averages m_k of the batches' class means, m their mean, over the c classes seen so far (formulas of ours for
the other aspects of neural collapse):

    rows apart   mean_ij (w^_i . w^_j - rho_ij)^2     rho_ii = 1, rho_ij = -1 / (C - 1)
    means apart  the same for m_k - m, c for C
    duality      mean_k (1 - cos(w_k, m_k - m))

A simplex gives 0 for each. The gradient reaches the features through the batch's share of the averages.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.losses import count_classes
from methods.space_alignment import project, slerp_amount, slerp_rows
from utils.distributed import all_reduce_sum
from utils.precision import at_least_float32
from utils.seed import generator

LARGEST_COSINE = 0.99999  # arccos has an infinite slope at +-1
MOMENTUM = 0.9  # of the moving class means


def within_class(features: Tensor, targets: Tensor, means: Tensor) -> Tensor:
    """L_W, a scalar: ``features [B, D]``, ``targets`` int64 [B], ``means [C, D]``."""
    counts = count_classes(targets, len(means))
    squares = (features - means[targets]).square().sum(dim=1)
    return (squares / counts[targets]).sum() / len(means)


def between_class(means: Tensor) -> Tensor:
    """L_B, a scalar: ``means [C, D]`` of at least two classes."""
    directions = F.normalize(means - means.mean(dim=0), dim=1)
    cosines = directions @ directions.T
    itself = torch.eye(len(means), dtype=torch.bool, device=means.device)
    nearest = cosines.masked_fill(itself, -torch.inf).amax(dim=1)  # the least angle has the largest cosine
    return -nearest.clamp(-LARGEST_COSINE, LARGEST_COSINE).arccos().mean()


class CollapseRegularizer(nn.Module):
    """``within * L_W + between * L_B``, with learnable class means that start as N(0, 1)."""

    def __init__(self, num_classes: int, feature_width: int, within: float, between: float, seed: int = 0):
        """``within``: lambda1, above 0; ``between``: lambda2. The means depend on ``seed`` alone, on every process."""
        super().__init__()
        start = generator(seed, 0, "class means").standard_normal((num_classes, feature_width))
        self.means = nn.Parameter(torch.from_numpy(start).float())
        self.within, self.between = within, between

    def forward(self, features: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        """``features [B, D]``; ``labels`` int64 [T, B]; ``shares [T]``: lam and 1 - lam under mixup, else 1.

        Under mixup L_W is mixed as the loss is, each label with its own counts; the paper does not say.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features)
            parts = [within_class(features, y, self.means) for y in labels]
            pull = sum(share * part for share, part in zip(shares, parts, strict=True))
            if self.between == 0:
                return self.within * pull
            return self.within * pull + self.between * between_class(self.means)


# ---------------------------------------------------------------------------------------------------------------------
# Moving class means


def rows_apart(rows: Tensor) -> Tensor:
    """Squared distance of the cosines between ``rows [C, D]`` from those of a simplex, a scalar."""
    return _apart(F.normalize(rows, dim=1), torch.ones_like(rows[:, 0], dtype=torch.bool))


def means_apart(means: Tensor, seen: Tensor) -> Tensor:
    """:func:`rows_apart` of the centred ``means [C, D]`` of the classes that are ``seen``, bool [C]."""
    return _apart(F.normalize(centred(means, seen), dim=1), seen)


def duality(rows: Tensor, means: Tensor, seen: Tensor) -> Tensor:
    """1 - cosine between ``rows [C, D]`` and centred ``means [C, D]``, mean over the classes ``seen``, bool [C]."""
    return _mean_over(seen, 1 - F.cosine_similarity(rows, centred(means, seen), dim=1))


def centred(means: Tensor, seen: Tensor) -> Tensor:
    """``means [C, D]`` minus the mean of the means ``seen``, bool [C]; 0 for the others."""
    center = torch.where(seen[:, None], means, 0).sum(dim=0) / seen.sum().clamp(min=1)
    return torch.where(seen[:, None], means - center, 0)


def _apart(directions: Tensor, seen: Tensor) -> Tensor:
    itself = torch.eye(len(seen), dtype=torch.bool, device=seen.device)
    others = (seen.sum() - 1).clamp(min=1).to(directions.dtype)
    ideal = torch.where(itself, 1.0, -1 / others)
    return _mean_over(seen[:, None] & seen, (directions @ directions.T - ideal).square())


def _mean_over(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


class MovingMeans(nn.Module):
    """A moving average of the batches' class means, equal on all processes; checkpoints hold it."""

    def __init__(self, num_classes: int, feature_width: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(num_classes, feature_width))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, features: Tensor, labels: Tensor, shares: Tensor, part: float = 1.0) -> tuple[Tensor, Tensor]:
        """Take in a batch; return the means [C, D], with gradients, and the classes seen so far, bool [C].

        The first batch of a class sets its mean; classes absent from the batch keep theirs, and so do all whose
        features are not finite.

        Args:
            features: [B, D].
            labels: int64 [T, B].
            shares: [T], what a feature counts for each of its labels: lam and 1 - lam under mixup, else 1.
            part: this process's share of the step's images; 0: its features do not count. Gradients are divided by
                it: averaged over processes with these shares as weights, they are those of one process.
        """
        rows = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        own = rows.new_zeros(len(self.means), rows.shape[1])  # sums of features, and counts
        for targets, share in zip(labels, shares, strict=True) if part else ():
            own = own.index_add(0, targets, share * rows)
        total = all_reduce_sum(own.detach().clone()) + (own - own.detach()) / (part or 1.0)
        sums, counts = total[:, :-1], total[:, -1:].detach()
        present = (counts > 0) & total.isfinite().all(dim=1, keepdim=True)
        batch = sums / counts.clamp(min=torch.finfo(counts.dtype).tiny)
        step = 1 - MOMENTUM * self.seen[:, None].to(batch.dtype)
        means = torch.where(present, self.means + step * (batch - self.means), self.means)
        seen = self.seen | present.squeeze(1)
        with torch.no_grad():
            self.means.copy_(means)
            self.seen.copy_(seen)
        return means, seen


class CollapseGeometry(nn.Module):
    """``nc_rows * rows_apart + nc_means * means_apart + nc_dual * duality``, and space alignment, each off at 0."""

    def __init__(
        self,
        num_classes: int,
        feature_width: int,
        nc_rows: float = 0.0,
        nc_means: float = 0.0,
        nc_dual: float = 0.0,
        spa: str | None = None,
        spa_gamma: float = 0.6,
        spa_step: float = 0.02,
        num_epochs: int = 1,
    ):
        """``spa``: "proj", "slerp" or None, see :mod:`methods.space_alignment`; ``num_epochs``: of its schedule."""
        super().__init__()
        self.nc_rows, self.nc_means, self.nc_dual = nc_rows, nc_means, nc_dual
        self.spa, self.spa_gamma, self.spa_step, self.num_epochs = spa, spa_gamma, spa_step, num_epochs
        has_means = nc_means > 0 or nc_dual > 0 or spa is not None
        self.moving = MovingMeans(num_classes, feature_width) if has_means else None
        # On the device: a CUDA graph reads it.
        self.register_buffer("amount", torch.zeros(()) if spa == "slerp" else None, persistent=False)

    @property
    def is_on(self) -> bool:
        return self.moving is not None or self.nc_rows > 0

    def start_epoch(self, epoch: int) -> None:
        if self.amount is not None:
            self.amount.fill_(slerp_amount(epoch, self.spa_step, self.num_epochs))

    def forward(self, features: Tensor, labels: Tensor, shares: Tensor, weight: Tensor, part: float = 1.0) -> Tensor:
        """The terms of a batch, a scalar; ``weight [C, D]`` of the classifier, the rest as :class:`MovingMeans`."""
        with torch.autocast(features.device.type, enabled=False):
            loss = self.nc_rows * rows_apart(weight) if self.nc_rows > 0 else weight.new_zeros(())
            if self.moving is None:
                return loss
            means, seen = self.moving(at_least_float32(features), labels, shares, part)
            if self.nc_means > 0:
                loss = loss + self.nc_means * means_apart(means, seen)
            if self.nc_dual > 0:
                loss = loss + self.nc_dual * duality(weight, means, seen)
            return loss

    @torch.no_grad()
    def adjust_gradients(self, weight: nn.Parameter) -> None:
        """To be called before the optimizer's step. A positive factor on the gradients (fp16) does not matter."""
        if self.spa == "proj":
            means, seen = self.moving.means, self.moving.seen
            weight.grad.copy_(project(weight.grad, weight, centred(means, seen), seen, self.spa_gamma))

    @torch.no_grad()
    def adjust_weights(self, weight: nn.Parameter) -> None:
        """To be called after the optimizer's step."""
        if self.spa == "slerp":
            weight.copy_(slerp_rows(weight, self.moving.means, self.moving.seen, self.amount))
