"""Data sets: rows in :mod:`datasets.specs`, a long-tailed cut, and loaders over what it keeps."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.loaders import EvalLoader, MemoryPixels, Pixels, TrainLoader
from datasets.long_tail import cut_counts, hold_out, long_tail_indices
from datasets.source import DataError, ImageFiles, Source, Split, StoredImages, fingerprint
from datasets.specs import DatasetSpec, find_spec
from datasets.streaming import StoredPixels, StreamedPixels
from utils import distributed

__all__ = ["Data", "DataError", "build_data", "find_spec"]

EVAL_BATCH = 500  # any size gives the same predictions; this one fits everywhere
STREAMED_EVAL_BATCH = 100
CPU = torch.device("cpu")


class Images(NamedTuple):
    """One part of the data: images uint8 [N, H, W, 3] for the device's memory, or where they are read; targets [N]."""

    images: Tensor | StoredImages | ImageFiles
    targets: Tensor


@dataclass(frozen=True)
class Data:
    """A data set after the cut."""

    spec: DatasetSpec
    class_names: list[str]
    class_counts: Tensor  # int64 [C], training images per class after the cut
    train: Images
    val: Images | None  # held-out training images, the same number of each class
    test: Images
    class_map: Tensor | None  # int64 [C], label in the lists -> class; None: there are no lists
    image_size: int
    workers: int
    decoder: str
    fingerprint: str = ""  # hash of the lists, and of which label every image has

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def checksum(self) -> str:
        """A hash of all that is trained and tested on: :attr:`fingerprint`, and the pixels where they lie in memory."""
        parts = [part.images for part in (self.train, self.val, self.test) if part is not None]
        if not all(isinstance(images, Tensor) for images in parts):
            return self.fingerprint
        digest = hashlib.sha256(self.fingerprint.encode())
        for images in parts:
            digest.update(images.cpu().numpy())
        return digest.hexdigest()

    @property
    def on_device(self) -> bool:
        """Whether the images live in the device's memory."""
        return isinstance(self.train.images, Tensor)

    def train_loader(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> TrainLoader:
        """See :class:`TrainLoader`."""
        present = self.class_counts.nonzero().flatten().tolist()
        if len(present) == 1:
            raise DataError(
                f"data_path: all {len(self.train.targets)} training images are of one class, "
                f"{self.class_names[present[0]]!r}; there is nothing to learn with less than two"
            )
        pixels, targets = self._pixels(self.train, device), self.train.targets
        return TrainLoader(pixels, targets, batch_size, seed, device, rank, world_size, accumulate)

    def plain_train_loader(
        self, device: torch.device, rank: int = 0, world_size: int = 1, pixels: Pixels | None = None
    ) -> EvalLoader:
        """The training images without augmentation, in order.

        ``pixels``: those of a train loader, whose memory and workers this one then shares.
        """
        return self._eval_loader(self.train, device, rank, world_size, pixels)

    def test_loader(self, device: torch.device, rank: int = 0, world_size: int = 1) -> EvalLoader:
        """See :class:`EvalLoader`."""
        return self._eval_loader(self.test, device, rank, world_size)

    def val_loader(self, device: torch.device, rank: int = 0, world_size: int = 1) -> EvalLoader | None:
        """None where nothing is held out."""
        return self.val and self._eval_loader(self.val, device, rank, world_size)

    def _eval_loader(
        self, part: Images, device: torch.device, rank: int, world_size: int, pixels: Pixels | None = None
    ) -> EvalLoader:
        batch_size = STREAMED_EVAL_BATCH if self.spec.lists else EVAL_BATCH
        return EvalLoader(pixels or self._pixels(part, device), part.targets, batch_size, device, rank, world_size)

    def _pixels(self, part: Images, device: torch.device) -> Pixels:
        mean, std = self.spec.mean, self.spec.std
        if isinstance(part.images, ImageFiles):
            return StreamedPixels(part.images, self.image_size, mean, std, device, self.workers, self.decoder)
        if isinstance(part.images, StoredImages):
            return StoredPixels(part.images, mean, std, device, self.spec.flip, self.workers)
        return MemoryPixels(part.images, mean, std, device, self.spec.flip)


def build_data(
    dataset: str,
    data_path: str,
    num_classes: int | None = None,
    image_size: int | None = None,
    imb_type: str = "exp",
    imb_factor: float | None = None,
    subset_seed: int = 0,
    val_per_class: int = 0,
    workers: int = 0,
    decoder: str = "pil",
    train_txt: str = "",
    val_txt: str = "",
    class_map: str | Sequence[int] = "",
    data_on_device: str | bool = "auto",
    device: torch.device = CPU,
) -> Data:
    """Reads a data set and cuts it. Raises :class:`DataError`.

    ``num_classes``: None, or what the configuration expects. ``imb_factor``: None leaves the counts as they are.
    ``subset_seed`` 0 keeps the reference's images. ``workers`` threads or processes decode, with ``decoder`` (see
    :func:`datasets.decoding.open_rgb`). ``train_txt``, ``val_txt``, ``class_map`` are for data sets that come as lists.
    ``data_on_device``: small images live on ``device`` (True), are read batch by batch (False), or live there where all
    of them fit into half of what it has ("auto").
    """
    spec = find_spec(dataset)
    if image_size not in (None, spec.image_size) and not spec.any_size:
        raise DataError(f"image_size: {image_size}, but images of {dataset} have {spec.image_size} pixels")
    image_size = image_size or spec.image_size
    lists = {"train_txt": train_txt, "val_txt": val_txt, "class_map": class_map}
    source = _read(spec, dataset, Path(data_path), image_size, workers, {k: v for k, v in lists.items() if len(v)})
    classes = len(source.class_names)
    if spec.num_classes not in (None, classes):
        raise DataError(f"data_path: {data_path} has {classes} classes, {dataset} has {spec.num_classes}")
    if num_classes not in (None, classes):
        raise DataError(f"num_classes: {num_classes}, but {dataset} in {data_path} has {classes}")
    train, val = np.arange(len(source.train.targets)), None
    if val_per_class:
        train, val = hold_out(source.train.targets, val_per_class, source.class_names, subset_seed)
    if imb_factor is not None:
        natural = np.bincount(source.train.targets[train], minlength=classes)
        counts = cut_counts(natural, imb_type, imb_factor, spec.ranked_cut)
        train = train[long_tail_indices(source.train.targets[train], counts, subset_seed)]
    test = np.arange(len(source.test.targets))
    needed = sum(len(part) for part in (train, val, test) if part is not None) * image_size**2 * 3
    images = partial(_images, side=image_size, resident=_on_device(data_on_device, dataset, spec, needed, device))
    kept, tested = images(source.train, train), images(source.test, test)
    return Data(
        spec,
        source.class_names,
        torch.bincount(kept.targets, minlength=classes),
        kept,
        None if val is None else images(source.train, val),
        tested,
        None if source.class_map is None else torch.from_numpy(source.class_map),
        image_size,
        workers,
        decoder,
        fingerprint([([source.listed], kept.targets.numpy()), ([], tested.targets.numpy())]),
    )


def _read(spec: DatasetSpec, name: str, data_path: Path, image_size: int, workers: int, lists: dict) -> Source:
    if spec.lists is not None:
        return spec.lists.read(data_path, spec.num_classes, **lists)
    if lists:
        raise DataError(f"{next(iter(lists))}: {name} does not come as lists; only imagenet, ina2018 and places do")
    return spec.read(data_path, image_size, workers)


def _on_device(wanted: str | bool, name: str, spec: DatasetSpec, needed: int, device: torch.device) -> bool:
    """Whether ``needed`` bytes of images go to the device's memory."""
    if spec.lists is not None:
        if wanted is True:
            raise DataError(f"data_on_device: True, but the images of {name} stay in their files; use auto or False")
        return False
    if wanted is False:
        return False
    limit = _memory(device) // (1 if wanted is True else 2)
    if wanted is True and needed > limit:
        raise DataError(
            f"data_on_device: True, but the images need {needed / 2**30:.1f} GiB and {device} has {limit / 2**30:.1f}; "
            "use auto or False"
        )
    return needed <= limit


def _memory(device: torch.device) -> int:
    """Bytes that this process may count on: what is free on a CUDA device, its share of what a machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // distributed.processes_here()


def _images(split: Split, chosen: np.ndarray, side: int, resident: bool) -> Images:
    targets = torch.from_numpy(split.targets[chosen])
    if split.load is None:
        return Images(split.files.select(chosen), targets)
    if not resident:
        return Images(StoredImages(split.load, chosen, side), targets)
    return Images(torch.from_numpy(np.ascontiguousarray(split.load(chosen))), targets)
