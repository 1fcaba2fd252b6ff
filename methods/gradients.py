"""Attraction and repulsion: what each class's samples put on the gradient of each classifier row.

Legend: B samples, C classes, D features. With logits z = W h, the gradient of the summed loss with respect to row i is
sum_s (p_si - [y_s = i]) h_s, where p is the softmax (cross-entropy) or the prior-adjusted softmax (ARB-Loss, eq. 9-16).
The share of class j is the sum over its samples: attraction where j = i, repulsion where j != i.
"""

import torch
from torch import Tensor

from methods.losses import arb_log_probabilities, log_probabilities


@torch.no_grad()
def component_norms(
    logits: Tensor,
    features: Tensor,
    targets: Tensor,
    class_counts: Tensor | None = None,
    absent_rows: str = "zero",
    mixed: tuple[Tensor, Tensor | float] | None = None,
) -> Tensor:
    """Norms of the gradient components, [C, C]: entry (i, j) is what the batch's class-j samples put on row i.

    Args:
        logits: [B, C], raw; they are not clamped.
        features: [B, D], the classifier's input.
        targets: int64 [B].
        class_counts: [C] for ARB-Loss with these counts; None for cross-entropy.
        absent_rows: "zero" leaves the rows of classes absent from the batch at 0, as the released code's table does;
            "true" gives the gradient itself, which repels those rows too.
        mixed: (targets_b [B], lam) for the loss that mixup trains, lam * loss(targets) + (1 - lam) * loss(targets_b):
            class j's share is then lam times its sum over targets = j plus (1 - lam) times its sum over targets_b = j.

    Components sum over the batch. Each norm comes from the Gram matrix of the features of one class, so that no
    [C, D] gradient per class is ever formed.
    """
    if absent_rows not in ("zero", "true"):
        raise ValueError(f"absent_rows: {absent_rows!r} is unknown; known are zero, true")
    if class_counts is None:
        probs = log_probabilities(logits).exp()
    else:
        probs = arb_log_probabilities(logits, class_counts, clamp=None).exp()
    features = features.to(probs.dtype)
    targets_b, lam = mixed if mixed is not None else (targets, 1.0)
    present = torch.unique(torch.cat([targets, targets_b]))
    norms = probs.new_zeros(logits.shape[1], logits.shape[1])
    for label in present.tolist():
        weights = lam * (targets == label) + (1 - lam) * (targets_b == label)  # [B]
        members = weights.nonzero().squeeze(1)
        shares = probs[members]  # a copy, [n, C]
        shares[:, label] -= 1
        shares *= weights[members, None].to(probs.dtype)
        gram = features[members] @ features[members].T  # [n, n]
        norms[:, label] = ((gram @ shares) * shares).sum(dim=0).clamp(min=0).sqrt()
    if absent_rows == "zero":
        absent = torch.ones(len(norms), dtype=torch.bool, device=norms.device)
        absent[present] = False
        norms[absent] = 0
    return norms
