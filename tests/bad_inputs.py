"""Bad commands, files, data and checkpoints, and how the line begins that each has to end in."""

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.specs import find_spec
from models import build_model
from tests.trees import PATTERNS

DIGITS = "config/digits/digits_imb005.yaml"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def image(path: Path, width: int = 8, height: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def png(width: int, height: int) -> bytes:
    """A black image; it is not written whole where it would have more than a few rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(min(height, 4) * (width + 1)))
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    content = buffer.getvalue()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">2H", height, width) + content[at + 4 :]


BOMB, FLAT_BOMB, JPEG_BOMB = png(60_000, 60_000), png(30_000_000, 1), jpeg_that_claims(65_000, 65_000)


def folders(root: Path, names: tuple[str, ...] = ("cat", "dog"), size: int = 8) -> Path:
    """Class folders with two training images and one test image each."""
    for name in names:
        for place in ("train/{}/0.png", "train/{}/1.png", "test/{}/2.png"):
            image(root / place.format(name), size, size)
    return root


def listed(root: Path, dataset: str = "imagenet") -> Path:
    """A data set with lists: labels 0 and 1, two training images and one test image each."""
    lists = find_spec(dataset).lists
    names = (lists.train[0], lists.test[0])
    for name, pattern, numbers in zip(names, PATTERNS[dataset], ((0, 1), (2,)), strict=True):
        rows = [(pattern.format(c=label, i=10 * label + i), label) for label in (0, 1) for i in numbers]
        for path, _ in rows:
            image(root / path, 40, 30)
        write(root / name, "".join(f"{path} {label}\n" for path, label in rows))
    return root


class Hostile:
    """Unpickled, it would make a file called ``made``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (open, (str(self.folder / "made"), "w"))


def weights(**changes: object) -> dict:
    """A checkpoint in the format of MiSLAS, of a ResNet-20 for ten classes."""
    model = build_model("digits", "resnet20", 10)
    states = {"state_dict_model": model.backbone.state_dict(), "state_dict_classifier": model.classifier.state_dict()}
    return {"epoch": 1, "best_acc1": 50.0, **states, **changes}


# What makes a file or a tree, given the test's empty folder; commands name it {tmp}.
Prepare = Callable[[Path], object]


def nothing(tmp: Path) -> None:
    pass


def yaml_file(content: str | bytes) -> Prepare:
    return lambda tmp: write(tmp / "x.yaml", content)


def tree_with(change: Callable[[Path], object]) -> Prepare:
    return lambda tmp: change(folders(tmp / "data"))


def list_with(change: Callable[[str], str]) -> Prepare:
    """The training list as ``change`` makes it."""

    def prepare(tmp: Path) -> None:
        path = listed(tmp / "data") / "ImageNet_LT_train.txt"
        path.write_bytes(change(path.read_text()).encode("utf-8", "surrogateescape"))

    return prepare


def annotations(tmp: Path) -> None:
    """iNaturalist's official file instead of the training list."""
    root = listed(tmp / "data", "ina2018")
    rows = [line.split() for line in (root / "iNaturalist18_train.txt").read_text().splitlines()]
    (root / "iNaturalist18_train.txt").unlink()
    content = {
        "images": [{"id": i, "file_name": path} for i, (path, _) in enumerate(rows)],
        "annotations": [{"image_id": i, "category_id": int(label)} for i, (_, label) in enumerate(rows)],
    }
    write(root / "train2018.json", json.dumps(content))


def checkpoint(content: object) -> Prepare:
    """``content``: what is saved, or a function of the test's folder that gives it."""
    return lambda tmp: torch.save(content(tmp) if callable(content) else content, tmp / "x.pth.tar")


def hostile(tmp: Path) -> dict:
    return weights(state_dict_model=Hostile(tmp))


def cut(tmp: Path) -> None:
    torch.save(weights(), tmp / "whole")
    write(tmp / "x.pth.tar", (tmp / "whole").read_bytes()[:100_000])


def wrong_archive(tmp: Path) -> None:
    write(tmp / "data/cifar-10-python.tar.gz", pickle.dumps(Hostile(tmp)))


# ---------------------------------------------------------------------------------------------------------------------
# The table: name -> (what prepares the files, the command's words, the start of the line: what is wrong;
# a few lines are there in full, as examples; "..." stands for anything). One or two of every reader and every kind of
# harm: what else a reader refuses is tested with it (test_config.py, test_image_folder.py, test_image_list.py,
# test_cifar.py, test_checkpoint.py), and comes out of ``main`` by the same way.

FOLDER = "--cfg config/folder/base.yaml data_path {tmp}/data image_size 8 backbone resnet8 batch_size 4 workers 0 "
IMAGENET = "--cfg config/imagenet/imagenet_resnet50.yaml data_path {tmp}/data backbone resnet10 image_size 32 "
IMAGENET += "batch_size 4 workers 0 "
INA = IMAGENET.replace("imagenet/imagenet", "ina2018/ina2018")
CIFAR = "--cfg config/cifar10/cifar10_imb01.yaml data_path {tmp}/data "
TRAIN = f"--cfg {DIGITS} "
YAML = "--cfg {tmp}/x.yaml"
RESUME = f"--cfg {DIGITS} resume {{tmp}}/x.pth.tar"
PRETRAINED = TRAIN + "backbone resnet18 pretrained {tmp}/x.pth.tar"
LIST = "{tmp}/data/ImageNet_LT_train.txt"
IGNORED = ["gpu", "mode", "dist_url", "log_dir", "model_dir", "shift_bn", "lr_factor"]

COMMANDS = {
    "no file": (nothing, "", "command line: the following arguments are required: --cfg (usage: ..."),
    "a folder": (nothing, "--cfg {tmp}", "{tmp}: "),
    "an unknown key": (nothing, TRAIN + "lrr 1", "command line: unknown key 'lrr'; the nearest known one is 'lr'"),
    "out of range": (nothing, TRAIN + "imb_factor 2", "command line: imb_factor: 2 must lie in (0, 1]: ..."),
    "a Python tag": (nothing, TRAIN + "lr !!python/name:os.system", "command line: lr: "),
    "images too large": (nothing, TRAIN + "image_size 100000", "command line: image_size: "),
    "no CUDA here": (nothing, TRAIN + "device cuda", "device: "),
    "an unknown data set": (nothing, TRAIN + "dataset mnist", "dataset: "),
    "an unknown backbone": (nothing, TRAIN + "backbone vgg", "backbone: "),
    "other classes": (nothing, TRAIN + "num_classes 9", "num_classes: "),
    "save_dir is a file": (lambda tmp: write(tmp / "file", ""), TRAIN + "save_dir {tmp}/file", "save_dir: "),
}

FILES = {
    "a key twice": (yaml_file("lr: 1\nlr: 2\n"), YAML, "{tmp}/x.yaml: is not YAML: key 'lr' is given twice ..."),
    "no base": (yaml_file("_BASE_: y.yaml"), YAML, "{tmp}/x.yaml: _BASE_ names {tmp}/y.yaml, which is no file"),
    "code": (yaml_file("lr: !!python/object/apply:os.mkdir [made]\n"), YAML, "{tmp}/x.yaml: "),
    "a number of thousands of digits": (yaml_file("seed: 0x" + "f" * 5000), YAML, "{tmp}/x.yaml: seed: "),
    "an impossible name": (yaml_file('dataset: digits\nname: "\\ud800"\n'), YAML, "{tmp}/x.yaml: name: "),
    "an impossible folder": (yaml_file('dataset: digits\nsave_dir: "a\\0b"\n'), YAML, "{tmp}/x.yaml: save_dir: "),
    "links round in a circle": (
        lambda tmp: ((tmp / "x.yaml").symlink_to("y.yaml"), (tmp / "y.yaml").symlink_to("x.yaml")),
        YAML,
        "{tmp}/x.yaml: ",
    ),
    "aliases that stand for gigabytes": (
        yaml_file(
            "rank: &k0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{key}: &k{i + 1} [{', '.join([f'*k{i}'] * 9)}]\n" for i, key in enumerate(IGNORED))
            + "lr: *k7\n"
        ),
        YAML,
        "{tmp}/x.yaml: lr: ",
    ),
}

