"""Images read by DataLoader workers; what can be done in batches is done on the device.

A worker holds a copy of the data set for as long as training lasts, so everything that changes comes with the request:
a crop is a function of (seed, epoch, index), and the number of workers cannot change what is trained on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.augment import central_crop, draw_jitter, jitter, normalise, random_crop, rows_of
from datasets.decoding import open_rgb
from datasets.loaders import Inputs, SmallImages
from datasets.policies import STANDARD, Augmentation, Augmenter
from datasets.source import DataError, ImageFiles, StoredImages
from utils.seed import generator
from utils.signals import kept_from_children, obey_the_parent

JITTER = 0.4  # of brightness, contrast and saturation, as in the reference
Request = tuple[int, tuple | None]  # index, and the arguments of a random crop's generator; None: no augmentation
Read = Callable[[Sequence[Request]], Tensor]  # a batch -> uint8 [B, H, W, 3]; picklable, may raise DataError


class CropReader:
    """Decode and crop large images: a batch of requests -> uint8 [B, S, S, 3], random or central crops."""

    def __init__(self, files: ImageFiles, size: int, decoder: str):
        self.files, self.size, self.decoder = files, size, decoder

    def __call__(self, requests: Sequence[Request]) -> Tensor:
        # All generators first: between two images, which fill the caches, each would take three times as long.
        generators = [draw and generator(*draw) for _, draw in requests]
        crops = map(self._crop, (index for index, _ in requests), generators)
        return torch.from_numpy(np.stack(list(crops)))

    def _crop(self, index: int, random: np.random.Generator | None) -> np.ndarray:
        image = open_rgb(self.files.path(index), self.decoder)
        return central_crop(image, self.size) if random is None else random_crop(image, self.size, random)


def read_stored(stored: StoredImages, requests: Sequence[Request]) -> Tensor:
    return torch.from_numpy(stored.read([index for index, _ in requests]))


class ReaderDataset(Dataset):
    """Returns an error as a value: raised in a worker, its one line would come inside a traceback."""

    def __init__(self, read: Read):
        self.read = read

    def __getitems__(self, requests: Sequence[Request]) -> Tensor | DataError:
        try:
            return self.read(requests)
        except DataError as error:
            return error


class RequestSampler(Sampler):
    """The batches of requests of one pass over the data; set before every pass."""

    def __init__(self):
        self.batches: Iterable[list[Request]] = []

    def __iter__(self) -> Iterator[list[Request]]:
        return iter(self.batches)


class Workers:
    """Processes that read ahead and stay alive from epoch to epoch; ``count`` 0 reads in this process."""

    def __init__(self, read: Read, count: int, device: torch.device):
        self.device = device
        self.sampler = RequestSampler()
        self.loader = DataLoader(
            ReaderDataset(read),
            batch_sampler=self.sampler,
            num_workers=count,
            collate_fn=_identity,
            pin_memory=device.type == "cuda",
            persistent_workers=count > 0,
            worker_init_fn=obey_the_parent,
            generator=torch.Generator(),  # the loader seeds its workers from it, not from the global generator
        )

    def read(self, batches: Iterable[list[Request]]) -> Iterator[Tensor]:
        """The images of these requests, batch by batch, on the device."""
        self.sampler.batches = batches
        with kept_from_children():  # the first call starts the workers
            images_of = iter(self.loader)
        for images in images_of:
            if isinstance(images, DataError):
                raise DataError(str(images))  # a new one: this frame would hold itself, and the workers end late
            yield images.to(self.device, non_blocking=True)

    def read_slices(self, slices: Iterable[slice], size: int) -> Iterator[Tensor]:
        """As :meth:`read`, for slices of ``size`` images in order, without augmentation."""
        return self.read([(index, None) for index in range(*part.indices(size))] for part in slices)

    def read_with(
        self, tables: Sequence[Tensor], order: Tensor, slices: Sequence[slice], crops: Sequence[tuple] | None = None
    ) -> Inputs:
        """The images at each ``order[slice]``, and the same rows of ``tables``, which are in that order already.

        ``crops``: arguments of each image's generator, in that order.
        """
        requests = list(zip(order.tolist(), crops or [None] * len(order), strict=True))
        images_of = self.read(requests[part] for part in slices)
        return ((images, *(table[part] for table in tables)) for images, part in zip(images_of, slices, strict=True))


def _identity(images: Tensor | DataError) -> Tensor | DataError:
    return images


class StreamedLargeImages:
    """Large images: workers decode and crop; the device jitters colours as the reference does, or applies a policy."""

    def __init__(
        self,
        files: ImageFiles,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        workers: int = 0,
        decoder: str = "pil",
        augmentation: Augmentation = STANDARD,
    ):
        """``side``: of a crop, in pixels."""
        self.size, self.device = len(files), device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (mean, std))
        self.augmenter = Augmenter(augmentation, side, True, self.mean, self.std)
        self.workers = Workers(CropReader(files, side, decoder), workers, device)

    def train_inputs(
        self, order: Tensor, slices: Sequence[slice], seed: int, epoch: int, draws: Tensor | None = None
    ) -> Inputs:
        """Random crops, possibly flipped, and for each its own draws."""
        draws, tables = order if draws is None else draws, []
        if self.augmenter.policy is None:
            tables += rows_of(partial(draw_jitter, self.size, JITTER, seed, epoch), self.size, draws)
        tables += rows_of(partial(self.augmenter.draw, self.size, seed, epoch), self.size, draws)
        crops = [
            (seed, epoch, "crop", row) if row < self.size else (seed, epoch, "pasted crop", row - self.size)
            for row in draws.tolist()
        ]
        return self.workers.read_with([table.to(self.device) for table in tables], order, slices, crops)

    def augment(self, crops: Tensor, *tables: Tensor) -> Tensor:
        if self.augmenter.policy is None:
            factors, order, *tables = tables
            crops = jitter(crops, factors, order)
        return self.augmenter(crops, *tables)

    def unaugmented(self, slices: Iterable[slice]) -> Iterator[Tensor]:
        """Central crops."""
        return (normalise(images, self.mean, self.std) for images in self.workers.read_slices(slices, self.size))


class StreamedSmallImages(SmallImages):
    """Small images that do not fit on the device: workers read them, the device augments them."""

    def __init__(self, stored: StoredImages, *arguments, workers: int = 0, **options):
        """``arguments`` and ``options`` as of :class:`SmallImages`, from ``mean`` on."""
        super().__init__(len(stored), stored.side, *arguments, **options)
        self.workers = Workers(partial(read_stored, stored), workers, self.device)

    def train_inputs(
        self, order: Tensor, slices: Sequence[slice], seed: int, epoch: int, draws: Tensor | None = None
    ) -> Inputs:
        return self.workers.read_with(self.draw(order if draws is None else draws, seed, epoch), order, slices)

    def unaugmented(self, slices: Iterable[slice]) -> Iterator[Tensor]:
        return (normalise(images, self.mean, self.std) for images in self.workers.read_slices(slices, self.size))
