"""Batches of a data set that lives in memory, as uint8, on the device that trains.

Which images a step sees, and how they are cropped, is a function of (seed, epoch): drawn once per epoch as tables.
With W processes, process r takes the r-th share of every global batch; shares differ by at most one image, and nothing
is padded or dropped.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.augment import crop_and_flip, draw_crops, normalise
from utils.seed import generator


class Batch(NamedTuple):
    """What a training step sees of the data."""

    images: Tensor  # float32 [B, 3, H, W], normalised
    targets: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], positions in the training set
    weight: float  # B * W / size of the global batch: what this process's mean counts in the average over processes


def share(size: int, rank: int, world_size: int) -> slice:
    """Process ``rank``'s part of ``size`` things: contiguous, sizes differ by at most one."""
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


class TrainLoader:
    """Augmented, shuffled batches; ``len`` is the number of steps of an epoch."""

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ):
        """``images`` uint8 [N, H, W, 3], ``targets`` int64 [N]; ``batch_size`` is global."""
        self.images, self.targets = images.to(device), targets.to(device)
        self.padding = images.shape[1] // 8  # 4 of 32 pixels, as in the reference
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.flip, self.seed, self.device = flip, seed, device
        starts = range(0, len(targets), batch_size)
        sizes = [min(batch_size, len(targets) - start) for start in starts]
        shares = [share(size, rank, world_size) for size in sizes]
        self.weights = [(s.stop - s.start) * world_size / size for s, size in zip(shares, sizes, strict=True)]
        # A last batch smaller than the number of processes leaves some without a share. Every process has to take part
        # in the step, so these take one image, with weight 0.
        shares = [s if s.stop > s.start else slice(0, 1) for s in shares]
        self.steps = [slice(start + s.start, start + s.stop) for start, s in zip(starts, shares, strict=True)]
        self.batch_sizes = [s.stop - s.start for s in shares]  # of this process

    def __len__(self) -> int:
        return len(self.steps)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of ``epoch``, the same in every run with this seed."""
        size = len(self.targets)
        order = torch.from_numpy(generator(self.seed, epoch, "order").permutation(size)).to(self.device)
        offsets, flips = (t.to(self.device) for t in draw_crops(size, self.padding, self.flip, self.seed, epoch))
        for step, weight in zip(self.steps, self.weights, strict=True):
            chosen = order[step]
            cropped = crop_and_flip(self.images[chosen], offsets[chosen], flips[chosen], self.padding)
            yield Batch(normalise(cropped, self.mean, self.std), self.targets[chosen], chosen, weight)


class EvalLoader:
    """Every image once, in order, without augmentation: (images [B, 3, H, W], targets [B])."""

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ):
        self.images, self.targets = images.to(device), targets.to(device)
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.targets) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = zip(self.images.split(self.batch_size), self.targets.split(self.batch_size), strict=True)
        return ((normalise(images, self.mean, self.std), targets) for images, targets in parts)