IMAGES = {
    "no data": (nothing, FOLDER, "data_path: "),
    "a cut that leaves one class": (tree_with(lambda data: None), FOLDER + "imb_factor 0.1", "data_path: "),
    "an image in no class": (
        tree_with(lambda data: image(data / "train/0.png")),
        FOLDER,
        "{tmp}/data/train/0.png: ",
    ),
    "a bomb": (
        tree_with(lambda data: write(data / "train/cat/x.png", BOMB)),
        FOLDER + "data_on_device True",
        "{tmp}/data/train/cat/x.png: ",
    ),
    "a wrong archive": (wrong_archive, CIFAR, "data_path: "),
    "too many held out": (tree_with(lambda data: None), FOLDER + "val_per_class 2", "val_per_class: "),
}

IMAGE_LISTS = {
    "no list": (tree_with(lambda data: None), IMAGENET, "train_txt: "),
    "a label too large": (
        list_with(lambda text: text + "a.jpg 1000\n"),
        IMAGENET,
        LIST + ", line 5: label 1000 is not one of 0 .. 999 (1 such labels)",
    ),
    "a path that leaves the folder": (
        list_with(lambda text: text + "train/../../x.jpg 0\n"),
        IMAGENET,
        LIST + ", line 5: 'train/../../x.jpg' leaves data_path; paths are relative to it, without '..'",
    ),
    "a class map of other classes": (
        lambda tmp: (listed(tmp / "data"), write(tmp / "map.txt", "0 1 2")),
        IMAGENET + "class_map {tmp}/map.txt",
        "class_map: ",
    ),
    "annotations cut short": (
        lambda tmp: (annotations(tmp), write(tmp / "data/train2018.json", '{"images": [')),
        INA,
        "{tmp}/data/train2018.json: ",
    ),
}

CHECKPOINTS = {
    "no checkpoint": (nothing, RESUME, "{tmp}/x.pth.tar: "),
    "half a checkpoint": (cut, RESUME, "{tmp}/x.pth.tar: "),
    "a checkpoint with code": (checkpoint(hostile), RESUME, "{tmp}/x.pth.tar: "),
    "code as pretrained weights": (checkpoint(hostile), PRETRAINED, "pretrained: "),
    "pretrained weights without names": (checkpoint({5: torch.ones(1)}), PRETRAINED, "pretrained: "),
    "another shape": (
        checkpoint(
            lambda tmp: weights(state_dict_classifier={"fc.weight": torch.ones(9, 64), "fc.bias": torch.ones(9)})
        ),
        RESUME,
        "{tmp}/x.pth.tar: is of another architecture: fc.weight is 9x64 in the file and 10x64 in the model; ...",
    ),
    "an epoch without end": (checkpoint(lambda tmp: weights(epoch=float("inf"))), RESUME, "{tmp}/x.pth.tar: "),
}

TABLE = COMMANDS | FILES | IMAGES | IMAGE_LISTS | CHECKPOINTS
