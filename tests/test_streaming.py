"""Streamed images: the same batches with any number of workers, in any order of epochs, in any number of processes."""

import multiprocessing
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from datasets import Data, DataError, build_data
from datasets.augment import central_crop, crop_box, draw_jitter, normalise
from datasets.decoding import open_rgb
from datasets.loaders import Batch, EvalLoader, TrainLoader
from datasets.source import ImageFiles, StoredImages
from datasets.specs import IMAGENET_MEAN, IMAGENET_STD
from datasets.streaming import StreamedLargeImages
from tests import test_cifar
from utils.seed import generator

CPU = torch.device("cpu")
SIZE = 23
TARGETS = torch.arange(SIZE) % 5
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """23 images of 23 sizes, some not JPEG; tests do not write into it."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for i in range(SIZE):
        image = Image.fromarray(noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40 + 2 * i, 83 - 2 * i))
        image.save(folder / name(i))
    return folder


def name(i: int) -> str:
    return f"{i}.png" if i % 4 == 0 else f"{i}.jpg"


def pixels(folder: Path, workers: int = 0, decoder: str = "pil", **options) -> StreamedLargeImages:
    files = ImageFiles.under(folder, [name(i) for i in range(SIZE)])
    return StreamedLargeImages(files, 32, IMAGENET_MEAN, IMAGENET_STD, CPU, workers, decoder, **options)


def train_loader(
    folder: Path,
    workers=0,
    batch_size=6,
    seed=1,
    rank=0,
    world_size=1,
    accumulate=1,
    decoder="pil",
    weights=None,
    **options,
) -> TrainLoader:
    source = pixels(folder, workers, decoder, **options)
    return TrainLoader(source, TARGETS, batch_size, seed, CPU, rank, world_size, accumulate, weights)


def eval_loader(folder: Path, workers=0, batch_size=6, rank=0, world_size=1) -> EvalLoader:
    return EvalLoader(pixels(folder, workers), TARGETS, batch_size, CPU, rank, world_size)


def worker_pids() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()}


def by_image(batches: Iterable[Batch]) -> torch.Tensor:
    """The images that count, in the order of the files."""
    counted = [batch for batch in batches if batch.weight > 0]
    indices = torch.cat([batch.indices for batch in counted])
    assert torch.equal(indices.sort().values, torch.arange(SIZE))
    return torch.cat([batch.augment() for batch in counted])[indices.argsort()]


def assert_bit_equal(ours: Iterable[Batch], theirs: Iterable[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.augment(), b.augment())
        assert torch.equal(a.step_targets, b.step_targets)
        assert (a.weight, a.ends_step, a.full) == (b.weight, b.ends_step, b.full)


@pytest.fixture(scope="module")
def expected(folder) -> dict[int, list[Batch]]:
    """Epochs 0 to 2, each by a loader of its own without workers."""
    return {epoch: list(train_loader(folder).epoch(epoch)) for epoch in range(3)}


# ---------------------------------------------------------------------------------------------------------------------
# What a batch holds


def reference(path: Path, index: int, seed: int, epoch: int) -> torch.Tensor:
    """torchvision's transforms on the PIL image, one after the other, with the draws of this image."""
    draws, colours = generator(seed, epoch, "crop", index), draw_jitter(SIZE, 0.4, seed, epoch)
    with Image.open(path) as file:
        image = file.convert("RGB")
    image = TF.resized_crop(image, *crop_box(image.height, image.width, draws), [32, 32])
    image = TF.hflip(image) if draws.random() < 0.5 else image
    for operation in colours.order[index].tolist():
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[operation]
        image = adjust(image, colours.factors[index, operation].item())
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


def test_an_epoch_holds_every_image_as_torchvision_augments_it_with_the_same_draws(folder, expected):
    images = by_image(expected[2])
    assert (images.dtype, images.shape) == (torch.float32, (SIZE, 3, 32, 32))
    for i in range(SIZE):
        assert torch.equal(images[i], reference(folder / name(i), i, seed=1, epoch=2)), name(i)
    for batch in expected[2]:
        assert torch.equal(batch.targets, TARGETS[batch.indices])


