"""Training and evaluation batches of one process, for any source of images.

Which images a step sees, and how they are augmented, is a function of (seed, epoch). With W processes, process r takes
the r-th shard of every global batch, split into k micro-batches if a step accumulates. These W k parts differ by at
most one image; nothing is padded or dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from datasets.augment import crop_and_flip, draw_crops, normalise, rows_of
from datasets.policies import STANDARD, Augmentation, Augmenter
from datasets.source import DataError
from utils.seed import generator

Inputs = Iterator[tuple[Tensor, ...]]  # of ``augment``, for one micro-batch after another


class MicroBatch(NamedTuple):
    """The plan of one :class:`Batch`."""

    positions: slice  # in the epoch's order
    step_positions: slice  # of the whole global batch
    weight: float
    ends_step: bool
    full: bool
    number: int


class Batch(NamedTuple):
    """One micro-batch of a training step; tensors are on the device."""

    inputs: tuple[Tensor, ...]  # of ``transform``
    transform: Callable[..., Tensor]
    targets: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], positions in the training set
    step_targets: Tensor  # int64 [G], labels of the whole global batch: all micro-batches of all processes
    pasted_targets: Tensor  # int64 [B], of the images that follow the batch's own in :meth:`augment`; else empty
    weight: float  # B * W / G, of this mean in the step's average over processes
    ends_step: bool  # the step's last micro-batch
    full: bool  # whether the global batch has the usual size; an epoch's last one may be smaller
    number: int  # of the step in its epoch, from 0

    def augment(self) -> Tensor:
        """Augment and normalise on the device: float32 [B, 3, H, W], or [2B, ...] with images to paste."""
        return self.transform(*self.inputs)


class ImageSource(Protocol):
    """A source of batches of images: float32 [B, 3, H, W], normalised, on the device."""

    def train_inputs(
        self, order: Tensor, slices: Sequence[slice], seed: int, epoch: int, draws: Tensor | None = None
    ) -> Inputs:
        """Inputs of :meth:`augment` for the images ``order[s]``, s in slices; a function of (seed, epoch, image).

        ``draws``: the rows of the epoch's draws that they take, see :func:`datasets.augment.rows_of`; None: ``order``.
        """

    def augment(self, *inputs: Tensor) -> Tensor:
        """Crop, flip, normalise. Never synchronises with the device, so that a CUDA graph can capture it."""

    def unaugmented(self, slices: Iterable[slice]) -> Iterator[Tensor]:
        """The images at each of ``slices``, without augmentation."""


def shard(size: int, rank: int, world_size: int) -> slice:
    """Rank's contiguous part of ``size`` items; the first ``size % world_size`` parts have one more."""
    each, more = divmod(size, world_size)
    return slice(rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more))


def plan_micro_batches(size: int, batch_size: int, rank: int, world_size: int, accumulate: int) -> list[MicroBatch]:
    """This process's micro-batches over an epoch of ``size`` images, ``accumulate`` per step.

    The k micro-batches of one process see what k processes would see. A last batch smaller than the number of parts
    leaves some empty; since every process has to take part in every step, these get the batch's first image with
    weight 0. (Batch norm sees it too: the last parts are left empty, and rank 0's statistics are the ones kept.)
    """
    plan = []
    for number, start in enumerate(range(0, size, batch_size)):
        step = slice(start, min(start + batch_size, size))
        step_size = step.stop - start
        for micro in range(accumulate):
            part = shard(step_size, rank * accumulate + micro, world_size * accumulate)
            weight = (part.stop - part.start) * world_size / step_size
            part = part if weight else slice(0, 1)
            positions = slice(start + part.start, start + part.stop)
            plan.append(MicroBatch(positions, step, weight, micro == accumulate - 1, step_size == batch_size, number))
    return plan


