"""Regularizers that induce neural collapse under imbalance (Liu et al., AISTATS 2023), with learnable class means.

Legend: B samples, C classes, D features; h_i the feature of sample i, n_k the batch's count of class k, mu_k the means.

    L = L_sup + lambda1 L_W + lambda2 L_B
    L_W = (1/C) sum_k (1/n_k) sum_{i in class k} ||h_i - mu_k||^2                  over classes in the batch
    L_B = -(1/C) sum_k min_{k' != k} arccos( cos(mu_k - mu_C, mu_k' - mu_C) )      mu_C the mean of the class means

L_W pulls features to their class's mean, L_B pushes the means apart. L_B is a function of the means alone, as in the
released code, so it acts on the features through L_W alone. Everything is computed in at least float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.losses import count_classes
from utils.precision import at_least_float32
from utils.seed import generator

LARGEST_COSINE = 0.99999  # arccos has an infinite slope at +-1


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
