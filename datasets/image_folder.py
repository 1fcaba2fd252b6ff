"""Class folders: ``<data_path>/train/<class>/<images>`` and ``<data_path>/test/<class>/<images>``.

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

from datasets.decoding import FORMATS, open_rgb
from datasets.folders import hidden, walk
from datasets.source import DataError, Source, Split, as_text
from datasets.streaming import Request, Workers

EXTENSIONS = frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)
OTHERS = frozenset(Image.registered_extensions()) - EXTENSIONS
CHUNK, CHUNK_BYTES = 256, 2**20  # what a worker decodes at once at most: its shared memory may be 64 MiB in all
LAYOUT = "train/<class>/<images> and test/<class>/<images>"


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
    if not os.path.isdir(data_path / "train"):
        raise DataError(f"data_path: {data_path / 'train'} is no folder; expected are {LAYOUT} under {data_path}")
    test = next((data_path / name for name in ("test", "val") if os.path.isdir(data_path / name)), None)
    if test is None:
        raise DataError(f"data_path: {data_path} has neither test nor val; expected are {LAYOUT}")
    classes = _classes(data_path / "train")
    strange = set(_classes(test)) - set(classes)
    if strange:
        raise DataError(f"data_path: {test / min(strange)} is a class that {data_path / 'train'} does not have")
    index = {name: label for label, name in enumerate(classes)}
    splits = (_split(folder, index, image_size, workers, decode) for folder in (data_path / "train", test))
    return Source(*splits, class_names=[as_text(name) for name in classes])


def _classes(folder: Path) -> list[str]:
    try:
        entries = [entry for entry in folder.iterdir() if not hidden(entry.name)]
    except OSError as error:
        raise DataError(f"data_path: {folder}: cannot be read: {error.strerror}") from None
    names = sorted(entry.name for entry in entries if os.path.isdir(entry))
    if not names:
        raise DataError(f"data_path: {folder} has no class folders; expected are {LAYOUT}")
    loose = [entry for entry in entries if entry.name not in names and entry.suffix.lower() in EXTENSIONS | OTHERS]
    if loose:
        raise DataError(f"{min(loose)}: lies in no class folder; expected are {LAYOUT}")
    return names


def _images(folder: Path) -> list[str]:
    """All images in ``folder``, in the order of torchvision's ImageFolder.

    Those of a format that is not read are named; other files are nobody's business.
    """
    found = []
    for where, files in sorted(walk(folder)):
        for file in sorted(files):
            extension = os.path.splitext(file)[1].lower()
            if hidden(file):
                continue
            if extension in OTHERS:
                raise DataError(f"{Path(where, file)}: images must be {', '.join(FORMATS)}; convert it or move it away")
            if extension in EXTENSIONS:
                found.append(os.path.join(where, file))
    return found


def _split(folder: Path, index: dict[str, int], size: int, workers: int, decode: Callable) -> Split:
    paths, labels = [], []
    for name, label in index.items():
        if os.path.isdir(folder / name):  # a class may have no test images
            images = _images(folder / name)
            paths += images
            labels += [label] * len(images)
    if not paths:
        raise DataError(f"data_path: {folder} holds no images; expected are {LAYOUT}")
    return Split(np.array(labels, dtype=np.int64), Decoder(paths, size, workers, decode))


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
