"""The rows of the data sets against the published protocol."""

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest

from datasets.source import DataError
from datasets.specs import SPECS, find_spec
from utils.errors import InputError

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "classes", "bounds", "statistics", "flip", "ranked", "any_size"),
    [
        ("cifar10", 10, (0, 3, 7, 10), CIFAR, True, False, False),
        ("cifar100", 100, (0, 36, 71, 100), CIFAR, True, False, False),
        ("digits", 10, (0, 3, 7, 10), None, False, False, True),
        ("folder", None, None, IMAGENET, True, True, True),
    ],
)
def test_a_row_says_what_the_protocol_says(name, classes, bounds, statistics, flip, ranked, any_size):
    spec = find_spec(name)
    ranges = None if bounds is None else tuple(pairwise(bounds))
    assert (spec.num_classes, spec.shot_ranges) == (classes, ranges)
    assert (spec.flip, spec.ranked_cut, spec.any_size, spec.image_size) == (flip, ranked, any_size, 32)
    if statistics is not None:
        assert (spec.mean, spec.std) == statistics


@pytest.mark.parametrize("name", SPECS)
def test_a_row_is_complete_and_frozen(name):
    spec = find_spec(name)
    assert callable(spec.read)
    assert all(len(values) == 3 and all(0 < value < 1 for value in values) for values in (spec.mean, spec.std))
    with pytest.raises(FrozenInstanceError):
        spec.flip = False


@pytest.mark.parametrize("name", ["cifar", "CIFAR10", "", "places"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(DataError) as error:
        find_spec(name)
    assert str(error.value) == f"dataset: {name!r} is unknown; known are cifar10, cifar100, digits, folder"
    assert isinstance(error.value, InputError)
