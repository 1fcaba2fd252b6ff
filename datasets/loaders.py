"""Training and evaluation batches of one process, whatever the pixels come from.

Which images a step sees, and how they are augmented, is a function of (seed, epoch). With W processes, process r takes
the r-th share of every global batch, in k passes where a step accumulates; these W k parts differ by at most one image,
and nothing is padded or dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from datasets.augment import crop_and_flip, draw_crops, normalise
from datasets.source import DataError
from utils.seed import generator


class Batch(NamedTuple):
    """What one pass of a training step sees of the data; tensors are on the device."""

    inputs: tuple[Tensor, ...]  # what ``develop`` makes the images of
    develop: Callable[..., Tensor]
    targets: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], positions in the training set
    step_targets: Tensor  # int64 [G], of the whole global batch: all passes of all processes
    weight: float  # B * W / G: what this mean counts in the step's average over processes
    ends_step: bool  # the step's last pass
    full: bool  # the global batch has the size that all but an epoch's last one have
    number: int  # of the step in its epoch, from 0

    @property
    def images(self) -> Tensor:
        """float32 [B, 3, H, W], augmented and normalised: made anew, on the device, each time it is asked for."""
        return self.develop(*self.inputs)


class Pass(NamedTuple):
    """A part of a global batch: positions in the epoch's order, and what :class:`Batch` says of it."""

    positions: slice
    step: slice  # positions of the global batch
    weight: float
    ends_step: bool
    full: bool
    number: int


class Pixels(Protocol):
    """Where batches of images come from: float32 [B, 3, H, W], normalised, on the device."""

    def augmented(self, order: Tensor, parts: Iterable[slice], seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """What :meth:`develop` needs for the images at ``order[part]``: a function of (seed, epoch, image)."""

    def develop(self, *inputs: Tensor) -> Tensor:
        """The images, cropped, mirrored, normalised: what is the same in every step, without a look at any number."""

    def plain(self, parts: Iterable[slice]) -> Iterator[Tensor]:
        """The images at each of ``parts`` as they are."""


def share(size: int, rank: int, world_size: int) -> slice:
    """Process ``rank``'s part of ``size`` things: contiguous; the first ``size % world_size`` parts have one more."""
    each, more = divmod(size, world_size)
    return slice(rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more))


