"""scikit-learn's bundled handwritten digits: 1,797 real scans of 8x8 pixels, no download.

The last 40 images of each class are the test set. The file is sorted by writer, so most test images come from writers
who are not in the training set.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from datasets.source import Source, Split, StoredImages

TEST_PER_CLASS = 40


def read(data_path: Path, image_size: int, workers: int) -> Source:
    """The digits as grey RGB images of ``image_size`` pixels; ``data_path`` and ``workers`` are ignored."""
    from sklearn.datasets import load_digits  # here: the import takes a second

    digits = load_digits()
    targets = digits.target.astype(np.int64)
    positions = [np.flatnonzero(targets == label) for label in range(10)]
    train = np.sort(np.concatenate([p[:-TEST_PER_CLASS] for p in positions]))
    test = np.sort(np.concatenate([p[-TEST_PER_CLASS:] for p in positions]))
    images = np.stack([_enlarge(scan, image_size) for scan in digits.images])
    stored = StoredImages(images.__getitem__, np.arange(len(images)), image_size)
    splits = (Split(targets[part], stored.select(part)) for part in (train, test))
    return Source(*splits, class_names=[str(label) for label in range(10)])


def _enlarge(scan: np.ndarray, size: int) -> np.ndarray:
    """Ink 0 .. 16, [8, 8] -> uint8 [size, size, 3]."""
    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)).resize((size, size), Image.BILINEAR)
    return np.asarray(grey.convert("RGB"))
