"""From a name in :mod:`datasets.specs` to loaders: read, hold out, cut to a long tail."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.image_cache import with_cache
from datasets.loaders import EvalLoader, ImageSource, InMemoryImages, TrainLoader
from datasets.long_tail import cut_counts, hold_out, long_tail_indices
from datasets.policies import STANDARD, Augmentation
from datasets.source import DataError, ImageFiles, Source, Split, StoredImages, hash_labels
from datasets.specs import SPECS, DatasetSpec, find_spec
from datasets.streaming import StreamedLargeImages, StreamedSmallImages
from utils import distributed

EVAL_BATCH = 500  # any size gives the same predictions; this one fits everywhere
STREAMED_EVAL_BATCH = 100
CPU = torch.device("cpu")


class Images(NamedTuple):
    """One split: pixels uint8 [N, H, W, 3] to be kept on the device, or a source to read them from; targets [N]."""

    images: Tensor | StoredImages | ImageFiles
    targets: Tensor


@dataclass(frozen=True)
class Data:
    """A data set after the cut."""

    spec: DatasetSpec
    class_names: list[str]
    class_counts: Tensor  # int64 [C], training images per class after the cut
    train: Images
    val: Images | None  # select the best epoch: training images held out, the same number of each class, or a list's
    test: Images
    image_size: int
    class_map: Tensor | None = None  # int64 [C], label in the lists -> class; None: no lists
    workers: int = 0
    decoder: str = "pil"
    label_hash: str = ""  # of the lists and of every image's label; the checkpoint's ``fingerprint``
    notes: list[str] = field(default_factory=list)  # for the log

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def content_hash(self) -> str:
        """Hash of everything trained and tested on: :attr:`label_hash`, and the pixels if they are in memory."""
        splits = [split.images for split in (self.train, self.val, self.test) if split is not None]
        if not all(isinstance(images, Tensor) for images in splits):
            return self.label_hash
        digest = hashlib.sha256(self.label_hash.encode())
        for images in splits:
            digest.update(images.cpu().numpy())
        return digest.hexdigest()

    @property
    def on_device(self) -> bool:
        return isinstance(self.train.images, Tensor)

    def train_loader(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        augmentation: Augmentation = STANDARD,
        paste_weights: Tensor | None = None,
    ) -> TrainLoader:
        """See :class:`TrainLoader`; ``augmentation``: what comes on top of crops and flips."""
        present = self.class_counts.nonzero().flatten().tolist()
        if len(present) == 1:
            raise DataError(
                f"data_path: all {len(self.train.targets)} training images are of one class, "
                f"{self.class_names[present[0]]!r}; there is nothing to learn with less than two"
            )
        pixels, targets = self._pixels(self.train, device, augmentation), self.train.targets
        return TrainLoader(pixels, targets, batch_size, seed, device, rank, world_size, accumulate, paste_weights)

    def plain_train_loader(
        self, device: torch.device, rank: int = 0, world_size: int = 1, pixels: ImageSource | None = None
    ) -> EvalLoader:
        """The training images in order. ``pixels``: a train loader's, to share its memory and workers."""
        return self._eval_loader(self.train, device, rank, world_size, pixels)

    def test_loader(self, device: torch.device, rank: int = 0, world_size: int = 1) -> EvalLoader:
        return self._eval_loader(self.test, device, rank, world_size)

    def val_loader(self, device: torch.device, rank: int = 0, world_size: int = 1) -> EvalLoader | None:
        """None if the data have no validation images."""
        return self.val and self._eval_loader(self.val, device, rank, world_size)

    def _eval_loader(
        self, split: Images, device: torch.device, rank: int, world_size: int, pixels: ImageSource | None = None
    ) -> EvalLoader:
        batch_size = STREAMED_EVAL_BATCH if self.spec.lists else EVAL_BATCH
        return EvalLoader(pixels or self._pixels(split, device), split.targets, batch_size, device, rank, world_size)

    def _pixels(self, split: Images, device: torch.device, augmentation: Augmentation = STANDARD) -> ImageSource:
        images, common = split.images, (self.spec.mean, self.spec.std, device)
        if isinstance(images, ImageFiles):
            options = (self.workers, self.decoder, augmentation)
            return StreamedLargeImages(images, self.image_size, *common, *options)
        if isinstance(images, StoredImages):
            return StreamedSmallImages(images, *common, self.spec.flip, augmentation, workers=self.workers)
        return InMemoryImages(images, *common, self.spec.flip, augmentation)


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
    test_txt: str = "",
    class_map: str | Sequence[int] = "",
    data_on_device: str | bool = "auto",
    data_cache: str | bool = False,
    device: torch.device = CPU,
) -> Data:
    """Read a data set and cut it to a long tail. Raises :class:`DataError`.

    Args:
        num_classes: as configured, or None. For ``lists``, None counts the training list's labels.
        imb_factor: smallest / largest class; None leaves the counts as they are.
        subset_seed: 0 keeps the reference's images.
        workers: processes that decode, with ``decoder`` (see :func:`datasets.decoding.open_rgb`).
        train_txt, val_txt, test_txt, class_map: for data sets that come as lists.
        data_cache: see :func:`datasets.image_cache.with_cache`.
        data_on_device: whether ``device`` keeps small images; "auto": if they fit into half of its memory.
    """
    spec = find_spec(dataset)
    if image_size not in (None, spec.image_size) and not spec.any_size:
        raise DataError(f"image_size: {image_size}, but images of {dataset} have {spec.image_size} pixels")
    image_size = image_size or spec.image_size
    lists = {"train_txt": train_txt, "val_txt": val_txt, "test_txt": test_txt, "class_map": class_map}
    source = _read(spec, dataset, Path(data_path), num_classes, image_size, workers, data_cache, lists)
    train, val = _cut(source, spec, imb_type, imb_factor, subset_seed, val_per_class)
    test, classes = source.test, len(source.class_names)
    size = sum(len(split.targets) for split in (train, val, test) if split) * image_size**2 * 3
    in_memory = _fits_on_device(data_on_device, dataset, spec, size, device)
    labelled = [([source.list_hash], train.targets), ([], test.targets)]
    return Data(
        spec=spec,
        class_names=source.class_names,
        class_counts=torch.from_numpy(np.bincount(train.targets, minlength=classes)),
        train=_images(train, in_memory),
        val=val and _images(val, in_memory),
        test=_images(test, in_memory),
        image_size=image_size,
        class_map=None if source.class_map is None else torch.from_numpy(source.class_map),
        workers=workers,
        decoder=decoder,
        label_hash=hash_labels(labelled),
        notes=source.notes,
    )