def plan_passes(size: int, batch_size: int, rank: int, world_size: int, accumulate: int) -> list[Pass]:
    """The passes of this process over an epoch of ``size`` images, ``accumulate`` per step.

    k passes of a process see what k processes would see. A last batch smaller than the number of parts leaves some
    empty; every process has to take part in every step, so these take the batch's first image, with weight 0. (Batch
    norm sees it too: the last parts are left empty, and rank 0's statistics are the ones that are kept.)
    """
    passes = []
    for start in range(0, size, batch_size):
        whole = slice(start, min(start + batch_size, size))
        for number in range(accumulate):
            part = share(whole.stop - start, rank * accumulate + number, world_size * accumulate)
            weight = (part.stop - part.start) * world_size / (whole.stop - start)
            part = part if weight else slice(0, 1)
            positions = slice(start + part.start, start + part.stop)
            full = whole.stop - whole.start == batch_size
            passes.append(Pass(positions, whole, weight, number == accumulate - 1, full, start // batch_size))
    return passes


class TrainLoader:
    """Augmented, shuffled batches; ``len`` is the number of steps of an epoch, of ``accumulate`` passes each."""

    def __init__(
        self,
        pixels: Pixels,
        targets: Tensor,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ):
        """``targets`` int64 [N]; ``batch_size`` is global, at least one image per pass of every process."""
        if batch_size < world_size * accumulate:
            raise DataError(
                f"batch_size: {batch_size} is less than one image for each of {accumulate} passes (accumulate) of "
                f"{world_size} processes; it is the number of images per step over all of them"
            )
        self.pixels, self.targets = pixels, targets.to(device)
        self.batch_size, self.seed, self.device, self.accumulate = batch_size, seed, device, accumulate
        self.passes = plan_passes(len(targets), batch_size, rank, world_size, accumulate)
        self.batch_sizes = [p.positions.stop - p.positions.start for p in self.passes]

    def __len__(self) -> int:
        return len(self.passes) // self.accumulate

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``first_step`` on, one per pass, the same in every run with this seed."""
        order, passes = self._order(epoch), self.passes[first_step * self.accumulate :]
        inputs = self.pixels.augmented(order, [p.positions for p in passes], self.seed, epoch)
        order = order.to(self.device)
        targets = self.targets[order]  # once: a step's labels are parts of it
        develop = self.pixels.develop
        for part, (positions, step, *of_pass) in zip(inputs, passes, strict=True):
            yield Batch(part, develop, targets[positions], order[positions], targets[step], *of_pass)

    def step_indices(self, epoch: int, step: int) -> list[int]:
        """Positions in the training set of the images of one step, those of all processes."""
        return self._order(epoch)[self.passes[step * self.accumulate].step].tolist()

    def _order(self, epoch: int) -> Tensor:
        return torch.from_numpy(generator(self.seed, epoch, "order").permutation(len(self.targets)))


class EvalLoader:
    """Images in order, without augmentation: (images [B, 3, H, W], targets [B]).

    With W processes, process r takes the r-th share of the batches. A batch is never divided, so that every image is
    computed among the same others, to the last bit, whatever the number of processes.
    """

    def __init__(
        self,
        pixels: Pixels,
        targets: Tensor,
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ):
        """``targets`` int64 [N] of the whole set."""
        self.pixels, self.targets = pixels, targets.to(device)
        mine = share(-(-len(targets) // batch_size), rank, world_size)
        self.parts = [slice(n * batch_size, (n + 1) * batch_size) for n in range(mine.start, mine.stop)]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.pixels.plain(self.parts)
        return ((batch, self.targets[part]) for batch, part in zip(images, self.parts, strict=True))


class SmallPixels:
    """Small images: padded with black, cropped, flipped and normalised on the device, in whole batches."""

    def __init__(
        self,
        size: int,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        flip: bool = True,
    ):
        """``size`` images of ``side`` x ``side`` pixels."""
        self.size, self.flip, self.device = size, flip, device
        self.padding = side // 8  # 4 of 32 pixels, as in the reference
        self.mean, self.std = (torch.tensor(values, device=device) for values in (mean, std))

    def draws(self, order: Tensor, seed: int, epoch: int) -> list[Tensor]:
        """The epoch's table of crops on the device, in the epoch's order: offsets [N, 2], flips [N]."""
        crops = draw_crops(self.size, self.padding, self.flip, seed, epoch)
        return [table[order].to(self.device) for table in crops]

    def cropped(self, images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W]."""
        return normalise(crop_and_flip(images, offsets, flips, self.padding), self.mean, self.std)


class MemoryPixels(SmallPixels):
    """Small images that live as uint8 on the device: an epoch needs no process and no copy."""

    def __init__(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device, flip: bool = True
    ):
        """``images`` uint8 [N, H, W, 3]."""
        super().__init__(len(images), images.shape[1], mean, std, device, flip)
        self.images = images.to(device)

    def augmented(self, order: Tensor, parts: Iterable[slice], seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """See :class:`Pixels`."""
        tables = [order.to(self.device), *self.draws(order, seed, epoch)]
        return (tuple(table[part] for table in tables) for part in parts)

    def develop(self, chosen: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """See :class:`Pixels`."""
        return self.cropped(self.images.index_select(0, chosen), offsets, flips)

    def plain(self, parts: Iterable[slice]) -> Iterator[Tensor]:
        """See :class:`Pixels`."""
        return (normalise(self.images[part], self.mean, self.std) for part in parts)
