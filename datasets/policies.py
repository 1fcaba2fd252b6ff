"""What ``augment``, ``cutout`` and ``random_erasing`` add to crops and flips: an epoch's draws, and their application.

The policies are torchvision's (AutoAugment: Cubuk et al., CVPR 2019; RandAugment: Cubuk et al., 2020; TrivialAugment:
Müller and Hutter, ICCV 2021), Cutout is that of DeVries and Taylor (2017), random erasing torchvision's (Zhong et al.,
AAAI 2020). Legend: N images, B batch, K operations per image.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide

from datasets.augment import normalise
from datasets.image_ops import NUMBERS, apply
from utils.seed import generator

AUTO_BINS, BINS = 10, 31  # levels of strength
ATTEMPTS = 10  # of random erasing


class Augmentation(NamedTuple):
    """The options."""

    augment: str = "standard"  # or a name of ``POLICIES``
    num_ops: int = 2  # of RandAugment
    magnitude: int = 9  # of RandAugment, 0 .. 30
    cutout: int = 0  # side of the square in pixels
    random_erasing: float = 0.0  # probability


STANDARD = Augmentation()


class PolicyTable(NamedTuple):
    operations: Tensor  # int64 [N, K], numbers of :mod:`datasets.image_ops`
    strengths: Tensor  # float64 [N, K]


class Space:
    """torchvision's table of strengths, by operation and level."""

    def __init__(self, rows: dict[str, tuple[Tensor, bool]], bins: int):
        """``rows``: operation -> (strengths [bins] or [], whether the sign is drawn)."""
        self.bins = bins
        self.numbers = np.array([NUMBERS[name] for name in rows])
        self.strengths, self.signed = np.zeros((len(NUMBERS), bins)), np.zeros(len(NUMBERS), bool)
        for number, (strengths, signed) in zip(self.numbers, rows.values(), strict=True):
            self.strengths[number], self.signed[number] = strengths.numpy(), signed

    def table(self, numbers: np.ndarray, levels: np.ndarray | int, random: np.random.Generator) -> PolicyTable:
        """``numbers`` int64 [N, K], ``levels`` [N, K] or one of them; half of the signed strengths become negative."""
        signs = np.where(self.signed[numbers] & (random.integers(0, 2, numbers.shape) == 0), -1.0, 1.0)
        strengths = signs * self.strengths[numbers, levels]
        return PolicyTable(torch.from_numpy(numbers), torch.from_numpy(strengths))


def autoaugment(size: int, side: int, large: bool, options: Augmentation, random: np.random.Generator) -> PolicyTable:
    """One of the 25 pairs of operations that were found on CIFAR-10 or, if ``large``, on ImageNet."""
    policy = AutoAugment(AutoAugmentPolicy.IMAGENET if large else AutoAugmentPolicy.CIFAR10)
    space = Space(policy._augmentation_space(AUTO_BINS, (side, side)), AUTO_BINS)
    pairs = [[(NUMBERS[name], chance, level or 0) for name, chance, level in pair] for pair in policy.policies]
    numbers, chances, levels = np.array(pairs)[random.integers(0, len(pairs), size)].transpose(2, 0, 1)
    numbers = np.where(random.random(numbers.shape) <= chances, numbers, 0).astype(np.int64)
    return space.table(numbers, levels.astype(np.int64), random)


def randaugment(size: int, side: int, large: bool, options: Augmentation, random: np.random.Generator) -> PolicyTable:
    """``num_ops`` operations, each of the strength ``magnitude``."""
    space = Space(RandAugment()._augmentation_space(BINS, (side, side)), BINS)
    numbers = space.numbers[random.integers(0, len(space.numbers), (size, options.num_ops))]
    return space.table(numbers, options.magnitude, random)


def trivialaugment(
    size: int, side: int, large: bool, options: Augmentation, random: np.random.Generator
) -> PolicyTable:
    """One operation of a random strength."""
    space = Space(TrivialAugmentWide()._augmentation_space(BINS), BINS)
    numbers = space.numbers[random.integers(0, len(space.numbers), (size, 1))]
    return space.table(numbers, random.integers(0, BINS, (size, 1)), random)


POLICIES: dict[str, Callable[..., PolicyTable]] = {
    "autoaugment": autoaugment,
    "randaugment": randaugment,
    "trivialaugment": trivialaugment,
}


def cutout_boxes(size: int, side: int, length: int, random: np.random.Generator) -> Tensor:
    """Squares of ``length`` pixels around a random pixel: int64 [N, 4], top, left, bottom, right."""
    first = random.integers(0, side, (size, 2)) - length // 2
    return torch.from_numpy(np.concatenate([first, first + length], axis=1).clip(0, side))


def erasing_boxes(size: int, side: int, probability: float, random: np.random.Generator) -> Tensor:
    """RandomErasing's boxes, int64 [N, 4] as of :func:`cutout_boxes`: 2 to 33 % of the area, aspect ratio 0.3 to 3.3.

    The first of ten attempts that fits; empty where none does, or with probability 1 - ``probability``.
    """
    area = side * side * random.uniform(0.02, 0.33, (size, ATTEMPTS))
    ratio = np.exp(random.uniform(np.log(0.3), np.log(3.3), (size, ATTEMPTS)))
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=2).round().astype(np.int64)
    fits = (sides < side).all(axis=2)
    sides = sides[np.arange(size), fits.argmax(axis=1)]
    sides[~(fits.any(axis=1) & (random.random(size) < probability))] = 0
    first = (random.random((size, 2)) * (side - sides + 1)).astype(np.int64)
    return torch.from_numpy(np.concatenate([first, first + sides], axis=1))


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set a box [B, 4] of each of ``images`` float32 [B, 3, H, W] to 0, in place."""
    top, left, bottom, right = boxes.T[:, :, None, None]
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return images.masked_fill_(inside[:, None], 0)


class Augmenter:
    """Apply a policy to cropped images, normalise them, cut boxes out of them."""

    def __init__(self, options: Augmentation, side: int, large: bool, mean: Tensor, std: Tensor):
        """``side``: of an image in pixels; ``large``: choose AutoAugment's policy for ImageNet."""
        self.options, self.side, self.large, self.mean, self.std = options, side, large, mean, std
        self.policy = POLICIES.get(options.augment)

    def draw(self, size: int, seed: int, epoch: int, stream: str = "") -> list[Tensor]:
        """The tables of :meth:`__call__` for ``size`` images, a row each, on the CPU; none if all is off.

        ``stream``: see :func:`datasets.augment.rows_of`.
        """
        tables, options = [], self.options
        if self.policy:
            random = generator(seed, epoch, f"{stream}policy")
            tables += self.policy(size, self.side, self.large, options, random)
        if options.cutout:
            tables.append(cutout_boxes(size, self.side, options.cutout, generator(seed, epoch, f"{stream}cutout")))
        if options.random_erasing:
            random = generator(seed, epoch, f"{stream}random erasing")
            tables.append(erasing_boxes(size, self.side, options.random_erasing, random))
        return tables

    def __call__(self, images: Tensor, *tables: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] and the images' rows of the tables -> float32 [B, 3, H, W]."""
        boxes: Sequence[Tensor] = tables
        if self.policy:
            operations, strengths, *boxes = tables
            images = images.permute(0, 3, 1, 2)
            for number, strength in zip(operations.unbind(1), strengths.unbind(1), strict=True):
                images = apply(images, number, strength)
            images = images.permute(0, 2, 3, 1)
        normalised = normalise(images, self.mean, self.std)
        for each in boxes:
            erase(normalised, each)
        return normalised
