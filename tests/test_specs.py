"""The rows of the data sets against the published protocol."""

from dataclasses import FrozenInstanceError, astuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from datasets.source import DataError
from datasets.specs import SPECS, find_spec
from utils.errors import InputError

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INAT = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize(
    ("name", "classes", "bounds", "statistics", "flip", "ranked", "any_size", "size"),
    [
        ("cifar10", 10, (0, 3, 7, 10), CIFAR, True, False, False, 32),
        ("cifar100", 100, (0, 36, 71, 100), CIFAR, True, False, False, 32),
        ("digits", 10, (0, 3, 7, 10), None, False, False, True, 32),
        ("folder", None, None, IMAGENET, True, True, True, 32),
        ("imagenet", 1000, (0, 390, 835, 1000), IMAGENET, True, True, True, 224),
        ("ina2018", 8142, (0, 842, 4543, 8142), INAT, True, True, True, 224),
        ("places", 365, (0, 131, 288, 365), IMAGENET, True, True, True, 224),
    ],
)
def test_a_row_says_what_the_protocol_says(name, classes, bounds, statistics, flip, ranked, any_size, size):
    spec = find_spec(name)
    ranges = None if bounds is None else tuple(pairwise(bounds))
    assert (spec.num_classes, spec.shot_ranges) == (classes, ranges)
    assert (spec.flip, spec.ranked_cut, spec.any_size, spec.image_size) == (flip, ranked, any_size, size)
    if statistics is not None:
        assert (spec.mean, spec.std) == statistics


@pytest.mark.parametrize(
    ("name", "published", "train", "test"),
    [
        ("imagenet", (115_846, 50_000, 1280, 5), "ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
        ("ina2018", (437_513, 24_426, 1000, 2), "iNaturalist18_train.txt", "iNaturalist18_val.txt"),
        ("places", (62_500, 36_500, 4980, 5), "Places_LT_train.txt", "Places_LT_test.txt"),
    ],
)
def test_a_list_data_set_has_its_published_figures_and_lists(name, published, train, test):
    spec = find_spec(name)
    assert astuple(spec.published)[:4] == published
    assert (spec.lists.train[0], spec.lists.test[0]) == (train, test)


def test_inaturalist_may_come_as_annotations():
    lists = find_spec("ina2018").lists
    assert (lists.train[1:], lists.test[1:]) == (("train2018.json",), ("val2018.json",))


def test_the_shots_of_places_are_those_of_its_counts():
    """Many: more than 100 training images; few: at most 20."""
    counts = np.load(GOLDENS / "class_order.npz")["places.counts"]
    spec = find_spec("places")
    assert [end for _, end in spec.shot_ranges] == [(counts > 100).sum(), (counts > 20).sum(), len(counts)]
    assert (spec.published.train, spec.published.largest, spec.published.smallest) == (
        counts.sum(),
        counts.max(),
        counts.min(),
    )


@pytest.mark.parametrize("name", SPECS)
def test_a_row_is_complete_and_frozen(name):
    spec = find_spec(name)
    assert callable(spec.read) != (spec.lists is not None)
    assert (spec.published is None) == (name == "lists" or spec.lists is None)
    assert all(len(values) == 3 and all(0 < value < 1 for value in values) for values in (spec.mean, spec.std))
    with pytest.raises(FrozenInstanceError):
        spec.flip = False


@pytest.mark.parametrize("name", ["cifar", "CIFAR10", "", "imagenet_lt"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(DataError) as error:
        find_spec(name)
    known = "cifar10, cifar100, digits, folder, lists, imagenet, ina2018, places"
    assert str(error.value) == f"dataset: {name!r} is unknown; known are {known}"
    assert isinstance(error.value, InputError)