def test_pixels_are_normalised_by_mean_and_deviation_of_each_channel(tmp_path):
    Image.new("RGB", (50, 40), (51, 102, 255)).save(tmp_path / "one colour.png")
    source = StreamedLargeImages(
        ImageFiles.under(tmp_path, ["one colour.png"]), 32, (0.1, 0.2, 0.5), (0.5, 0.25, 2.0), CPU
    )
    (images,) = source.unaugmented([slice(0, 1)])
    assert (images.dtype, images.shape, images.device) == (torch.float32, (1, 3, 32, 32), CPU)
    for channel, value in enumerate([0.2, 0.8, 0.25]):  # (51 / 255 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (1 - 0.5) / 2
        torch.testing.assert_close(images[0, channel], torch.full((32, 32), value))


@WORKERS
@pytest.mark.parametrize("batch_size", [6, 100])
def test_evaluation_sees_the_middle_of_every_image_in_order(folder, batch_size, workers):
    crops = [central_crop(open_rgb(str(folder / name(i))), 32) for i in range(SIZE)]
    middles = normalise(torch.from_numpy(np.stack(crops)), IMAGENET_MEAN, IMAGENET_STD)
    loader = eval_loader(folder, workers, batch_size)
    for _ in range(2):
        batches = list(loader)
        assert [len(images) for images, _ in batches[:-1]] == [batch_size] * (len(loader) - 1)
        assert torch.equal(torch.cat([images for images, _ in batches]), middles)
        assert torch.equal(torch.cat([targets for _, targets in batches]), TARGETS)


@pytest.mark.parametrize("random", [True, False], ids=["random crops", "middles"])
def test_the_fast_decoder_gives_the_same_crops_but_for_rounding(folder, random):
    """And what is no JPEG file is PIL's."""
    requests = [(index, (1, 0, "crop", index) if random else None) for index in range(SIZE)]
    strict, fast = (next(pixels(folder, decoder=d).workers.read([requests])).int() for d in ("pil", "fast"))
    assert 0 < (strict - fast).abs().max() <= 2
    assert torch.equal(strict[::4], fast[::4])


def test_fast_crops_are_the_same_with_any_number_of_workers(folder):
    loaders = [train_loader(folder, workers, decoder="fast") for workers in (0, 2)]
    assert_bit_equal(*(loader.epoch(1) for loader in loaders))


# ---------------------------------------------------------------------------------------------------------------------
# What a batch depends on


@WORKERS
def test_an_epoch_is_the_same_with_any_number_of_workers_and_after_any_other(folder, workers, expected):
    loader = train_loader(folder, workers)
    for epoch in (0, 2, 1, 0):
        assert_bit_equal(loader.epoch(epoch), expected[epoch])


@WORKERS
def test_an_abandoned_epoch_leaves_nothing_behind(folder, workers, expected):
    loader = train_loader(folder, workers)
    for epoch, seen in ((1, 1), (2, 3)):
        abandoned = loader.epoch(epoch)
        assert_bit_equal(islice(abandoned, seen), expected[epoch][:seen])
        del abandoned
    assert_bit_equal(loader.epoch(0), expected[0])


@pytest.mark.parametrize("batch_size", [1, 23])
def test_the_crop_of_an_image_does_not_depend_on_its_batch(folder, batch_size, expected):
    assert torch.equal(by_image(train_loader(folder, batch_size=batch_size).epoch(0)), by_image(expected[0]))


