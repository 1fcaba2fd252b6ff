"""Attraction and repulsion: each class's part in the gradient of each classifier row.

Legend: B samples, C classes, D features; R = T B pairs of a sample and one of its T labels (under mixup a sample has
two). With logits z = W h, the gradient of the summed loss with respect to row i is sum_s q_si h_s, where the residual
q_s is the derivative of sample s's loss in its logits: p - onehot(y) for cross-entropy, with the prior-adjusted p for
ARB-Loss (Xie et al. 2023, eq. 9-16). The share of class j is the sum over its samples: attraction where j = i,
repulsion where j != i.

Everything comes from the Gram matrix of the batch's features: no [C, D] gradient per class is formed, and nothing
synchronises with the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from methods.losses import log_probabilities


class Components(NamedTuple):
    """Attraction and repulsion in one batch, float64.

    Rows ``r`` of one class are equal; ``first`` marks one per class.
    """

    labels: Tensor  # int64 [R]
    first: Tensor  # bool [R]
    norms: Tensor  # [R, C], entry (r, i): norm of class labels[r]'s part in the gradient of row i
    attraction_mass: Tensor  # [C], sum of -q over the class's own samples: of 1 - p for cross-entropy
    repulsion_mass: Tensor  # [C], sum of q over all other samples: of p
    repulsion_cosine: Tensor  # [C], mean cosine between the repulsion of two classes on row i; NaN below two


@torch.no_grad()
def components(residuals: Tensor, features: Tensor, labels: Tensor, shares: Tensor) -> Components:
    """Compute :class:`Components`.

    Args:
        residuals: [T, B, C], derivatives of every sample's loss in its logits, for each of its T labels.
        features: [B, D], the classifier's input.
        labels: int64 [T, B].
        shares: [T], weights of the labels in the loss: lam and 1 - lam under mixup.
    """
    labels, columns = labels.flatten(), labels.reshape(-1, 1)
    q = (residuals.double() * shares.double()[:, None, None]).flatten(0, 1)  # [R, C]
    h = features.double()
    gram = (h @ h.T).repeat(len(shares), len(shares))  # [R, R]
    same = columns == labels
    squares = same.double() @ (q * ((gram * same) @ q))
    norms = squares.clamp_(min=0).sqrt_()
    first = ~same.tril(-1).any(dim=1)
    own = q.gather(1, columns).squeeze(1)
    attraction = torch.zeros_like(q[0]).index_add_(0, labels, -own)
    apart = q.scatter(1, columns, 0)
    repelled = norms.scatter(1, columns, 0)
    unit = torch.where(repelled > 0, apart / repelled, 0)  # sums to the unit vectors of the classes' repulsion
    count = ((repelled > 0) & first[:, None]).sum(dim=0)
    pairs = count * (count - 1)
    cosine = torch.where(pairs > 0, (((gram @ unit) * unit).sum(dim=0) - count) / pairs, torch.nan)
    return Components(labels, first, norms, attraction, apart.sum(dim=0), cosine)


@torch.no_grad()
def component_norms(
    logits: Tensor,
    features: Tensor,
    targets: Tensor,
    class_counts: Tensor | None = None,
    absent_rows: str = "zero",
    mixed: tuple[Tensor, Tensor | float] | None = None,
) -> Tensor:
    """Norms of the gradient components, [C, C]: entry (i, j) is class j's part in the gradient of row i.

    Args:
        logits: [B, C], raw; they are not clamped.
        features: [B, D], the classifier's input.
        targets: int64 [B].
        class_counts: [C] for ARB-Loss with these counts; None for cross-entropy.
        absent_rows: "zero" sets the rows of classes absent from the batch to 0, as the released code does; "true"
            gives the gradient, which repels those rows too.
        mixed: (targets_b [B], lam) for the loss under mixup, lam * loss(targets) + (1 - lam) * loss(targets_b).
            Class j's part is then lam times its sum over targets = j plus (1 - lam) times its sum over targets_b = j.

    Components sum over the batch. For analysis; training measures them by :meth:`methods.Method.components`.
    """
    if absent_rows not in ("zero", "true"):
        raise ValueError(f"absent_rows: {absent_rows!r} is unknown; known are zero, true")
    probs = log_probabilities(logits, class_counts).exp()
    partners, lam = mixed if mixed is not None else (targets, 1.0)
    labels = targets[None] if mixed is None else torch.stack([targets, partners])
    lam = torch.as_tensor(lam, dtype=torch.float64, device=logits.device)
    ones = torch.ones((), dtype=probs.dtype, device=probs.device)
    residuals = torch.stack([probs.scatter_add(1, y[:, None], -ones.expand(len(y), 1)) for y in labels])
    parts = components(residuals, features, labels, torch.stack([lam, 1 - lam])[: len(labels)])
    table = probs.new_zeros(logits.shape[1], logits.shape[1])  # [j, i]
    table[parts.labels] = parts.norms.to(probs.dtype)
    if absent_rows == "zero":
        present = torch.zeros(len(table), dtype=torch.bool, device=table.device).index_fill_(0, parts.labels, True)
        table *= present
    return table.T
