"""Small data sets in the form of the large ones: real JPEG files, and lists with the true number of classes."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from datasets.specs import find_spec

PATTERNS = {  # as the published lists name their images; {c} is the label, {i} the number of the image
    "imagenet": ("train/n{c:08d}/n{c:08d}_{i}.JPEG", "val/n{c:08d}/ILSVRC2012_val_{i:08d}.JPEG"),
    "ina2018": ("train_val2018/Plantae/{c}/{i:032x}.jpg", "train_val2018/Plantae/{c}/{i:030x}ff.jpg"),
    "places": ("data_256/s/scene/kind{c}/{i:08d}.jpg", "val_256/Places365_val_{i:08d}.jpg"),
}
CLASSES = 6  # that have images; all others are empty


def make_tree(root: Path, dataset: str, train: int = 64, test: int = 31) -> Path:
    """``root / dataset`` with its two lists and their images: parts of scikit-learn's two photographs.

    Half of the training images are of the first class that has any, half of the rest of the second, and so on.
    """
    spec = find_spec(dataset)
    random = np.random.default_rng(0)
    photos = load_sample_images().images
    labels = random.permutation(spec.num_classes)[:CLASSES]
    names = (spec.lists.train[0], spec.lists.test[0])
    for size, pattern, name, decays in zip((train, test), PATTERNS[dataset], names, (True, False), strict=True):
        lines = []
        for i in range(size):
            number = min(int(-np.log2(1 - i / size)), CLASSES - 1) if decays else i % CLASSES
            path = pattern.format(c=labels[number], i=i)
            (root / dataset / path).parent.mkdir(parents=True, exist_ok=True)
            _part(photos, number, random).save(root / dataset / path, quality=90)
            lines.append(f"{path} {labels[number]}\n")
        (root / dataset / name).write_text("".join(lines))
    return root / dataset


def _part(photos: list[np.ndarray], number: int, random: np.random.Generator) -> Image.Image:
    """Class by class another photograph and another column of it, so that there is something to learn."""
    photo = photos[number % 2]
    width, height = random.integers(70, 130, 2)
    left = min(photo.shape[1] - width, 90 * number + random.integers(0, 40))
    top = random.integers(0, photo.shape[0] - height)
    return Image.fromarray(photo[top : top + height, left : left + width])
