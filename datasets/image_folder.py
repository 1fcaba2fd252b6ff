"""Class folders: ``<data_path>/train/<class>/<images>`` and ``<data_path>/test/<class>/<images>``.

Classes are the folders under ``train``, in alphabetical order. ``val`` is read if there is no ``test``.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from datasets.decoding import FORMATS, conversion_notes, open_rgb
from datasets.folders import is_skipped, walk
from datasets.source import DataError, Source, Split, StoredImages, as_text
from datasets.streaming import Request, Workers

EXTENSIONS = frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)
OTHERS = frozenset(Image.registered_extensions()) - EXTENSIONS
CHUNK, CHUNK_BYTES = 256, 2**20  # most images and bytes a worker decodes at once: shared memory may be 64 MiB in all
LAYOUT = "train/<class>/<images> and test/<class>/<images>"


def decode(path: str, size: int) -> np.ndarray:
    """Scale the shorter side to ``size`` and crop the centre: RGB, uint8 [size, size, 3]."""
    image = open_rgb(path)
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        image = image.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def decode_exact(path: str, size: int) -> np.ndarray:
    """As :func:`decode`, but refuses images of any other size."""
    image = open_rgb(path)
    if image.size != (size, size):
        raise DataError(
            f"{path}: is {image.width}x{image.height} pixels, this data set has {size}x{size}; "
            "dataset: folder takes images of any size"
        )
    return np.asarray(image)


def read(data_path: Path, image_size: int, workers: int, decode: Callable = decode) -> Source:
    """Read the class folders under ``data_path``; ``workers`` processes decode (0: this one)."""
    if not os.path.isdir(data_path / "train"):
        raise DataError(f"data_path: {data_path / 'train'} is no folder; expected are {LAYOUT} under {data_path}")
    test = next((data_path / name for name in ("test", "val") if os.path.isdir(data_path / name)), None)
    if test is None:
        raise DataError(f"data_path: {data_path} has neither test nor val; expected are {LAYOUT}")
    skipped: list[str] = []
    classes = _classes(data_path / "train", skipped)
    unknown = set(_classes(test, skipped)) - set(classes)
    if unknown:
        raise DataError(f"data_path: {test / min(unknown)} is a class that {data_path / 'train'} does not have")
    load = partial(_split, classes=classes, size=image_size, workers=workers, decode=decode, skipped=skipped)
    train, test = load(data_path / "train"), load(test)
    notes = []
    if skipped:
        first = as_text(os.path.relpath(min(skipped), data_path))
        notes = [f"data_path: {len(skipped)} hidden or other files and folders skipped, such as {first}"]
    for title, split in (("train", train), ("test", test)):
        paths = split.images.load.paths
        notes += conversion_notes(title, len(paths), paths.__getitem__)
    return Source(train, test, [as_text(name) for name in classes], notes=notes)


def _classes(folder: Path, skipped: list[str]) -> list[str]:
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"data_path: {folder}: cannot be read: {error.strerror}") from None
    folders = {entry.name for entry in entries if os.path.isdir(entry) and not is_skipped(entry.name)}
    if not folders:
        raise DataError(f"data_path: {folder} has no class folders; expected are {LAYOUT}")
    others = [entry for entry in entries if entry.name not in folders]
    loose = [e for e in others if not is_skipped(e.name) and e.suffix.lower() in EXTENSIONS | OTHERS]
    if loose:
        raise DataError(f"{min(loose)}: lies in no class folder; expected are {LAYOUT}")
    skipped += map(str, others)
    return sorted(folders)


def _images(folder: Path, skipped: list[str]) -> list[str]:
    """All images in ``folder``, in the order of torchvision's ImageFolder; refuses formats that are not read."""
    found = []
    for where, files in sorted(walk(folder, skipped)):
        for file in sorted(files):
            path, extension = os.path.join(where, file), os.path.splitext(file)[1].lower()
            if extension in OTHERS:
                raise DataError(f"{path}: images must be {', '.join(FORMATS)}; convert it or move it away")
            (found if extension in EXTENSIONS else skipped).append(path)
    return found


def _split(folder: Path, classes: list[str], size: int, workers: int, decode: Callable, skipped: list[str]) -> Split:
    paths, labels = [], []
    for label, name in enumerate(classes):
        if os.path.isdir(folder / name):  # a class may have no test images
            images = _images(folder / name, skipped)
            paths += images
            labels += [label] * len(images)
    if not paths:
        raise DataError(f"data_path: {folder} holds no images; expected are {LAYOUT}")
    images = StoredImages(Decoder(paths, size, workers, decode), np.arange(len(paths)), size)
    return Split(np.array(labels, dtype=np.int64), images)


@dataclass(frozen=True)
class Decoder:
    """Indices [n] -> uint8 [n, size, size, 3]."""

    paths: list[str]
    size: int
    workers: int
    decode: Callable[[str, int], np.ndarray]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        if len(indices) < 4 * CHUNK or get_worker_info():  # a worker cannot have workers of its own
            for place, index in enumerate(indices):
                images[place] = self.decode(self.paths[index], self.size)
            return images
        chunk = min(CHUNK, max(1, CHUNK_BYTES // (3 * self.size**2)))
        parts = [range(n, min(n + chunk, len(indices))) for n in range(0, len(indices), chunk)]
        workers = Workers(self._decode_batch, self.workers, torch.device("cpu"))
        requests = ([(index, None) for index in indices[part]] for part in parts)
        for part, decoded in zip(parts, workers.read(requests), strict=True):
            images[part] = decoded
        return images

    def _decode_batch(self, requests: Sequence[Request]) -> Tensor:
        return torch.from_numpy(np.stack([self.decode(self.paths[index], self.size) for index, _ in requests]))
