"""Class folders with real image files: layout, decoding, sizes, and files that cannot be read."""

import io
import multiprocessing
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from torchvision.datasets import ImageFolder

from datasets import build_data, image_folder
from datasets.decoding import FORMATS
from datasets.source import DataError, Source


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels if mode == "RGBA" else pixels[..., :3]).convert(mode)


def save(path: Path, image: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(8, 8)).save(path)
    return path


def encoded(kind: str, size: int = 24) -> bytes:
    buffer = io.BytesIO()
    noise(size, size).save(buffer, kind)
    return buffer.getvalue()


def read(folder: Path, size: int = 8, workers: int = 0) -> Source:
    return image_folder.read(folder, size, workers)


def refusal(*arguments) -> str:
    with pytest.raises(DataError) as error:
        source = read(*arguments)
        source.train.images.read(np.arange(len(source.train.targets)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes with two training images and one test image each."""
    names = ("train/cat/0", "train/cat/1", "train/dog/0", "train/dog/1", "test/cat/2", "test/dog/2")
    for i, name in enumerate(names):
        save(tmp_path / f"{name}.png", noise(8, 8 + i))
    return tmp_path


def test_classes_are_the_training_folders_in_alphabetical_order(tmp_path):
    names = ["zebra", "Übung 1", "10", "9", "Ant", "ant"]
    for name in names:
        save(tmp_path / "train" / name / "ein Bild ß 写真.png")
        save(tmp_path / "test" / name / "a b.jpg")
    source = read(tmp_path)
    assert source.class_names == ["10", "9", "Ant", "ant", "zebra", "Übung 1"]
    for split in (source.train, source.test):
        assert split.targets.dtype == np.int64
        assert split.targets.tolist() == [0, 1, 2, 3, 4, 5]
        assert split.images.read(np.arange(6)).shape == (6, 8, 8, 3)


@pytest.mark.parametrize(
    "name", ["a.PNG", "b.jpg", "c.JPeG", "d.webp", "e.BMP", "deeper/f.TIF", "g.tiff", "h.gif", "i.ppm", "j.jfif"]
)
def test_every_format_is_read_whatever_the_case_of_its_ending(tree, name):
    save(tree / "train/cat" / name, noise(16, 12))
    train = read(tree).train
    assert np.bincount(train.targets).tolist() == [3, 2]
    (place,) = [i for i, path in enumerate(train.images.load.paths) if path.endswith(name)]
    image = image_folder.decode(str(tree / "train/cat" / name), 8)
    np.testing.assert_array_equal(train.images.read([place])[0], image)


@pytest.mark.parametrize("name", ["b.TGA", "deeper/c.jp2"])
def test_images_of_other_formats_are_refused_by_name(tree, name):
    (tree / "train/cat" / name).parent.mkdir(exist_ok=True)
    (tree / "train/cat" / name).write_bytes(b"")
    assert refusal(tree).startswith(
        f"{tree / 'train/cat' / name}: images must be JPEG, PNG, BMP, GIF, PPM, TIFF, WEBP;"
    )


def test_val_is_read_where_there_is_no_test(tree):
    save(tree / "val/dog/3.png")
    assert read(tree).test.targets.tolist() == [0, 1]
    (tree / "test").rename(tree / "elsewhere")
    assert read(tree).test.targets.tolist() == [1]


def test_an_empty_class_folder_and_a_class_without_test_images_are_legal(tree):
    (tree / "train/bird").mkdir()
    save(tree / "train/emu/0.png")
    source = read(tree)
    assert source.class_names == ["bird", "cat", "dog", "emu"]
    assert source.train.targets.tolist() == [1, 1, 2, 2, 3]
    assert source.test.targets.tolist() == [1, 2]


def test_the_order_is_that_of_torchvisions_image_folder(tree):
    for name in ("train/dog/b/1.png", "train/dog/B.png", "train/dog/a/2.png", "train/dog/a b/3.png", "train/emu/4.png"):
        save(tree / name)
    (tree / "train" / "fox").symlink_to(tree / "train" / "dog")
    theirs = ImageFolder(tree / "train")
    train = read(tree).train
    assert train.images.load.paths == [path for path, _ in theirs.samples]
    assert train.targets.tolist() == theirs.targets


@pytest.mark.parametrize(("part", "name"), [("train", "b.JPG"), ("test", "d.tga")])
def test_an_image_in_no_class_folder_is_named_and_not_passed_over(tree, part, name):
    (tree / part / name).touch()
    (tree / part / "notes.txt").touch()
    assert refusal(tree).startswith(f"{tree / part / name}: lies in no class folder; expected are train/<class>/")


SKIPPED = [
    *("train/cat/.DS_Store", "train/cat/._0.png", "train/dog/Thumbs.db", "train/dog/DESKTOP.INI"),
    *("train/.hidden", "train/README", "test/.DS_Store", "test/cat/notes.txt", "test/cat/0.png.bak"),
]


def test_files_that_are_no_images_of_a_class_are_skipped_and_counted(tree):
    assert read(tree).notes == []
    for name in SKIPPED:
        (tree / name).write_text("no image")
    for folder in ("train/__MACOSX", "train/cat/__MACOSX", "test/__MACOSX", "train/dog/.ipynb_checkpoints"):
        save(tree / folder / "0.png")
    source = read(tree)
    assert (source.class_names, source.train.targets.tolist()) == (["cat", "dog"], [0, 0, 1, 1])
    assert source.test.targets.tolist() == [0, 1]
    (note,) = build_data("folder", str(tree), image_size=8).notes
    assert note.startswith(f"data_path: {len(SKIPPED) + 4} hidden or other files and folders skipped, such as test/")


def test_a_link_that_leads_back_does_not_multiply_images(tree):
    (tree / "train/cat/again").symlink_to(tree / "train/cat")
    assert refusal(tree).startswith(f"{tree / 'train/cat/again'}: is a link to {tree / 'train/cat'}, which it lies in")


def test_the_name_of_a_class_is_text_whatever_its_folder_s_name(tree):
    for part in ("train", "test"):
        os.rename(tree / part / "dog", os.fsencode(tree / part) + b"/caf\xe9")
    source = read(tree)
    assert source.class_names == ["caf\\xe9", "cat"]
    assert source.train.images.read(np.arange(4)).shape == (4, 8, 8, 3)


def test_a_path_that_is_no_folder_is_refused(tree):
    for name in ("x" * 5000, "a\0b", "nowhere", "train/cat/0.png"):
        assert refusal(tree / name).startswith(f"data_path: {tree / name / 'train'} is no folder; expected are train/")


def test_a_folder_of_classes_that_cannot_be_read_is_named(tree, monkeypatch):
    def refusing(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "iterdir", refusing)  # root may read everything
    assert refusal(tree) == f"data_path: {tree / 'train'}: cannot be read: Permission denied"


def test_images_come_in_the_order_asked_for_and_lossless(tree):
    paths = [tree / "train" / name for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    chosen = read(tree).train.images.read(np.array([3, 0, 3]))
    assert chosen.dtype == np.uint8
    np.testing.assert_array_equal(chosen, [np.asarray(Image.open(paths[i])) for i in (3, 0, 3)])
    assert read(tree).train.images.read(np.array([], dtype=np.int64)).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("mode", "extension", "stored"),
    [
        ("L", "png", "L"),
        ("L", "jpg", "L"),
        ("1", "png", "1"),
        ("LA", "png", "LA"),
        ("P", "png", "P"),
        ("RGBA", "png", "RGBA"),
        ("CMYK", "jpg", "CMYK"),
    ],
)
def test_every_mode_becomes_rgb_as_pil_converts_it(tmp_path, mode, extension, stored):
    path = save(tmp_path / f"x.{extension}", noise(8, 8, mode))
    with Image.open(path) as opened:
        assert opened.mode == stored
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(image_folder.decode(str(path), 8), expected)
    assert expected.shape == (8, 8, 3)


@pytest.mark.parametrize("width", [1, 32, 49, 640])  # 49 * (8 / 49) is less than 8
@pytest.mark.parametrize("height", [1, 33, 49, 197])
def test_any_image_fills_a_square_of_the_size_asked_for(tmp_path, width, height):
    path = save(tmp_path / "x.png", Image.new("RGB", (width, height), (9, 99, 199)))
    for size in (8, 32, 33):
        pixels = image_folder.decode(str(path), size)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.broadcast_to((9, 99, 199), (size, size, 3)))


@pytest.mark.parametrize(("width", "height"), [(128, 64), (64, 32), (96, 96), (8, 16)])
def test_scaling_and_cutting_equal_torchvisions_resize_and_center_crop(tmp_path, width, height):
    path = save(tmp_path / "x.png", noise(width, height))
    transform = T.Compose([T.Resize(32), T.CenterCrop(32)])
    np.testing.assert_array_equal(image_folder.decode(str(path), 32), np.asarray(transform(Image.open(path))))


def flipped_bit(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def of_claimed_size(png: bytes, side: int) -> bytes:
    header = png[12:16] + struct.pack(">2I", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


# Damage shows in exceptions of many kinds; the last ones are other formats under these names.
DAMAGED = {
    "truncated.png": encoded("PNG")[:600],
    "truncated.jpg": encoded("JPEG")[:-300],
    "empty.png": b"",
    "text.jpeg": b"<html>404: no such image</html>\n" * 20,
    "wrong header length.png": flipped_bit(encoded("PNG"), 11),
    "wrong data length.png": encoded("PNG")[:33] + struct.pack(">I", 500) + encoded("PNG")[37:],
    "enormous.png": of_claimed_size(encoded("PNG"), 100_000),
    "truncated gif.jpg": encoded("GIF")[:300],
    "truncated webp.png": encoded("WEBP")[:200],
    "strange dds.png": b"DDS " + struct.pack("<7I", 124, 0x1007, 8, 8, 8, 0, 0) + bytes(444),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_named_in_one_line(tree, name):
    path = tree / "train/dog" / name
    path.write_bytes(DAMAGED[name])
    assert refusal(tree).startswith(f"{path}: is no readable image (")


def test_a_link_to_nothing_is_named(tree):
    path = tree / "train/dog/moved.png"
    path.symlink_to(tree / "no longer here.png")
    assert refusal(tree) == f"{path}: no such image"


def move(part: str, to: str):
    return lambda tree: (tree / part).rename(tree / to)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (move("train", "training"), "train"),
        (move("test", "testing"), ""),
        (lambda tree: save(tree / "test/wolf/0.png"), "test/wolf"),
        (lambda tree: [p.unlink() for p in tree.glob("train/*/*")], "train"),
        (lambda tree: [p.unlink() for p in tree.glob("test/*/*")], "test"),
        (lambda tree: (move("test", "testing")(tree), (tree / "test").mkdir()), "test"),
        (lambda tree: (move("train", "training")(tree), save(tree / "train/0.png")), "train"),
        (lambda tree: (move("train", "training")(tree), (tree / "train").write_text("")), "train"),
    ],
    ids=["no train", "no test", "strange class", "no images", "no test images", "empty test", "no classes", "a file"],
)
def test_a_wrong_layout_is_refused_by_the_name_of_the_folder(tree, damage, names):
    damage(tree)
    message = refusal(tree)
    assert message.startswith(f"data_path: {tree / names} ")
    if names != "test/wolf":
        assert f"expected are {image_folder.LAYOUT}" in message


# ---------------------------------------------------------------------------------------------------------------------
# Processes that decode

MANY = 4 * image_folder.CHUNK
more_processes_than_cpus = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """So many images that processes decode them; tests do not write into it."""
    root = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(0)
    for i in range(MANY + 9):
        place = root / ("test" if i % 128 == 0 else "train") / ("ab"[i % 2])
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (8, 8 + i % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:04}.png")
    return root


@pytest.fixture(scope="module")
def decoded(many) -> np.ndarray:
    """The training images, one after another by this process."""
    paths = sorted((many / "train").glob("*/*.png"))
    return np.stack([image_folder.decode(str(path), 8) for path in paths])


def repeated(images: int, whole: int) -> np.ndarray:
    """Positions of as many of ``whole`` images, from the last one on backwards."""
    return np.arange(whole)[::-1][np.arange(images) % whole]


def process_id(path: str, size: int) -> np.ndarray:
    """Decodes to the number of the process that does it."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels.reshape(-1)[:4] = np.frombuffer(os.getpid().to_bytes(4, "little"), np.uint8)
    return pixels


@more_processes_than_cpus
@pytest.mark.parametrize(
    ("images", "workers", "processes"),
    [(MANY, 1, 1), (MANY + 300, 2, 2), (MANY, 0, 0), (MANY - 1, 3, 0)],
)
def test_processes_decode_many_images_and_few_are_decoded_here(many, images, workers, processes):
    before = multiprocessing.active_children()
    train = image_folder.read(many, 8, workers, process_id).train
    found = train.images.read(repeated(images, len(train.targets))).reshape(images, -1)[:, :4].copy().view(np.uint32)
    if processes:
        assert len(np.unique(found)) == processes
        assert os.getpid() not in found
    else:
        assert np.unique(found).tolist() == [os.getpid()]
    assert multiprocessing.active_children() == before


@more_processes_than_cpus
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("images", [MANY, 5 * image_folder.CHUNK + 17])
def test_any_number_of_processes_decodes_the_same_in_the_order_asked_for(many, decoded, images, workers):
    chosen = repeated(images, len(decoded))
    np.testing.assert_array_equal(read(many, 8, workers).train.images.read(chosen), decoded[chosen])


@more_processes_than_cpus
@pytest.mark.parametrize("workers", [0, 3])
def test_the_first_broken_image_of_many_is_named_in_one_line(many, tmp_path, workers):
    before = multiprocessing.active_children()
    paths = sorted((many / "train").glob("*/*.png"))
    for place in (700, 900):  # in the third chunk and in the fourth
        (tmp_path / f"{place}.png").write_bytes(b"no image")
        paths[place] = tmp_path / f"{place}.png"
    load = image_folder.Decoder([str(path) for path in paths], 8, workers, image_folder.decode)
    with pytest.raises(DataError) as error:
        load(repeated(MANY + 10, len(paths))[::-1])
    assert str(error.value) == f"{tmp_path / '700.png'}: is no readable image (none of {', '.join(FORMATS)})"
    del error
    assert multiprocessing.active_children() == before


def test_a_worker_decodes_a_large_batch_itself(many):
    """Its own processes it could not have."""
    loaders = [
        build_data("folder", str(many), image_size=8, data_on_device=where, workers=1).train_loader(
            MANY, 0, torch.device("cpu")
        )
        for where in (True, False)
    ]
    ours, theirs = ([batch.augment() for batch in loader.epoch(0)] for loader in loaders)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
