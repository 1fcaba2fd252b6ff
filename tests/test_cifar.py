"""CIFAR from class folders and from torchvision's archives (small ones, with checksums of their own)."""

import hashlib
import http.client
import os
import pickle
import shutil
import tarfile
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from datasets import DataError, build_data, image_folder

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BASES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pixels(label: int, number: int = 0) -> np.ndarray:
    return np.random.default_rng([label, number]).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def class_folders(folder: Path, names: list[str]) -> Path:
    """Two training images and one test image of each class."""
    for label, name in enumerate(names):
        for number, part in enumerate(("train", "train", "test")):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(label, number)).save(folder / part / name / f"{number}.png")
    return folder


def pickled(path: Path, content: dict) -> tuple[str, str]:
    path.write_bytes(pickle.dumps(content))
    return path.name, hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a small archive in the format of ``dataset``; torchvision's reader gets its checksums."""

    def write(dataset: str, classes: int) -> tuple[Path, np.ndarray]:
        base, site = BASES[dataset], tmp_path / "site"
        folder = site / base.base_folder
        folder.mkdir(parents=True)
        images = np.stack([pixels(label) for label in range(classes)])
        rows = {"data": images.transpose(0, 3, 1, 2).reshape(classes, -1)}
        rows["labels" if dataset == "cifar10" else "fine_labels"] = list(range(classes))
        for attribute in ("train_list", "test_list"):
            stored = [pickled(folder / name, rows) for name, _ in getattr(base, attribute)]
            monkeypatch.setattr(base, attribute, [list(pair) for pair in stored])
        names = [f"name {label}" for label in range(classes)]
        name, checksum = pickled(folder / base.meta["filename"], {base.meta["key"]: names})
        monkeypatch.setattr(base, "meta", base.meta | {"filename": name, "md5": checksum})
        tar = site / base.filename
        with tarfile.open(tar, "w:gz") as file:
            file.add(folder, base.base_folder)
        monkeypatch.setattr(base, "tgz_md5", hashlib.md5(tar.read_bytes()).hexdigest())
        return site, images

    return write


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Archives are downloaded from ``tmp_path / "site"``."""
    handler = partial(QuietHandler, directory=tmp_path / "site")
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        for base in BASES.values():
            monkeypatch.setattr(base, "url", f"http://127.0.0.1:{running.server_port}/{base.filename}")
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        running.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for base in BASES.values():
        monkeypatch.setattr(base, "url", (tmp_path / "no site" / base.filename).as_uri())


def test_class_folders_are_read_in_the_alphabetical_order_of_their_names(tmp_path):
    data = build_data("cifar10", str(class_folders(tmp_path, NAMES)), workers=2)
    assert data.class_names == NAMES
    assert data.class_counts.tolist() == [2] * 10
    assert data.train.targets.tolist() == [label for label in range(10) for _ in range(2)]
    assert data.test.targets.tolist() == list(range(10))
    np.testing.assert_array_equal(data.train.images, [pixels(label, n) for label in range(10) for n in (0, 1)])
    np.testing.assert_array_equal(data.test.images, [pixels(label, 2) for label in range(10)])


@pytest.mark.parametrize(("part", "size"), [("train", (31, 32)), ("test", (32, 64))])
def test_an_image_of_another_size_is_refused_by_its_path(tmp_path, part, size):
    wrong = class_folders(tmp_path, NAMES) / part / "frog" / "wrong.png"
    Image.new("RGB", size).save(wrong)
    with pytest.raises(DataError) as error:
        build_data("cifar10", str(tmp_path))
    assert str(error.value).startswith(f"{wrong}: is {size[0]}x{size[1]} pixels, this data set has 32x32")


@pytest.mark.parametrize(("dataset", "found", "needed"), [("cifar10", 11, 10), ("cifar100", 10, 100)])
def test_a_wrong_number_of_class_folders_is_refused(tmp_path, dataset, found, needed):
    folder = class_folders(tmp_path, [*NAMES, "wolf"][:found])
    with pytest.raises(DataError) as error:
        build_data(dataset, str(folder))
    assert str(error.value) == f"data_path: {folder} has {found} classes, {dataset} has {needed}"


@pytest.mark.parametrize(("dataset", "classes", "parts"), [("cifar10", 10, 5), ("cifar100", 100, 1)])
@pytest.mark.parametrize("form", ["folder", "tar", "download"])
def test_torchvisions_archive_is_read_unpacked_packed_or_downloaded(
    tmp_path, archive, server, dataset, classes, parts, form
):
    site, images = archive(dataset, classes)
    base, path = BASES[dataset], tmp_path / "new" / "data"
    if form != "download":
        path.mkdir(parents=True)
        kept = base.base_folder if form == "folder" else base.filename
        (site / kept).rename(path / kept)
        (site / base.filename).unlink(missing_ok=True)  # so there is nothing to download
    data = build_data(dataset, str(path))
    assert data.class_names == [f"name {label}" for label in range(classes)]
    assert data.train.targets.tolist() == list(range(classes)) * parts
    assert data.test.targets.tolist() == list(range(classes))
    assert data.train.targets.dtype == torch.int64
    np.testing.assert_array_equal(data.train.images, np.concatenate([images] * parts))
    np.testing.assert_array_equal(data.test.images, images)


@pytest.mark.parametrize("dataset", BASES)
def test_a_missing_archive_is_one_line_that_says_what_to_put_where(tmp_path, no_site, dataset):
    base, path = BASES[dataset], tmp_path / "my data"
    path.mkdir()
    with pytest.raises(DataError) as error:
        build_data(dataset, str(path))
    message = str(error.value)
    assert message.startswith(f"data_path: {path} holds no {base.__name__}, and it could not be downloaded (")
    assert f"put {base.filename} or its folder {base.base_folder} there" in message
    assert image_folder.LAYOUT in message
    assert "\n" not in message
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("new", ["new", "several/new/folders"])
def test_a_path_that_was_not_there_is_not_left_behind(tmp_path, no_site, new):
    with pytest.raises(DataError, match="holds no CIFAR10"):
        build_data("cifar10", str(tmp_path / new))
    assert list(tmp_path.iterdir()) == []


def test_a_broken_download_is_refused_and_repeated_the_next_time(tmp_path, archive, server):
    tar = archive("cifar10", 10)[0] / CIFAR10.filename
    good = tar.read_bytes()
    tar.write_bytes(good[:1000])
    with pytest.raises(DataError, match="holds no CIFAR10, and it could not be downloaded"):
        build_data("cifar10", str(tmp_path / "data"))
    tar.write_bytes(good)
    assert build_data("cifar10", str(tmp_path / "data")).class_counts.tolist() == [5] * 10


def test_a_damaged_archive_is_refused_and_left_as_it_is(tmp_path, archive, no_site):
    folder = archive("cifar10", 10)[0] / "cifar-10-batches-py"
    (tmp_path / "data").mkdir()
    folder = folder.rename(tmp_path / "data" / folder.name)
    (folder / "data_batch_3").write_bytes(b"half of it")
    with pytest.raises(DataError, match="holds no CIFAR10, and it could not be downloaded"):
        build_data("cifar10", str(tmp_path / "data"))
    assert (folder / "data_batch_3").read_bytes() == b"half of it"


def test_a_server_that_speaks_no_http_is_one_line(tmp_path, monkeypatch):
    def answer(*_, **__):
        raise http.client.BadStatusLine("<html>")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(DataError, match="holds no CIFAR10, and it could not be downloaded"):
        build_data("cifar10", str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "file"], ids=ascii)
def test_a_path_that_can_be_no_folder_is_refused(tmp_path, no_site, name):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="holds no CIFAR10, and it could not be downloaded"):
        build_data("cifar10", str(tmp_path / name))


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_pickles_with_other_check_sums_than_the_published_are_never_loaded(tmp_path, no_site, form):
    """The archive holds pickles, which could run code."""
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", "")):
        (folder / name).write_bytes(pickle.dumps(Hostile(tmp_path / "made")))
    if form == "tar":
        with tarfile.open(tmp_path / "data" / CIFAR10.filename, "w:gz") as file:
            file.add(folder, CIFAR10.base_folder)
        shutil.rmtree(folder)
    with pytest.raises(DataError, match="holds no CIFAR10, and it could not be downloaded"):
        build_data("cifar10", str(tmp_path / "data"))
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Hostile(tmp_path / "made"))).close()  # it would have
    assert (tmp_path / "made").exists()


def test_the_real_cifar10_at_imbalance_100():
    folder = os.environ.get("CIFAR10_IMAGES")
    if not folder:
        pytest.skip("CIFAR10_IMAGES names no folder with CIFAR-10 as class folders")
    data = build_data("cifar10", folder, imb_factor=0.01, workers=2)
    assert data.class_names == NAMES
    assert data.class_counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert data.train.images.shape == (12_406, 32, 32, 3)
    assert torch.bincount(data.test.targets).tolist() == [1000] * 10
    assert data.test.images.shape == (10_000, 32, 32, 3)
    pixels_of_test = data.test.images.float().div(255)
    assert pixels_of_test.mean((0, 1, 2)).tolist() == pytest.approx(data.spec.mean, abs=0.005)