@WORKERS
def test_global_generators_are_neither_touched_nor_used(folder, workers, expected):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert_bit_equal(train_loader(folder, workers).epoch(0), expected[0])
    list(eval_loader(folder, workers))
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def test_workers_live_from_the_first_epoch_until_the_loader_is_gone(folder):
    others = worker_pids()
    list(train_loader(folder).epoch(0))
    assert worker_pids() == others
    loader = train_loader(folder, workers=2)
    assert worker_pids() == others
    seen = []
    for epoch in range(3):
        list(islice(loader.epoch(epoch), 2 if epoch == 1 else None))
        seen.append(worker_pids() - others)
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]
    del loader
    assert worker_pids() == others


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """The same images, of which the eighth is cut off in the middle."""
    shutil.copytree(folder, tmp_path / "images")
    whole = (folder / name(7)).read_bytes()
    (tmp_path / "images" / name(7)).write_bytes(whole[: len(whole) // 2])
    return tmp_path / "images"


def error_of(batches: Iterator) -> str:
    """As a script meets it: nothing holds the error, or the loader that raised it, any longer."""
    try:
        list(batches)
    except DataError as error:
        return str(error)
    raise AssertionError("no error")


@WORKERS
def test_a_broken_image_is_named_in_one_line_and_the_loader_goes_on_once_it_is_whole(broken, folder, workers, expected):
    others = worker_pids()
    loader, test_loader = train_loader(broken, workers), eval_loader(broken, workers)
    for message in (error_of(loader.epoch(0)), error_of(iter(test_loader)), error_of(loader.epoch(1))):
        assert message.startswith(f"{broken / name(7)}: is no readable image (")
        assert "\n" not in message
    (broken / name(7)).unlink()
    for batches in (loader.epoch(1), iter(test_loader)):
        assert error_of(batches) == f"{broken / name(7)}: no such image"
    shutil.copy(folder / name(7), broken)
    assert_bit_equal(loader.epoch(0), expected[0])
    start = time.monotonic()
    del loader, test_loader, batches
    assert worker_pids() == others
    assert time.monotonic() - start < 4.5  # a worker that does not hear of the end is killed after 5 seconds


@WORKERS
def test_batches_before_a_broken_image_arrive(broken, folder, workers):
    batches = iter(eval_loader(broken, workers, batch_size=2))
    assert torch.equal(torch.cat([next(batches)[0] for _ in range(3)]), next(iter(eval_loader(folder)))[0])
    assert name(7) in error_of(batches)


# ---------------------------------------------------------------------------------------------------------------------
# A whole data set


@WORKERS
def test_a_data_set_of_lists_is_streamed(lists, workers):
    data = build_data("imagenet", str(lists / "imagenet"), image_size=64, workers=workers, decoder="fast")
    loader = data.train_loader(batch_size=24, seed=0, device=CPU)
    batches = list(loader.epoch(0))
    assert [batch.augment().shape for batch in batches] == [(24, 3, 64, 64), (24, 3, 64, 64), (16, 3, 64, 64)]
    assert torch.equal(torch.cat([batch.indices for batch in batches]).sort().values, torch.arange(64))
    reading = loader.pixels.workers.loader
    assert (reading.num_workers, reading.dataset.read.decoder) == (workers, "fast")
    rows = [line.split() for line in (lists / "imagenet" / "ImageNet_LT_test.txt").read_text().splitlines()]
    crops = [central_crop(open_rgb(str(lists / "imagenet" / path), "fast"), 64) for path, _ in rows]
    images, targets = (torch.cat(parts) for parts in zip(*data.test_loader(CPU), strict=True))
    assert torch.equal(images, normalise(torch.from_numpy(np.stack(crops)), IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(targets, data.class_map[[int(label) for _, label in rows]])


def test_a_cut_data_set_streams_the_images_that_it_keeps(lists):
    """The hold-out and the test set are other files; nothing is mixed up between them."""
    whole = build_data("places", str(lists / "places"), image_size=32)
    cut = build_data("places", str(lists / "places"), image_size=32, val_per_class=1, imb_factor=1e-200)
    paths = [{part.images.path(i) for i in range(len(part.targets))} for part in (cut.train, cut.val, whole.train)]
    assert paths[0] | paths[1] <= paths[2]
    assert len(paths[0]) == cut.class_counts.sum() < len(paths[2]) - len(paths[1])
    assert not paths[0] & paths[1]
    assert sum(len(targets) for _, targets in cut.val_loader(CPU)) == len(paths[1]) > 0
    for batch in cut.train_loader(7, 0, CPU).epoch(0):
        for image, target, index in zip(batch.augment(), batch.targets, batch.indices, strict=True):
            path = cut.train.images.path(index)
            assert whole.train.targets[[whole.train.images.path(i) for i in range(64)].index(path)] == target
            assert image.shape == (3, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Small images that workers read

archive = test_cifar.archive


@pytest.fixture(scope="module")
def class_folders(folder, tmp_path_factory) -> Path:
    """The 23 images of as many sizes: 16 to train on, in two classes, and seven to test; tests do not write into it."""
    root = tmp_path_factory.mktemp("class folders")
    for i in range(SIZE):
        place = root / ("train" if i < 16 else "test") / ("few" if i % 3 == 0 else "many")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name(i), place)
    return root


@pytest.fixture(params=["digits", "class folders", "CIFAR folders", "CIFAR archive"])
def small(request, class_folders, archive, tmp_path) -> Callable[..., Data]:
    """Builds a data set of small images; each kind has its own way to read them."""
    if request.param == "digits":
        return partial(build_data, "digits", "", image_size=8, imb_factor=0.01, val_per_class=3)
    if request.param == "class folders":
        return partial(build_data, "folder", str(class_folders), image_size=12, val_per_class=2)
    if request.param == "CIFAR folders":
        path = test_cifar.class_folders(tmp_path, test_cifar.NAMES)
        return partial(build_data, "cifar10", str(path), val_per_class=1)
    return partial(build_data, "cifar10", str(archive("cifar10", 10)[0]), imb_factor=0.5, val_per_class=1)


def evaluated(data: Data, part: str, rank: int, world_size: int) -> list[torch.Tensor]:
    """In batches that are smaller than the data set's own, so that there are several."""
    pixels, targets = getattr(data, f"{part}_loader")(CPU).pixels, getattr(data, part).targets
    batches = EvalLoader(pixels, targets, 1 + len(targets) // 4, CPU, rank, world_size)
    return [tensor for batch in batches for tensor in batch]


@pytest.mark.parametrize(("workers", "rank", "world_size", "accumulate"), [(0, 1, 2, 1), (0, 0, 1, 3), (2, 1, 2, 2)])
def test_images_that_are_read_give_the_batches_of_images_on_the_device(small, workers, rank, world_size, accumulate):
    here, read = small(data_on_device=True), small(data_on_device=False, workers=workers)
    assert here.on_device and not read.on_device
    for data in (read.train, read.val, read.test):
        assert isinstance(data.images, StoredImages)
    loaders = [data.train_loader(6, 1, CPU, rank, world_size, accumulate) for data in (read, here)]
    assert loaders[0].pixels.workers.loader.num_workers == workers
    for epoch in (2, 0):
        assert_bit_equal(*(loader.epoch(epoch) for loader in loaders))
    for part in ("val", "test"):
        ours, theirs = (evaluated(data, part, rank, world_size) for data in (read, here))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_copy_of_stored_images_reads_the_same(small):
    """Workers that do not fork get the images pickled."""
    data = small(data_on_device=False)
    for part in (data.train, data.val, data.test):
        copy, chosen = pickle.loads(pickle.dumps(part.images)), [2, 0, 2]
        assert len(copy) == len(part.images) == len(part.targets)
        np.testing.assert_array_equal(copy.read(chosen), part.images.read(chosen))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forkserver", "spawn"])
def test_workers_that_do_not_fork_read_the_same(class_folders, way):
    """Python 3.14 starts them from a server; macOS and Windows start them anew."""
    here, read = (
        build_data("folder", str(class_folders), image_size=12, data_on_device=where, workers=1)
        for where in (True, False)
    )
    loaders = [data.train_loader(6, 1, CPU) for data in (read, here)]
    loaders[0].pixels.workers.loader.multiprocessing_context = way
    assert_bit_equal(*(loader.epoch(0) for loader in loaders))


@WORKERS
def test_a_broken_small_image_is_named_when_it_is_met(class_folders, tmp_path, workers):
    others = worker_pids()
    root = shutil.copytree(class_folders, tmp_path / "images")
    broken = root / "train" / "many" / name(7)
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"^{broken}: is no readable image \("):
        build_data("folder", str(root), image_size=12, workers=workers)
    data = build_data("folder", str(root), image_size=12, workers=workers, data_on_device=False)
    loader = data.train_loader(6, 1, CPU)
    for epoch in (0, 1):
        message = error_of(loader.epoch(epoch))
        assert message.startswith(f"{broken}: is no readable image (")
        assert "\n" not in message
    assert sum(len(targets) for _, targets in data.test_loader(CPU)) == 7
    shutil.copy(class_folders / "train" / "many" / name(7), broken)
    whole = build_data("folder", str(class_folders), image_size=12).train_loader(6, 1, CPU)
    assert_bit_equal(loader.epoch(2), whole.epoch(2))
    start = time.monotonic()
    del loader
    assert worker_pids() == others
    assert time.monotonic() - start < 4
