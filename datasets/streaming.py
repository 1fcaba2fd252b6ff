"""Images that do not live on the device: workers read them, and what is the same for all of them is the device's.

A worker holds a copy of the data set that lives as long as the training does, so all that changes comes with the
request: a crop is a function of (seed, epoch, index), and the number of workers cannot change what is trained on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.augment import central_crop, draw_jitter, jitter, normalise, random_crop
from datasets.decoding import open_rgb
from datasets.loaders import SmallPixels
from datasets.source import DataError, ImageFiles, StoredImages
from utils.seed import generator
from utils.signals import kept_from_children, obey_the_parent

JITTER = 0.4  # of brightness, contrast and saturation, as in the reference
Request = tuple[int, tuple[int, int] | None]  # index, and (seed, epoch) of what is random, or None


class Crops:
    """Decodes large images: a batch of requests -> uint8 [B, S, S, 3], a random crop or the middle."""

    def __init__(self, files: ImageFiles, size: int, decoder: str):
        self.files, self.size, self.decoder = files, size, decoder

    def __call__(self, requests: Sequence[Request]) -> Tensor:
        # All generators first: between two images, which fill the caches, each would take three times as long.
        generators = [draw and generator(*draw, "crop", index) for index, draw in requests]
        crops = map(self._crop, (index for index, _ in requests), generators)
        return torch.from_numpy(np.stack(list(crops)))

    def _crop(self, index: int, random: np.random.Generator | None) -> np.ndarray:
        image = open_rgb(self.files.path(index), self.decoder)
        return central_crop(image, self.size) if random is None else random_crop(image, self.size, random)


class Reader:
    """Reads small images as they are: a batch of requests -> uint8 [B, H, W, 3]."""

    def __init__(self, stored: StoredImages):
        self.stored = stored

    def __call__(self, requests: Sequence[Request]) -> Tensor:
        return torch.from_numpy(self.stored.read([index for index, _ in requests]))


class Work(Dataset):
    """What a worker does, with an error handed over as a value: raised there, its line would come in a traceback."""

    def __init__(self, work: Callable[[Sequence[Request]], Tensor]):
        self.work = work

    def __getitems__(self, requests: Sequence[Request]) -> Tensor | DataError:
        try:
            return self.work(requests)
        except DataError as error:
            return error


class Requests(Sampler):
    """The batches of requests of one pass over the data; set anew before every pass."""

    def __init__(self):
        self.batches: Sequence[Sequence[int]] = []
        self.draw: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[list[Request]]:
        return ([(index, self.draw) for index in batch] for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Workers:
    """Processes that read ahead, and stay alive from epoch to epoch (0: this process reads)."""

    def __init__(self, work: Callable[[Sequence[Request]], Tensor], count: int, device: torch.device):
        """``work``: a batch of requests -> uint8 [B, H, W, 3]; may raise :class:`DataError`."""
        self.device = device
        self.requests = Requests()
        self.loader = DataLoader(
            Work(work),
            batch_sampler=self.requests,
            num_workers=count,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            persistent_workers=count > 0,
            worker_init_fn=obey_the_parent,
            generator=torch.Generator(),  # a loader draws a seed for its workers; not from the global generator
        )

    def read(self, batches: Sequence[Sequence[int]], draw: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The images at these indices, batch by batch, on the device; ``draw``: (seed, epoch) of what is random."""
        self.requests.batches, self.requests.draw = batches, draw
        with kept_from_children():  # the first time it starts the workers
            images_of = iter(self.loader)
        for images in images_of:
            if isinstance(images, DataError):
                raise DataError(str(images))  # anew: this frame would hold itself, and the workers end late
            yield images.to(self.device, non_blocking=True)


def _as_it_is(images: Tensor | DataError) -> Tensor | DataError:
    return images


class StreamedPixels:
    """Large images with the reference's augmentation: crops from workers, colours in batches on the device."""

    def __init__(
        self,
        files: ImageFiles,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        workers: int = 0,
        decoder: str = "pil",
    ):
        """``size`` in pixels; ``workers``: processes that decode."""
        self.size, self.device = len(files), device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (mean, std))
        self.workers = Workers(Crops(files, size, decoder), workers, device)

    def augmented(self, order: Tensor, parts: Iterable[slice], seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """See :class:`datasets.loaders.Pixels`: random crop and flip, then colours, each image in its own order."""
        colours = [table[order].to(self.device) for table in draw_jitter(self.size, JITTER, seed, epoch)]
        parts = list(parts)
        crops = self.workers.read([order[part].numpy() for part in parts], (seed, epoch))
        return ((images, *(table[part] for table in colours)) for images, part in zip(crops, parts, strict=True))

    def develop(self, crops: Tensor, factors: Tensor, turns: Tensor) -> Tensor:
        """See :class:`datasets.loaders.Pixels`."""
        return normalise(jitter(crops, factors, turns), self.mean, self.std)

    def plain(self, parts: Iterable[slice]) -> Iterator[Tensor]:
        """See :class:`datasets.loaders.Pixels`: the middle of every image."""
        batches = [range(*part.indices(self.size)) for part in parts]
        return (normalise(images, self.mean, self.std) for images in self.workers.read(batches))


class StoredPixels(SmallPixels):
    """Small images that are too many for the device: workers hand them over, the rest happens there."""

    def __init__(
        self,
        stored: StoredImages,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        flip: bool = True,
        workers: int = 0,
    ):
        """``workers``: processes that read."""
        super().__init__(len(stored), stored.side, mean, std, device, flip)
        self.workers = Workers(Reader(stored), workers, device)

    def augmented(self, order: Tensor, parts: Iterable[slice], seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """See :class:`datasets.loaders.Pixels`."""
        draws, parts = self.draws(order, seed, epoch), list(parts)
        read = self.workers.read([order[part].numpy() for part in parts])
        return ((images, *(table[part] for table in draws)) for images, part in zip(read, parts, strict=True))

    def develop(self, images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """See :class:`datasets.loaders.Pixels`."""
        return self.cropped(images, offsets, flips)

    def plain(self, parts: Iterable[slice]) -> Iterator[Tensor]:
        """See :class:`datasets.loaders.Pixels`."""
        batches = [range(*part.indices(self.size)) for part in parts]
        return (normalise(images, self.mean, self.std) for images in self.workers.read(batches))
