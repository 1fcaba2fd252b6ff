"""The bundled digits against scikit-learn's own arrays."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from datasets import build_data, digits
from datasets.specs import find_spec

SCANS = load_digits()
NOWHERE = Path("no such folder")


def everything(split) -> np.ndarray:
    return split.images.read(np.arange(len(split.targets)))


def as_bytes(images: np.ndarray) -> Counter:
    return Counter(image.tobytes() for image in images)


def test_the_last_40_scans_of_each_class_are_the_test_set():
    source = digits.read(NOWHERE, 8, 0)
    assert source.class_names == list("0123456789")
    np.testing.assert_array_equal(np.bincount(source.test.targets), [40] * 10)
    np.testing.assert_array_equal(np.bincount(source.train.targets), np.bincount(SCANS.target) - 40)
    images = everything(source.test)
    for label in range(10):
        last = np.round(SCANS.images[SCANS.target == label][-40:] * 255 / 16)
        np.testing.assert_array_equal(images[source.test.targets == label][..., 0], last)


def test_training_and_test_images_together_are_all_scans_once():
    source = digits.read(NOWHERE, 8, 0)
    train, test = as_bytes(everything(source.train)), as_bytes(everything(source.test))
    scans = np.round(SCANS.images * 255 / 16).astype(np.uint8)[..., None].repeat(3, axis=3)
    assert train + test == as_bytes(scans)
    assert not train & test


@pytest.mark.parametrize("size", [8, 20, 32])
def test_images_are_grey_rgb_of_the_size_asked_for(size):
    source = digits.read(NOWHERE, size, 0)
    for split in (source.train, source.test):
        images = split.images.read(np.arange(50))
        assert images.shape == (50, size, size, 3)
        assert images.dtype == np.uint8
        assert (images == images[..., :1]).all()
        assert images.max() > 200 and images.min() == 0  # the whole range of ink is used


def test_images_come_in_the_order_asked_for():
    train = digits.read(NOWHERE, 8, 0).train
    chosen = np.array([5, 0, 1000, 5])
    np.testing.assert_array_equal(train.images.read(chosen), everything(train)[chosen])


@pytest.mark.parametrize("size", [None, 16])
def test_digits_train_unmirrored_at_the_configured_size(size):
    data = build_data("digits", "", image_size=size)
    assert data.train.images.shape == (1397, size or 32, size or 32, 3)
    assert data.test.images.shape == (400, size or 32, size or 32, 3)
    assert not data.train_loader(64, 0, torch.device("cpu"), 0, 1).pixels.flip


def test_mean_and_deviation_are_those_of_the_scans():
    ink = SCANS.images / 16
    spec = find_spec("digits")
    assert spec.mean == pytest.approx([ink.mean()] * 3, abs=5e-4)
    assert spec.std == pytest.approx([ink.std()] * 3, abs=5e-4)
