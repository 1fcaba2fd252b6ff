"""build_data: reading, holding out and cutting together, and the contradictions that it refuses."""

import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Data, DataError, build_data
from datasets.augment import normalise
from datasets.long_tail import long_tail_counts

CPU = torch.device("cpu")
NATURAL = {"ash": 4, "birch": 10, "cedar": 7, "dogwood": 0}


@pytest.fixture(scope="module")
def whole() -> Data:
    return build_data("digits", "", image_size=8)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Class folders with ``NATURAL`` training images, no two alike, and one test image of two classes."""
    folder = tmp_path_factory.mktemp("trees")
    random = np.random.default_rng(0)
    for part, counts in (("train", NATURAL), ("test", {"ash": 1, "birch": 1, "cedar": 0, "dogwood": 0})):
        for name, count in counts.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return str(folder)


def pairs(split: tuple[torch.Tensor, torch.Tensor]) -> Counter:
    return Counter((image.numpy().tobytes(), int(label)) for image, label in zip(*split, strict=True))


def test_without_a_cut_the_counts_are_natural(whole, trees):
    data = build_data("folder", trees, image_size=8)
    assert dict(zip(data.class_names, data.class_counts.tolist(), strict=True)) == NATURAL
    assert whole.class_counts.tolist() == [138, 142, 137, 143, 141, 142, 141, 139, 134, 140]
    assert data.val is None and whole.val is None
    assert (whole.class_counts.dtype, whole.class_names) == (torch.int64, list("0123456789"))
    for images, targets in (whole.train, whole.test):
        assert (images.dtype, targets.dtype) == (torch.uint8, torch.int64)
        assert images.shape == (len(targets), 8, 8, 3) and images.is_contiguous()


@pytest.mark.parametrize("imb_type", ["exp", "step"])
@pytest.mark.parametrize("imb_factor", [0.1, 0.01])
def test_an_unranked_cut_follows_the_class_index(whole, imb_type, imb_factor):
    data = build_data("digits", "", image_size=8, imb_type=imb_type, imb_factor=imb_factor)
    profile = torch.tensor(long_tail_counts(143, 10, imb_type, imb_factor))
    assert torch.equal(data.class_counts, torch.minimum(profile, whole.class_counts))
    assert torch.equal(torch.bincount(data.train.targets, minlength=10), data.class_counts)
    assert pairs(data.train) < pairs(whole.train)
    assert pairs(data.test) == pairs(whole.test)


@pytest.mark.parametrize(
    ("imb_type", "imb_factor", "counts"),
    [
        ("exp", 0.1, [2, 10, 4, 0]),
        ("step", 0.1, [1, 10, 7, 0]),
        ("exp", 1.0, [4, 10, 7, 0]),
        ("exp", 0.01, [0, 10, 2, 0]),
    ],
)
def test_a_ranked_cut_follows_the_natural_counts(trees, imb_type, imb_factor, counts):
    data = build_data("folder", trees, image_size=8, imb_type=imb_type, imb_factor=imb_factor)
    assert data.class_counts.tolist() == counts
    assert data.class_counts.dtype == torch.int64
    assert len(data.train.images) == sum(counts)
    assert pairs(data.train) <= pairs(build_data("folder", trees, image_size=8).train)


def test_held_out_images_are_taken_from_the_training_images(whole):
    data = build_data("digits", "", image_size=8, val_per_class=7)
    assert data.val is not None
    assert torch.bincount(data.val.targets).tolist() == [7] * 10
    assert torch.equal(data.class_counts, whole.class_counts - 7)
    assert pairs(data.train) + pairs(data.val) == pairs(whole.train)
    assert pairs(data.test) == pairs(whole.test)


def test_what_is_held_out_does_not_depend_on_the_cut_and_is_never_trained_on(whole):
    uncut, cut = (build_data("digits", "", image_size=8, val_per_class=7, imb_factor=f) for f in (None, 0.1))
    assert torch.equal(uncut.val.images, cut.val.images)
    assert pairs(cut.train) < pairs(uncut.train)
    assert not pairs(cut.train) & pairs(cut.val)
    assert cut.class_counts[0] == 131  # 138 - 7, fewer than the profile's 136
    assert cut.class_counts[9] == int(136 * 0.1)


def test_a_class_without_enough_images_for_the_hold_out_is_named(trees):
    with pytest.raises(DataError, match=r"^val_per_class: 4, but class 'ash' has only 4 training images; .*$"):
        build_data("folder", trees, image_size=8, val_per_class=4)


def test_one_class_alone_can_be_evaluated_but_not_trained_on(tmp_path):
    for name in ("train/cat/0.png", "train/cat/1.png", "test/cat/2.png", "test/dog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "train" / "dog").mkdir()
    data = build_data("folder", str(tmp_path), image_size=8)
    assert len(list(data.test_loader(torch.device("cpu")))) == 1
    with pytest.raises(DataError) as error:
        data.train_loader(2, 0, torch.device("cpu"))
    said = "data_path: all 2 training images are of one class, 'cat'; there is nothing to learn with less than two"
    assert str(error.value) == said


@pytest.mark.parametrize("options", [{"imb_factor": 0.1}, {"val_per_class": 5}])
def test_the_subset_seed_alone_decides_which_images_are_kept(options):
    def training(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return build_data("digits", "", image_size=8, subset_seed=seed, **options).train

    np.random.seed(5)
    torch.manual_seed(5)
    first = training(0)
    np.random.seed(6)
    torch.manual_seed(6)
    again, other = training(0), training(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(torch.bincount(first[1]), torch.bincount(other[1]))
    assert pairs(first) != pairs(other)


def test_building_leaves_the_global_generators_alone():
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    build_data("digits", "", image_size=8, imb_factor=0.1, val_per_class=3)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize(("asked", "side"), [(None, 32), (20, 20)])
def test_folders_are_scaled_to_the_size_asked_for(trees, asked, side):
    data = build_data("folder", trees, image_size=asked)
    assert data.train.images.shape == (21, side, side, 3)
    assert data.test.images.shape == (2, side, side, 3)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_another_image_size_is_refused_for_cifar_before_anything_is_read(tmp_path, dataset):
    with pytest.raises(DataError) as error:
        build_data(dataset, str(tmp_path / "nowhere"), image_size=64)
    assert str(error.value) == f"image_size: 64, but images of {dataset} have 32 pixels"
    assert not (tmp_path / "nowhere").exists()


def test_the_number_of_classes_must_agree(trees):
    assert build_data("folder", trees, num_classes=4, image_size=8).num_classes == 4
    with pytest.raises(DataError, match=r"^num_classes: 100, but digits in .* has 10; set that"):
        build_data("digits", "", num_classes=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": "cifar"},
            r"^dataset: 'cifar' is unknown; known are cifar10, cifar100, digits, folder, lists, imagenet, .*, places$",
        ),
        ({"dataset": "digits", "imb_type": "linear", "imb_factor": 0.1}, r"^imb_type: 'linear' is unknown; known are"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(options, message):
    with pytest.raises(DataError, match=message):
        build_data(data_path="", **options)


def test_the_loaders_of_a_data_set_use_its_row(whole):
    spec = whole.spec
    batches = list(whole.train_loader(100, 3, CPU, 1, 2).epoch(0))
    assert {len(batch.targets) for batch in batches[:-1]} == {50}
    whole_epoch = list(whole.train_loader(100, 3, CPU, 0, 1).epoch(0))
    assert len(torch.cat([batch.indices for batch in whole_epoch]).unique()) == len(whole.train.targets)
    black = (0 - spec.mean[0]) / spec.std[0]
    assert min(batch.augment().min() for batch in whole_epoch).item() == pytest.approx(black, abs=1e-6)
    tests = list(whole.test_loader(CPU))
    assert torch.equal(torch.cat([images for images, _ in tests]), normalise(whole.test.images, spec.mean, spec.std))
    assert torch.equal(torch.cat([targets for _, targets in tests]), whole.test.targets)


# ---------------------------------------------------------------------------------------------------------------------
# Where small images live

ALL = (21 + 2) * 8 * 8 * 3  # bytes that the images of ``trees`` need at 8 pixels
CUT = (16 + 2) * 8 * 8 * 3  # after a cut to [2, 10, 4, 0]


@pytest.fixture
def machine(monkeypatch):
    """A machine with as much memory as is asked for."""
    ask = os.sysconf

    def with_memory(size: int) -> None:
        monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": size, "SC_PAGE_SIZE": 1}.get(name, ask(name)))

    return with_memory


@pytest.mark.parametrize(
    ("wanted", "memory", "options", "resident"),
    [
        ("auto", 2 * ALL, {}, True),
        ("auto", 2 * ALL - 1, {}, False),
        ("auto", 2 * CUT, {"imb_factor": 0.1}, True),
        ("auto", 2 * CUT - 1, {"imb_factor": 0.1}, False),
        (True, ALL, {}, True),
        (False, 10**15, {}, False),
    ],
)
def test_auto_keeps_what_fits_into_half_of_the_memory(trees, machine, wanted, memory, options, resident):
    """What the cut leaves counts."""
    machine(memory)
    data = build_data("folder", trees, image_size=8, data_on_device=wanted, **options)
    assert data.on_device == resident
    assert isinstance(data.test.images, torch.Tensor) == resident
    assert len(data.train.images) == len(data.train.targets) == data.class_counts.sum()


def test_held_out_images_need_memory_too(machine):
    machine(1797 * 8 * 8 * 3)  # all scans fit, and not into half of it
    for options in ({}, {"val_per_class": 20}):
        assert build_data("digits", "", image_size=8, data_on_device=True, **options).on_device
        assert not build_data("digits", "", image_size=8, **options).on_device
    machine(1797 * 8 * 8 * 3 - 1)
    for options in ({}, {"val_per_class": 20}):
        with pytest.raises(DataError, match=r"^data_on_device: True, but the images need "):
            build_data("digits", "", image_size=8, data_on_device=True, **options)


def test_images_that_do_not_fit_are_refused_where_they_have_to(trees, machine):
    machine(2**28)
    with pytest.raises(DataError) as error:
        build_data("folder", trees, image_size=3000, data_on_device=True)
    assert str(error.value) == ("data_on_device: True, but the images need 0.6 GiB and cpu has 0.2; use auto or False")


def test_nothing_is_decoded_at_the_start_where_images_are_read(trees, machine, tmp_path):
    root = shutil.copytree(trees, tmp_path / "trees")
    for path in root.glob("*/*/*.png"):
        path.write_bytes(b"no image")
    machine(2 * ALL - 1)
    for wanted in (False, "auto"):
        data = build_data("folder", str(root), image_size=8, imb_factor=1.0, val_per_class=0, data_on_device=wanted)
        assert data.class_counts.tolist() == [4, 10, 7, 0]
    with pytest.raises(DataError, match=r"\.png: is no readable image"):
        build_data("folder", str(root), image_size=8, data_on_device=True)


def test_large_images_stay_in_their_files(lists):
    path = str(lists / "places")
    for wanted in ("auto", False):
        assert not build_data("places", path, image_size=32, data_on_device=wanted).on_device
    with pytest.raises(DataError) as error:
        build_data("places", path, image_size=32, data_on_device=True)
    assert str(error.value) == ("data_on_device: True, but the images of places stay in their files; use auto or False")


def test_the_content_hash_covers_labels_and_the_pixels_in_memory():
    def hashed(**options) -> str:
        return build_data("digits", "", image_size=8, imb_factor=0.05, **options).content_hash()

    digits = build_data("digits", "", image_size=8, imb_factor=0.05)
    assert hashed() == digits.content_hash() and len(digits.content_hash()) == 64
    assert len({hashed(), hashed(subset_seed=1), hashed(val_per_class=2), hashed(data_on_device=False)}) == 4
    assert hashed(data_on_device=False) == digits.label_hash
    digits.test.images[3, 0, 0, 0] ^= 1  # one bit
    assert digits.content_hash() != hashed()