def _read(
    spec: DatasetSpec,
    name: str,
    data_path: Path,
    num_classes: int | None,
    image_size: int,
    workers: int,
    cache: str | bool,
    lists: dict,
) -> Source:
    """Read the labels; ``num_classes``: as configured, or None. ``lists``: options that only lists have."""
    lists = {option: value for option, value in lists.items() if len(value)}
    if lists and spec.lists is None:
        known = [other for other, row in SPECS.items() if row.lists]
        raise DataError(f"{next(iter(lists))}: {name} does not come as lists; only {', '.join(known)} do")
    if spec.lists is None:
        source = with_cache(spec.read(data_path, image_size, workers), data_path, cache)
    else:
        source = spec.lists.read(data_path, spec.num_classes or num_classes, **lists)
    found = len(source.class_names)
    if spec.num_classes not in (None, found):
        raise DataError(f"data_path: {data_path} has {found} classes, {name} has {spec.num_classes}")
    if num_classes not in (None, found):
        raise DataError(f"num_classes: {num_classes}, but {name} in {data_path} has {found}; set that, or null")
    return source


def _cut(
    source: Source, spec: DatasetSpec, imb_type: str, imb_factor: float | None, subset_seed: int, val_per_class: int
) -> tuple[Split, Split | None]:
    """Training and validation images: some are held out, then the rest is cut to a long tail."""
    train, val, classes = source.train, source.val, len(source.class_names)
    if val_per_class and val:
        raise DataError(f"val_per_class: {val_per_class}, but the images of val_txt select the best epoch; use 0")
    if val_per_class:
        rest, held_out = hold_out(train.targets, val_per_class, source.class_names, subset_seed)
        train, val = train.select(rest), train.select(held_out)
    if imb_factor is not None:
        counts = cut_counts(np.bincount(train.targets, minlength=classes), imb_type, imb_factor, spec.ranked_cut)
        train = train.select(long_tail_indices(train.targets, counts, subset_seed))
    return train, val


def _fits_on_device(wanted: str | bool, name: str, spec: DatasetSpec, size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes of images are kept in the device's memory; ``wanted``: ``data_on_device``."""
    if spec.lists is not None:
        if wanted is True:
            raise DataError(f"data_on_device: True, but the images of {name} stay in their files; use auto or False")
        return False
    if wanted is False:
        return False
    limit = _memory(device) // (1 if wanted is True else 2)
    if wanted is True and size > limit:
        raise DataError(
            f"data_on_device: True, but the images need {size / 2**30:.1f} GiB and {device} has {limit / 2**30:.1f}; "
            "use auto or False"
        )
    return size <= limit


def _memory(device: torch.device) -> int:
    """Bytes this process may use: what is free on a CUDA device, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):  # Windows: a guess; data_on_device says otherwise
        return 8 * 2**30 // distributed.processes_here()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // distributed.processes_here()


def _images(split: Split, in_memory: bool) -> Images:
    images = torch.from_numpy(np.ascontiguousarray(split.images.read())) if in_memory else split.images
    return Images(images, torch.from_numpy(split.targets))
