"""Mixup (Zhang et al., ICLR 2018): a table of an epoch's random draws, and mixing as a pure function."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.seed import generator


class StepDraws(NamedTuple):
    """The random numbers of one step's mixup."""

    lam: Tensor  # float32 scalar in [0, 1], the weight of an image's own label
    partner: Tensor  # int64 [B], a permutation: the index of the image that each one is mixed with


def draw(alpha: float, batch_sizes: Sequence[int], seed: int, epoch: int) -> list[StepDraws]:
    """Draw every step of ``epoch``, on the CPU; a pure function of its arguments.

    lambda ~ Beta(alpha, alpha), one per step; ``alpha`` 0 gives lambda 1. The lambdas do not depend on the batch sizes,
    so processes with shares of different sizes draw the same ones.
    """
    lams = torch.ones(len(batch_sizes))
    if alpha > 0:
        lams = torch.from_numpy(generator(seed, epoch, "mixup lambda").beta(alpha, alpha, len(batch_sizes))).float()
    partners = generator(seed, epoch, "mixup partner")
    return [
        StepDraws(lam, torch.from_numpy(partners.permutation(size)))
        for lam, size in zip(lams, batch_sizes, strict=True)
    ]


def mix(images: Tensor, targets: Tensor, lam: Tensor | float, partner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``lam * images + (1 - lam) * images[partner]``, the images' own targets and their partners'.

    ``images [B, ...]``, ``targets [B]``, ``partner [B]``. The batch's loss is
    ``lam * loss(targets_a) + (1 - lam) * loss(targets_b)``; ARB's batch counts are those of ``targets``.
    """
    return lam * images + (1 - lam) * images[partner], targets, targets[partner]
