"""Mixup, CutMix and CMO behind one interface: an epoch's draws, and what a step does with them."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from methods import cutmix, mixup
from methods.cutmix import BoxDraws
from methods.mixup import StepDraws

Draws = StepDraws | BoxDraws


class Mixing(NamedTuple):
    """How a step mixes images."""

    draw: Callable[[Sequence[int], int, int], list[Draws]]  # (batch sizes, seed, epoch) -> one per step
    mix: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (images, targets, *draws) -> images, both labels of each
    pastes: bool = False  # needs a second draw of images, after the batch's own
    epochs: range = range(sys.maxsize)  # in which it is on


def new_mixing(
    kind: str, alpha: float, side: int = 0, probability: float = 1.0, idle: int = 0, num_epochs: int = sys.maxsize
) -> Mixing:
    """Build the mixing of :func:`build_method`'s option ``mix``.

    Args:
        kind: "mixup", "cutmix" or "cmo".
        alpha: lambda ~ Beta(alpha, alpha).
        side: of an image in pixels; this and the rest are not for mixup.
        probability: that a step mixes.
        idle: first and last epochs of ``num_epochs`` in which CMO is off.
    """
    if kind == "mixup":
        return Mixing(partial(mixup.draw, alpha), mixup.mix)
    second = kind == "cmo"
    draw = partial(cutmix.draw, alpha, side=side, probability=probability, second=second)
    return Mixing(draw, cutmix.paste, second, range(idle, num_epochs - idle) if second else range(num_epochs))


def to_device(draws: Sequence[Draws], device: torch.device | None) -> list[Draws]:
    """Move an epoch's draws to the device (None: the CPU), in one copy per field instead of one per step and field."""
    fields = [torch.cat([field.reshape(-1) for field in fields]).to(device) for fields in zip(*draws, strict=True)]
    parts = [
        moved.split([field.numel() for field in column])
        for moved, column in zip(fields, zip(*draws, strict=True), strict=True)
    ]
    rows = zip(*parts, strict=True)
    return [type(draw)(row[0].squeeze(0), *row[1:]) for draw, row in zip(draws, rows, strict=True)]