class TrainLoader:
    """Augmented, shuffled batches; ``len`` is the number of steps per epoch, each of ``accumulate`` micro-batches."""

    def __init__(
        self,
        pixels: ImageSource,
        targets: Tensor,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        paste_weights: Tensor | None = None,
    ):
        """
        Args:
            targets: int64 [N].
            batch_size: Global, at least one image per micro-batch of every process.
            paste_weights: [C], by which classes are drawn for :meth:`epoch`'s images to paste.
        """
        if batch_size < world_size * accumulate:
            raise DataError(
                f"batch_size: {batch_size} is less than one image for each of {accumulate} micro-batches (accumulate) "
                f"of {world_size} processes; it is the number of images per step over all of them"
            )
        self.pixels, self.targets = pixels, targets.to(device)
        self.batch_size, self.seed, self.device, self.accumulate = batch_size, seed, device, accumulate
        self.paste_weights = paste_weights
        self.micro_batches = plan_micro_batches(len(targets), batch_size, rank, world_size, accumulate)
        self.batch_sizes = [micro.positions.stop - micro.positions.start for micro in self.micro_batches]

    def __len__(self) -> int:
        return len(self.micro_batches) // self.accumulate

    def epoch(self, epoch: int, first_step: int = 0, paste: bool = False) -> Iterator[Batch]:
        """The micro-batches of ``epoch`` from ``first_step`` on; the same in every run with this seed.

        ``paste``: each batch brings as many images more, one for each of its own, see :meth:`pasted`.
        """
        order, plan = self.order(epoch), self.micro_batches[first_step * self.accumulate :]
        slices, images, draws, rest = [micro.positions for micro in plan], order, order, order[:0]
        if paste:
            pasted = self.pasted(epoch)
            rest = pasted[order]
            places = [order[:0], *(order[part] for part in slices)]
            images = torch.cat([torch.cat([own, pasted[own]]) for own in places])
            draws = torch.cat([torch.cat([own, own + len(order)]) for own in places])
            ends = np.cumsum([2 * len(own) for own in places]).tolist()
            slices = [slice(*ends) for ends in pairwise(ends)]
        inputs = self.pixels.train_inputs(images, slices, self.seed, epoch, draws)
        order, rest = order.to(self.device), rest.to(self.device)
        targets, others = self.targets[order], self.targets[rest]  # once: a step's labels are slices of them
        for micro, tensors in zip(plan, inputs, strict=True):
            labels, step_labels = targets[micro.positions], targets[micro.step_positions]
            place = (micro.weight, micro.ends_step, micro.full, micro.number)
            own = order[micro.positions]
            yield Batch(tensors, self.pixels.augment, labels, own, step_labels, others[micro.positions], *place)

    def pasted(self, epoch: int) -> Tensor:
        """For each training image the one that is pasted onto it [N]: a second draw, with ``paste_weights``."""
        weights = self.paste_weights[self.targets.cpu()].double().numpy()
        random = generator(self.seed, epoch, "pasted image")
        return torch.from_numpy(random.choice(len(weights), len(weights), p=weights / weights.sum()))

    def step_indices(self, epoch: int, step: int) -> list[int]:
        """Positions in the training set of one step's images, those of all processes."""
        return self.order(epoch)[self.micro_batches[step * self.accumulate].step_positions].tolist()

    def order(self, epoch: int) -> Tensor:
        """The positions in the training set [N], as all processes together see them."""
        return torch.from_numpy(generator(self.seed, epoch, "order").permutation(len(self.targets)))


class EvalLoader:
    """Images in order, without augmentation: (images [B, 3, H, W], targets [B]).

    With W processes, process r takes the r-th shard of the batches. Batches are never divided: every image is
    computed among the same others, whatever the number of processes, so results agree to the last bit.
    """

    def __init__(
        self,
        pixels: ImageSource,
        targets: Tensor,
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ):
        """``targets`` int64 [N] of the whole set."""
        self.pixels, self.targets = pixels, targets.to(device)
        slices = [slice(start, start + batch_size) for start in range(0, len(targets), batch_size)]
        self.slices = slices[shard(len(slices), rank, world_size)]

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.pixels.unaugmented(self.slices)
        return ((batch, self.targets[part]) for batch, part in zip(images, self.slices, strict=True))


class SmallImages:
    """Small images: padded with black, cropped, flipped, augmented and normalised on the device, batch by batch."""

    def __init__(
        self,
        size: int,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        flip: bool = True,
        augmentation: Augmentation = STANDARD,
    ):
        """``size`` images of ``side`` x ``side`` pixels."""
        self.size, self.flip, self.device = size, flip, device
        self.padding = side // 8  # 4 of 32 pixels, as in the reference
        self.mean, self.std = (torch.tensor(values, device=device) for values in (mean, std))
        self.augmenter = Augmenter(augmentation, side, False, self.mean, self.std)

    def draw(self, draws: Tensor, seed: int, epoch: int) -> list[Tensor]:
        """Rows ``draws`` of the epoch's draws, on the device: offsets, flips, those of the augmenter."""
        crops = rows_of(partial(draw_crops, self.size, self.padding, self.flip, seed, epoch), self.size, draws)
        more = rows_of(partial(self.augmenter.draw, self.size, seed, epoch), self.size, draws)
        return [table.to(self.device) for table in (*crops, *more)]

    def augment(self, images: Tensor, offsets: Tensor, flips: Tensor, *more: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W]."""
        return self.augmenter(crop_and_flip(images, offsets, flips, self.padding), *more)


class InMemoryImages(SmallImages):
    """Small images kept as uint8 on the device: an epoch needs no worker and no copy."""

    def __init__(self, images: Tensor, *arguments, **options):
        """``images`` uint8 [N, H, W, 3]; the rest as of :class:`SmallImages`, from ``mean`` on."""
        super().__init__(len(images), images.shape[1], *arguments, **options)
        self.images = images.to(self.device)

    def train_inputs(
        self, order: Tensor, slices: Sequence[slice], seed: int, epoch: int, draws: Tensor | None = None
    ) -> Inputs:
        tables = [order.to(self.device), *self.draw(order if draws is None else draws, seed, epoch)]
        return (tuple(table[part] for table in tables) for part in slices)

    def augment(self, indices: Tensor, *tables: Tensor) -> Tensor:
        return super().augment(self.images.index_select(0, indices), *tables)

    def unaugmented(self, slices: Iterable[slice]) -> Iterator[Tensor]:
        return (normalise(self.images[part], self.mean, self.std) for part in slices)
