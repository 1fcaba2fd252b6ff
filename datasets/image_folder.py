"""Class folders: ``<data_path>/train/<class>/*.{png,jpg,jpeg}`` and ``<data_path>/test/<class>/...``.

Classes are the folders under ``train``, in alphabetical order. ``val`` is read where there is no ``test``.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.datasets.folder import make_dataset

from datasets.decoding import open_rgb
from datasets.source import DataError, Source, Split
from datasets.streaming import Request, Workers

EXTENSIONS = (".png", ".jpg", ".jpeg")
CHUNK, CHUNK_BYTES = 256, 2**20  # what a worker decodes at once at most: its shared memory may be 64 MiB in all
LAYOUT = "train/<class>/*.{png,jpg,jpeg} and test/<class>/*.{png,jpg,jpeg}"


def decode(path: str, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3]: RGB, the shorter side scaled to ``size``, the middle cut out."""
    image = open_rgb(path)
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        image = image.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def decode_exact(path: str, size: int) -> np.ndarray:
    """As :func:`decode`, for data sets whose images have one size: any other is refused."""
    image = open_rgb(path)
    if image.size != (size, size):
        raise DataError(
            f"{path}: is {image.width}x{image.height} pixels, this data set has {size}x{size}; "
            "dataset: folder takes images of any size"
        )
    return np.asarray(image)


def read(data_path: Path, image_size: int, workers: int, decode: Callable = decode) -> Source:
    """The class folders under ``data_path``; ``workers`` processes decode (0: this one)."""
    if not (data_path / "train").is_dir():
        raise DataError(f"data_path: {data_path / 'train'} is no folder; expected are {LAYOUT} under {data_path}")
    test = next((data_path / name for name in ("test", "val") if (data_path / name).is_dir()), None)
    if test is None:
        raise DataError(f"data_path: {data_path} has neither test nor val; expected are {LAYOUT}")
    classes = _classes(data_path / "train")
    strange = set(_classes(test)) - set(classes)
    if strange:
        raise DataError(f"data_path: {test / min(strange)} is a class that {data_path / 'train'} does not have")
    index = {name: label for label, name in enumerate(classes)}
    splits = (_split(folder, index, image_size, workers, decode) for folder in (data_path / "train", test))
    return Source(*splits, class_names=classes)


def _hidden(name: str) -> bool:
    """Names that tools leave behind, such as .ipynb_checkpoints or ._image.png."""
    return name.startswith(".")


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS) and not _hidden(os.path.basename(path))


def _classes(folder: Path) -> list[str]:
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name)]
    if not names:
        raise DataError(f"data_path: {folder} has no class folders; expected are {LAYOUT}")
    return sorted(names)


def _refuse_other_images(folder: Path, index: dict[str, int]) -> None:
    """Images that would be passed over in silence, such as .webp, are named; other files are nobody's business."""
    strange = set(Image.registered_extensions()) - set(EXTENSIONS)
    for name in index:
        for where, _, files in sorted(os.walk(folder / name)):
            for file in sorted(files):
                if os.path.splitext(file)[1].lower() in strange and not _hidden(file):
                    raise DataError(f"{Path(where, file)}: images must be png, jpg or jpeg; convert it or move it away")


def _split(folder: Path, index: dict[str, int], size: int, workers: int, decode: Callable) -> Split:
    samples = make_dataset(str(folder), index, is_valid_file=_is_image, allow_empty=True)
    _refuse_other_images(folder, index)
    if not samples:
        raise DataError(f"data_path: {folder} holds no images; expected are {LAYOUT}")
    load = Decoder([path for path, _ in samples], size, workers, decode)
    return Split(np.array([label for _, label in samples], dtype=np.int64), load)


@dataclass(frozen=True)
class Decoder:
    """Indices [n] -> uint8 [n, size, size, 3]."""

    paths: list[str]
    size: int
    workers: int
    decode: Callable[[str, int], np.ndarray]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        if len(indices) < 4 * CHUNK or get_worker_info():  # a worker is one of many already
            for place, index in enumerate(indices):
                images[place] = self.decode(self.paths[index], self.size)
            return images
        chunk = min(CHUNK, max(1, CHUNK_BYTES // (3 * self.size**2)))
        parts = [range(n, min(n + chunk, len(indices))) for n in range(0, len(indices), chunk)]
        workers = Workers(self._decoded, self.workers, torch.device("cpu"))
        read = workers.read([indices[part] for part in parts])
        for part, decoded in zip(parts, read, strict=True):
            images[part] = decoded
        return images

    def _decoded(self, requests: Sequence[Request]) -> Tensor:
        return torch.from_numpy(np.stack([self.decode(self.paths[index], self.size) for index, _ in requests]))
