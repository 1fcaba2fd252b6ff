"""CIFAR-10 and CIFAR-100, from torchvision's archive (downloaded if it is missing) or from class folders."""

import contextlib
import http.client
import os
from pathlib import Path

import numpy as np
import torchvision

from datasets import image_folder
from datasets.source import DataError, Source, Split, StoredImages
from utils import distributed

SIZE = 32


def read(archive: type[torchvision.datasets.CIFAR10], data_path: Path, image_size: int, workers: int) -> Source:
    """Read ``archive`` or class folders; images of any other size than 32 pixels are refused."""
    if os.path.isdir(data_path / "train"):
        return image_folder.read(data_path, SIZE, workers, decode=image_folder.decode_exact)
    new = [folder for folder in (data_path, *data_path.parents) if not os.path.exists(folder)]
    with distributed.main_first():
        try:
            train, test = (archive(data_path, train=part, download=True) for part in (True, False))
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            with contextlib.suppress(OSError, ValueError):  # leave no empty folders of the download behind
                for folder in new:
                    folder.rmdir()
            raise DataError(
                f"data_path: {data_path} holds no {archive.__name__}, and it could not be downloaded "
                f"({' '.join(str(error).split())}): put {archive.filename} or its folder {archive.base_folder} there, "
                f"or images as {image_folder.LAYOUT}"
            ) from None
    return Source(_split(train), _split(test), train.classes)


def _split(archive: torchvision.datasets.CIFAR10) -> Split:
    targets = np.array(archive.targets, dtype=np.int64)
    return Split(targets, StoredImages(archive.data.__getitem__, np.arange(len(targets)), SIZE))
