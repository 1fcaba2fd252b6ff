"""CutMix (Yun et al., ICCV 2019) and CMO (Park et al., CVPR 2022): draws of an epoch, and pasting as a pure function.

A step mixes with a probability: then a box, whose share of the area is about 1 - lambda, lambda ~ Beta(alpha, alpha),
is pasted onto every image, and the loss is ``lam L(own label) + (1 - lam) L(pasted label)`` with lam the share that is
left. CutMix pastes from a permutation of the batch; CMO from a second draw of images that prefers rare classes, see
:meth:`datasets.loaders.TrainLoader.pasted`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.seed import generator


class BoxDraws(NamedTuple):
    """The random numbers of one step."""

    lam: Tensor  # float32 scalar in [0, 1], the weight of an image's own label; 1 if the step does not mix
    partner: Tensor  # int64 [B], the place of the image that is pasted onto each
    box: Tensor  # int64 [4]: top, left, bottom, right


def draw(
    alpha: float, batch_sizes: Sequence[int], seed: int, epoch: int, side: int, probability: float, second: bool
) -> list[BoxDraws]:
    """Draw every step of ``epoch``, on the CPU; a pure function of its arguments.

    Lambdas and boxes, one per step, do not depend on the batch sizes, so all processes have the same.

    Args:
        side: of an image in pixels.
        probability: that a step mixes.
        second: Paste images that follow the batch's own, in order, instead of a permutation of these.
    """
    random, steps = generator(seed, epoch, "cutmix box"), len(batch_sizes)
    lams, mixes = random.beta(alpha, alpha, steps), random.random(steps) < probability
    half = (side * np.sqrt(1 - lams)).astype(np.int64)[:, None] // 2 * mixes[:, None]
    centre = random.integers(0, side, (steps, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1).clip(0, side)
    left = 1 - (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / side**2
    partners = generator(seed, epoch, "cutmix partner")
    places = [np.arange(size, 2 * size) if second else partners.permutation(size) for size in batch_sizes]
    rows = zip(torch.from_numpy(left).float(), map(torch.from_numpy, places), torch.from_numpy(boxes), strict=True)
    return [BoxDraws(*row) for row in rows]


def paste(images: Tensor, targets: Tensor, lam: Tensor, partner: Tensor, box: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Paste ``box [4]`` of ``images[partner]`` onto the first B images; return them and both labels of each.

    ``images [B or more, 3, H, W]``, ``targets`` of the same length, ``partner [B]``. Where nothing is pasted (``lam``
    1) the second label is the first, so that no label of an image that is not there enters the loss.
    """
    own, own_targets = images[: len(partner)], targets[: len(partner)]
    top, left, bottom, right = box
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    pasted = torch.where(lam < 1, targets[partner], own_targets)
    return torch.where(inside, images[partner], own), own_targets, pasted
