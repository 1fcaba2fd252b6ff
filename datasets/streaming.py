"""Images that stay in their files: workers decode, crop and mirror; colours and normalisation are the device's.

A worker holds a copy of the data set that lives as long as the training does, so all that changes comes with the
request: a crop is a function of (seed, epoch, index), and the number of workers cannot change what is trained on.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.augment import central_crop, draw_jitter, jitter, normalise, random_crop
from datasets.decoding import open_rgb
from datasets.source import DataError, ImageFiles
from utils.seed import generator

JITTER = 0.4  # of brightness, contrast and saturation, as in the reference
Request = tuple[int, tuple[int, int] | None]  # index, and (seed, epoch) of a random crop or None for the middle


class Crops(Dataset):
    """What a worker does: a batch of requests -> uint8 [B, S, S, 3], or the :class:`DataError` that it met.

    An error is handed over as a value: raised in a worker, its one line would come back inside a traceback.
    """

    def __init__(self, files: ImageFiles, size: int, decoder: str):
        self.files, self.size, self.decoder = files, size, decoder

    def __getitems__(self, requests: Sequence[Request]) -> Tensor | DataError:
        try:
            return torch.from_numpy(np.stack([self._crop(*request) for request in requests]))
        except DataError as error:
            return error

    def _crop(self, index: int, draw: tuple[int, int] | None) -> np.ndarray:
        image = open_rgb(self.files.path(index), self.decoder)
        if draw is None:
            return central_crop(image, self.size)
        return random_crop(image, self.size, generator(*draw, "crop", index))


class Requests(Sampler):
    """The batches of requests of one pass over the data; set anew before every pass."""

    def __init__(self):
        self.batches: Sequence[Sequence[int]] = []
        self.draw: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[list[Request]]:
        return ([(index, self.draw) for index in batch] for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class StreamedPixels:
    """Large images with the reference's augmentation, in batches of their own on the device."""

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
        """``size`` in pixels; ``workers``: processes that decode, which stay alive (0: this one decodes)."""
        self.size, self.device = len(files), device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (mean, std))
        self.requests = Requests()
        self.loader = DataLoader(
            Crops(files, size, decoder),
            batch_sampler=self.requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # a loader draws a seed for its workers; not from the global generator
        )

    def augmented(self, order: Tensor, parts: Iterable[slice], seed: int, epoch: int) -> Iterator[Tensor]:
        """See :class:`datasets.loaders.Pixels`: random crop and flip, then colours, each image in its own order."""
        colours = draw_jitter(self.size, JITTER, seed, epoch)
        chosen = [order[part] for part in parts]
        crops = self._crops([indices.numpy() for indices in chosen], (seed, epoch))
        for images, indices in zip(crops, chosen, strict=True):
            factors, turns = (table[indices].to(self.device, non_blocking=True) for table in colours)
            yield normalise(jitter(images, factors, turns), self.mean, self.std)

    def plain(self, parts: Iterable[slice]) -> Iterator[Tensor]:
        """See :class:`datasets.loaders.Pixels`: the middle of every image."""
        batches = [range(*part.indices(self.size)) for part in parts]
        return (normalise(images, self.mean, self.std) for images in self._crops(batches, None))

    def _crops(self, batches: Sequence[Sequence[int]], draw: tuple[int, int] | None) -> Iterator[Tensor]:
        self.requests.batches, self.requests.draw = batches, draw
        for images in self.loader:
            if isinstance(images, DataError):
                raise DataError(str(images))  # anew: this frame would hold itself, and the workers end late
            yield images.to(self.device, non_blocking=True)


def _as_it_is(crops: Tensor | DataError) -> Tensor | DataError:
    return crops
