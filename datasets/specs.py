"""One row per data set: what differs between data sets is data, not code."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100

from datasets import cifar, digits, image_folder
from datasets.image_list import ImageLists
from datasets.source import DataError, Source

Ranges = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Published:
    """Published numbers of images, in all and per class, and MiSLAS's lists."""

    train: int
    test: int
    largest: int  # training images of the most frequent class
    smallest: int
    train_blob: str  # git's id of the list
    test_blob: str


@dataclass(frozen=True)
class DatasetSpec:
    read: Callable[[Path, int, int], Source] | None  # (data_path, image_size, workers); None: see lists
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    num_classes: int | None = None  # None: as many as the reader finds
    shot_ranges: Ranges | None = None  # [first, last + 1] of many, medium, few; None: groups by count
    flip: bool = True
    ranked_cut: bool = False  # True: the cut follows the natural counts; False: the class index
    any_size: bool = False  # the reader scales images to image_size
    image_size: int = 32  # default in pixels
    lists: ImageLists | None = None  # of files, which workers decode on demand
    published: Published | None = None


CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE = {"ranked_cut": True, "any_size": True, "image_size": 224}
INAT_MEAN, INAT_STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)


def _list_row(lists: ImageLists, mean: tuple, std: tuple, bounds: tuple[int, int, int], published: Published):
    """A data set that comes as lists; ``bounds``: where many, medium and few end."""
    ranges = tuple(pairwise((0, *bounds)))
    return DatasetSpec(None, mean, std, bounds[2], ranges, lists=lists, published=published, **LARGE)


SPECS = {
    "cifar10": DatasetSpec(partial(cifar.read, CIFAR10), CIFAR_MEAN, CIFAR_STD, 10, ((0, 3), (3, 7), (7, 10))),
    "cifar100": DatasetSpec(partial(cifar.read, CIFAR100), CIFAR_MEAN, CIFAR_STD, 100, ((0, 36), (36, 71), (71, 100))),
    # Mean and deviation of the 1,797 scans; a mirrored digit is another sign, so there are no flips.
    "digits": DatasetSpec(
        digits.read, (0.305,) * 3, (0.376,) * 3, 10, ((0, 3), (3, 7), (7, 10)), flip=False, any_size=True
    ),
    "folder": DatasetSpec(image_folder.read, IMAGENET_MEAN, IMAGENET_STD, ranked_cut=True, any_size=True),
    "lists": DatasetSpec(None, IMAGENET_MEAN, IMAGENET_STD, lists=ImageLists(("train.txt",), ("val.txt",)), **LARGE),
    "imagenet": _list_row(
        ImageLists(("ImageNet_LT_train.txt",), ("ImageNet_LT_test.txt",)),
        IMAGENET_MEAN,
        IMAGENET_STD,
        (390, 835, 1000),
        Published(
            *(115_846, 50_000, 1280, 5),
            "a063f095fcd475db4cf8b0658c4b73955535bbf9",
            "76a2fb9749d6cd29e765cc4f8c270f2504131e2f",
        ),
    ),
    "ina2018": _list_row(
        ImageLists(("iNaturalist18_train.txt", "train2018.json"), ("iNaturalist18_val.txt", "val2018.json")),
        INAT_MEAN,
        INAT_STD,
        (842, 4543, 8142),
        Published(
            *(437_513, 24_426, 1000, 2),
            "4accdb7584d2f0a5106c40a33ed6afa392189bcc",
            "4c23900857fd0f5adcd4cc0dffef345039eeb05f",
        ),
    ),
    "places": _list_row(
        ImageLists(("Places_LT_train.txt",), ("Places_LT_test.txt",), ("data_256", "train"), ("val_256", "val")),
        IMAGENET_MEAN,
        IMAGENET_STD,
        (131, 288, 365),
        Published(
            *(62_500, 36_500, 4980, 5),
            "1d608b558c25c271da75c06f1e5e3625a4ebcb79",
            "d43400ac9bc2275baa058456da40b20abb50b108",
        ),
    ),
}


def find_spec(name: str) -> DatasetSpec:
    """The row called ``name``. Raises :class:`DataError` that lists the known names."""
    if name not in SPECS:
        raise DataError(f"dataset: {name!r} is unknown; known are {', '.join(SPECS)}")
    return SPECS[name]
