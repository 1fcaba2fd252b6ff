"""The cache of decoded class folders: what it holds, when it is written, and that nothing else is read from it."""

import os
import shutil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Data, DataError, build_data
from datasets.data import CPU
from datasets.image_cache import OFFSET

SIDE, IMAGES = 8, {"cat": 900, "dog": 130}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """1,030 training and 4 test images of 8 pixels."""
    root, random = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for part, counts in (("train", IMAGES), ("test", dict.fromkeys(IMAGES, 2))):
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number:04}.bmp")
    return root


@pytest.fixture
def folders(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "images")


def load(folders: Path, cache: str | bool = "auto", **options) -> Data:
    options = {"image_size": SIDE, "data_cache": cache, **options}
    return build_data("folder", str(folders), **options)


def pixels(data: Data) -> torch.Tensor:
    return torch.cat([data.train.images, data.test.images])


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.images"))


def repaint(path: Path) -> None:
    """Another image of the same name, size and time."""
    before = path.stat()
    Image.new("RGB", (SIDE, SIDE), (1, 2, 3)).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_second_run_reads_what_the_first_has_decoded(folders, tmp_path):
    plain, first = load(folders, False), load(folders, str(tmp_path / "cache"))
    assert torch.equal(pixels(plain), pixels(first))
    assert "written to" in first.notes[0]
    for path in (folders / "train").rglob("*.bmp"):
        repaint(path)
    again = load(folders, str(tmp_path / "cache"))
    assert torch.equal(pixels(again), pixels(first))
    assert "are those of" in again.notes[0]
    assert len(files(tmp_path / "cache")) == 2
    assert not torch.equal(pixels(load(folders, False)), pixels(first))


def test_auto_writes_beside_the_data_what_is_large_enough(folders):
    data = load(folders)
    (train,) = files(folders / ".decoded")  # four test images are decoded every time
    assert str(train) in data.notes[0]
    assert train.stat().st_size == OFFSET + sum(IMAGES.values()) * SIDE * SIDE * 3
    assert torch.equal(pixels(load(folders)), pixels(load(folders, False)))


def test_subsets_and_images_that_are_read_batch_by_batch_come_from_the_same_file(folders):
    options = {"imb_factor": 0.1, "val_per_class": 3}
    plain, cached = (load(folders, cache, **options) for cache in (False, "auto"))
    streamed = load(folders, data_on_device=False, workers=1, **options)
    assert torch.equal(pixels(plain), pixels(cached))
    assert torch.equal(plain.val.images, cached.val.images)
    batches = (list(data.train_loader(32, 0, CPU).epoch(1)) for data in (plain, streamed))
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours.augment(), theirs.augment())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def replace_by_another_set(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40] ^= 1  # of the key
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip_a_bit, replace_by_another_set, lambda path: path.write_bytes(b"")])
def test_a_damaged_or_foreign_file_is_written_anew(folders, harm):
    expected = pixels(load(folders))
    (file,) = files(folders / ".decoded")
    whole = file.read_bytes()
    harm(file)
    data = load(folders)
    assert torch.equal(pixels(data), expected)
    assert "written to" in data.notes[0]
    assert file.read_bytes() == whole


def test_a_changed_image_makes_another_file(folders):
    before = load(folders)
    Image.new("RGB", (SIDE, SIDE), (9, 9, 9)).save(folders / "train" / "dog" / "0003.bmp")
    after = load(folders)
    changed = (before.train.images != after.train.images).flatten(1).any(1)
    assert changed.sum() == 1
    assert torch.equal(after.train.images[changed][0], torch.full((SIDE, SIDE, 3), 9, dtype=torch.uint8))
    assert len(files(folders / ".decoded")) == 2


def in_a_process(folders: str, results) -> None:
    data = load(Path(folders))
    results.put((data.notes[0].split(":")[1].split(" /")[0], int(data.train.images.sum())))


def test_of_runs_that_start_together_one_writes(folders):
    context = get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=in_a_process, args=(str(folders), results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(note for note, _ in found) == [" decoded images are those of"] * 2 + [" decoded images written to"]
    assert len({total for _, total in found}) == 1


def test_a_folder_that_cannot_be_written_is_an_error_only_if_it_was_named(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data_cache: .*/file/cache cannot be written to: Not a directory"):
        load(folders, str(tmp_path / "file" / "cache"))
    (folders / ".decoded").write_text("")  # no folder, so nothing can be written into it
    data = load(folders)
    assert "data_cache: no file was written" in data.notes[0]
    assert torch.equal(pixels(data), pixels(load(folders, False)))


def test_without_a_place_beside_the_data_it_is_that_for_temporary_files(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.image_cache.os.access", lambda *_: False)
    monkeypatch.setattr("datasets.image_cache.tempfile.gettempdir", lambda: str(tmp_path))
    load(folders)
    assert len(files(tmp_path / f"decoded-{os.getuid()}")) == 1
    assert not (folders / ".decoded").exists()


def test_too_little_space_means_no_cache(folders, monkeypatch):
    monkeypatch.setattr("datasets.image_cache.SHARE", 0.0)
    assert load(folders).notes == []
    assert not (folders / ".decoded").exists()


def test_a_damaged_image_stops_the_runs_that_need_it(folders):
    """The cache holds the whole split, so it cannot be written; a subset may do without that image."""
    kept = load(folders, False, imb_factor=0.01).train.images
    unused = next(
        path
        for path in sorted((folders / "train" / "dog").iterdir())
        if not (kept == torch.from_numpy(np.array(Image.open(path)))).flatten(1).all(1).any()
    )
    unused.write_bytes(b"damaged")
    with pytest.raises(DataError, match=unused.name):
        load(folders)
    with pytest.raises(DataError, match=unused.name):
        load(folders, str(folders / "cache"), imb_factor=0.01)
    data = load(folders, imb_factor=0.01)
    assert torch.equal(data.train.images, kept)
    assert unused.name in data.notes[0]
