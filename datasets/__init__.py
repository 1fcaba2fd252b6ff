"""Data sets: rows in :mod:`datasets.specs`, a long-tailed cut, and loaders over what it keeps."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.loaders import EvalLoader, TrainLoader
from datasets.long_tail import cut_counts, hold_out, long_tail_indices
from datasets.source import DataError, Split
from datasets.specs import DatasetSpec, find_spec

__all__ = ["Data", "DataError", "build_data", "find_spec"]

EVAL_BATCH = 500  # any size gives the same predictions; this one fits everywhere


@dataclass(frozen=True)
class Data:
    """A data set after the cut, decoded: images uint8 [N, H, W, 3], targets int64 [N]."""

    spec: DatasetSpec
    class_names: list[str]
    class_counts: Tensor  # int64 [C], training images per class after the cut
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor] | None  # held-out training images, the same number of each class
    test: tuple[Tensor, Tensor]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def train_loader(self, batch_size: int, seed: int, device: torch.device, rank: int, world_size: int) -> TrainLoader:
        spec = self.spec
        return TrainLoader(*self.train, batch_size, spec.mean, spec.std, spec.flip, seed, device, rank, world_size)

    def test_loader(self, device: torch.device) -> EvalLoader:
        return EvalLoader(*self.test, EVAL_BATCH, self.spec.mean, self.spec.std, device)

    def val_loader(self, device: torch.device) -> EvalLoader | None:
        """None where nothing is held out."""
        return self.val and EvalLoader(*self.val, EVAL_BATCH, self.spec.mean, self.spec.std, device)


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
) -> Data:
    """Reads a data set and cuts it. Raises :class:`DataError`.

    ``num_classes``: None, or what the configuration expects. ``imb_factor``: None leaves the counts as they are.
    ``subset_seed`` 0 keeps the reference's images. ``workers`` threads decode.
    """
    spec = find_spec(dataset)
    if image_size not in (None, spec.image_size) and not spec.any_size:
        raise DataError(f"image_size: {image_size}, but images of {dataset} have {spec.image_size} pixels")
    source = spec.read(Path(data_path), image_size or spec.image_size, workers)
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
    images, targets = _decoded(source.train, train)
    return Data(
        spec,
        source.class_names,
        torch.bincount(targets, minlength=classes),
        (images, targets),
        None if val is None else _decoded(source.train, val),
        _decoded(source.test, np.arange(len(source.test.targets))),
    )


def _decoded(split: Split, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.ascontiguousarray(split.load(chosen))), torch.from_numpy(split.targets[chosen])
