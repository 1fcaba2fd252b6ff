"""Bad commands, files, data and checkpoints, and how the line begins that each has to end in."""

import io
import json
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import build_model
from tests.trees import PATTERNS

DIGITS = "config/digits/digits_imb005.yaml"
LISTS = {"imagenet": 1000, "ina2018": 8142, "places": 365}


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
    train, test = PATTERNS[dataset]
    for name, pattern, numbers in zip(_list_names(dataset), (train, test), ((0, 1), (2,)), strict=True):
        rows = [(pattern.format(c=label, i=10 * label + i), label) for label in (0, 1) for i in numbers]
        for path, _ in rows:
            image(root / path, 40, 30)
        write(root / name, "".join(f"{path} {label}\n" for path, label in rows))
    return root


def _list_names(dataset: str) -> tuple[str, str]:
    stem = {"imagenet": "ImageNet_LT", "ina2018": "iNaturalist18", "places": "Places_LT"}[dataset]
    return f"{stem}_train.txt", f"{stem}_{'val' if dataset == 'ina2018' else 'test'}.txt"


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


def tree_and(name: str, content: bytes) -> Prepare:
    return tree_with(lambda data: write(data / name, content))


def list_with(change: Callable[[str], str], dataset: str = "imagenet") -> Prepare:
    """The training list as ``change`` makes it."""

    def prepare(tmp: Path) -> None:
        path = listed(tmp / "data", dataset) / _list_names(dataset)[0]
        path.write_bytes(change(path.read_text()).encode("utf-8", "surrogateescape"))

    return prepare


def list_and(line: str) -> Prepare:
    return list_with(lambda text: f"{text}{line}\n")


def annotations(change: Callable[[dict], object]) -> Prepare:
    """iNaturalist's official file instead of the training list."""

    def prepare(tmp: Path) -> None:
        root = listed(tmp / "data", "ina2018")
        rows = [line.split() for line in (root / "iNaturalist18_train.txt").read_text().splitlines()]
        (root / "iNaturalist18_train.txt").unlink()
        content = {
            "images": [{"id": i, "file_name": path} for i, (path, _) in enumerate(rows)],
            "annotations": [{"image_id": i, "category_id": int(label)} for i, (_, label) in enumerate(rows)],
        }
        change(content)
        write(root / "train2018.json", json.dumps(content))

    return prepare


def checkpoint(content: object, **how: object) -> Prepare:
    """``content``: what is saved, or a function of the test's folder that gives it."""

    def prepare(tmp: Path) -> None:
        torch.save(content(tmp) if callable(content) else content, tmp / "x.pth.tar", **how)

    return prepare


def hostile(tmp: Path) -> dict:
    return weights(state_dict_model=Hostile(tmp))


def renamed(tmp: Path) -> None:
    checkpoint(hostile)(tmp)
    (tmp / "x.pth.tar").rename(tmp / "notes.txt")


def zipped(tmp: Path) -> None:
    with zipfile.ZipFile(tmp / "x.zip", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"state_dict_model": Hostile(tmp)}, protocol=2))
        file.writestr("archive/version", "3\n")


def cut(tmp: Path) -> None:
    torch.save(weights(), tmp / "whole")
    write(tmp / "x.pth.tar", (tmp / "whole").read_bytes()[:100_000])


def wrong_archive(tmp: Path) -> None:
    write(tmp / "data/cifar-10-python.tar.gz", pickle.dumps(Hostile(tmp)))


# ---------------------------------------------------------------------------------------------------------------------
# The table: name -> (what prepares the files, the command's words, the start of the line: what is wrong;
# a few lines are there in full, as examples; "..." stands for anything)

FOLDER = "--cfg config/folder/base.yaml data_path {tmp}/data image_size 8 backbone resnet8 batch_size 4 workers 0 "
IMAGENET = "--cfg config/imagenet/imagenet_resnet50.yaml data_path {tmp}/data backbone resnet10 image_size 32 "
IMAGENET += "batch_size 4 workers 0 "
INA = IMAGENET.replace("imagenet/imagenet", "ina2018/ina2018")
CIFAR = "--cfg config/cifar10/cifar10_imb01.yaml data_path {tmp}/data "
TRAIN = f"--cfg {DIGITS} "
YAML = "--cfg {tmp}/x.yaml"
RESUME = f"--cfg {DIGITS} resume {{tmp}}/x.pth.tar"
LIST = "{tmp}/data/ImageNet_LT_train.txt"

COMMANDS = {
    "no file": (nothing, "", "command line: the following arguments are required: --cfg (usage: ..."),
    "no value for the file": (nothing, "--cfg", "command line: "),
    "a file that is not there": (nothing, "--cfg {tmp}/x.yaml", "{tmp}/x.yaml: "),
    "a folder": (nothing, "--cfg {tmp}", "{tmp}: "),
    "an option without a value": (
        nothing,
        TRAIN + "lr",
        "command line: ",
    ),
    "an unknown flag": (nothing, TRAIN + "--fast", "command line: "),
    "an unknown key": (nothing, TRAIN + "lrr 1", "command line: unknown key 'lrr'; the nearest known one is 'lr'"),
    "another type": (nothing, TRAIN + "lr fast", "command line: lr: "),
    "not finite": (nothing, TRAIN + "lr nan", "command line: lr: "),
    "out of range": (nothing, TRAIN + "imb_factor 2", "command line: imb_factor: 2 must lie in (0, 1]: ..."),
    "half a list": (nothing, TRAIN + "lr_steps [1", "command line: lr_steps: "),
    "a Python tag": (nothing, TRAIN + "lr !!python/name:os.system", "command line: lr: "),
    "no batch": (nothing, TRAIN + "batch_size 0", "command line: batch_size: "),
    "images too large": (
        nothing,
        TRAIN + "image_size 100000",
        "command line: image_size: ",
    ),
    "an unknown device": (
        nothing,
        TRAIN + "device tpu",
        "command line: device: ",
    ),
    "no CUDA here": (nothing, TRAIN + "device cuda", "device: "),
    "an unknown data set": (nothing, TRAIN + "dataset mnist", "dataset: "),
    "an unknown backbone": (nothing, TRAIN + "backbone vgg", "backbone: "),
    "other classes": (nothing, TRAIN + "num_classes 9", "num_classes: "),
    "save_dir is a file": (
        lambda tmp: write(tmp / "file", ""),
        TRAIN + "save_dir {tmp}/file",
        "save_dir: ",
    ),
}

FILES = {
    "not YAML": (yaml_file("lr: [1"), YAML, "{tmp}/x.yaml: "),
    "a list": (yaml_file("- lr\n"), YAML, "{tmp}/x.yaml: "),
    "an empty file": (yaml_file(""), YAML, "{tmp}/x.yaml: "),
    "a key twice": (yaml_file("lr: 1\nlr: 2\n"), YAML, "{tmp}/x.yaml: is not YAML: key 'lr' is given twice ..."),
    "a loop": (yaml_file("_BASE_: x.yaml"), YAML, "{tmp}/x.yaml: "),
    "no base": (yaml_file("_BASE_: y.yaml"), YAML, "{tmp}/x.yaml: _BASE_ names {tmp}/y.yaml, which is no file"),
    "code": (
        yaml_file("lr: !!python/object/apply:os.mkdir [made]\n"),
        YAML,
        "{tmp}/x.yaml: ",
    ),
    "bytes": (yaml_file(b"\x80\x02}q\x00\xff" * 9), YAML, "{tmp}/x.yaml: "),
    "depth": (yaml_file("lr: " + "[" * 3000), YAML, "{tmp}/x.yaml: "),
    "a number of thousands of digits": (
        yaml_file("seed: 0x" + "f" * 5000),
        YAML,
        "{tmp}/x.yaml: seed: ",
    ),
    "a name that no file can have": (
        yaml_file('dataset: digits\nname: "\\ud800"\n'),
        YAML,
        "{tmp}/x.yaml: name: ",
    ),
    "a folder that cannot be": (
        yaml_file('dataset: digits\nsave_dir: "a\\0b"\n'),
        YAML,
        "{tmp}/x.yaml: save_dir: ",
    ),
    "links round in a circle": (
        lambda tmp: ((tmp / "x.yaml").symlink_to("y.yaml"), (tmp / "y.yaml").symlink_to("x.yaml")),
        YAML,
        "{tmp}/x.yaml: ",
    ),
    "aliases that stand for gigabytes": (
        yaml_file(
            "rank: &k0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{key}: &k{i + 1} [{', '.join([f'*k{i}'] * 9)}]\n"
                for i, key in enumerate(["gpu", "mode", "dist_url", "log_dir", "model_dir", "shift_bn", "lr_factor"])
            )
            + "lr: *k7\n"
        ),
        YAML,
        "{tmp}/x.yaml: lr: ",
    ),
    "aliases that multiply": (
        yaml_file(
            "a: &a [x, x]\n" + "".join(f"k{i}: &k{i} [*{'k' * (i > 0)}{i - 1 if i else 'a'}]\n" for i in range(9))
        ),
        YAML,
        "{tmp}/x.yaml: ",
    ),
}

IMAGES = {
    "no data": (
        nothing,
        FOLDER,
        "data_path: ",
    ),
    "no test": (
        tree_with(lambda data: shutil.rmtree(data / "test")),
        FOLDER,
        "data_path: ",
    ),
    "no class folders": (
        tree_with(lambda data: [shutil.rmtree(folder) for folder in (data / "train").iterdir()]),
        FOLDER,
        "data_path: ",
    ),
    "only one class": (
        lambda tmp: folders(tmp / "data", ("cat",)),
        FOLDER,
        "data_path: ",
    ),
    "a cut that leaves one class": (
        tree_with(lambda data: None),
        FOLDER + "imb_factor 0.1",
        "data_path: ",
    ),
    "a class of the test alone": (
        tree_with(lambda data: image(data / "test/emu/0.png")),
        FOLDER,
        "data_path: {tmp}/data/test/emu is a class that {tmp}/data/train does not have",
    ),
    "an image in no class": (
        tree_with(lambda data: image(data / "train/0.png")),
        FOLDER,
        "{tmp}/data/train/0.png: ",
    ),
    "an image of another kind": (
        tree_and("train/cat/x.webp", b""),
        FOLDER,
        "{tmp}/data/train/cat/x.webp: ",
    ),
    "a link round in a circle": (
        tree_with(lambda data: (data / "train/cat/x").symlink_to(data / "train")),
        FOLDER,
        "{tmp}/data/train/cat/x: ",
    ),
    "an empty image": (
        tree_and("train/cat/x.png", b""),
        FOLDER,
        "{tmp}/data/train/cat/x.png: ",
    ),
    "no image": (
        tree_and("test/cat/x.jpg", b"<html>404</html>"),
        FOLDER,
        "{tmp}/data/test/cat/x.jpg: ",
    ),
    "a link to nothing": (
        tree_with(lambda data: (data / "train/cat/x.png").symlink_to(data / "y.png")),
        FOLDER,
        "{tmp}/data/train/cat/x.png: ",
    ),
    "a bomb": (
        tree_and("train/cat/x.png", BOMB),
        FOLDER + "data_on_device True",
        "{tmp}/data/train/cat/x.png: ",
    ),
    "a bomb in one row": (
        tree_and("train/cat/x.png", FLAT_BOMB),
        FOLDER,
        "{tmp}/data/train/cat/x.png: ",
    ),
    "another size for CIFAR": (
        lambda tmp: (folders(tmp / "data", tuple("abcdefghij"), 32), image(tmp / "data/train/c/9.png", 32, 31)),
        CIFAR,
        "{tmp}/data/train/c/9.png: is 32x31 pixels, this data set has 32x32; dataset: folder takes images of any size",
    ),
    "other classes for CIFAR": (
        tree_with(lambda data: None),
        CIFAR,
        "data_path: ",
    ),
    "a wrong archive": (
        wrong_archive,
        CIFAR,
        "data_path: ",
    ),
    "more held out than there are": (
        tree_with(lambda data: None),
        FOLDER + "val_per_class 2",
        "val_per_class: ",
    ),
}

IMAGE_LISTS = {
    "no list": (
        tree_with(lambda data: None),
        IMAGENET,
        "train_txt: ",
    ),
    "an empty list": (list_with(lambda text: ""), IMAGENET, LIST + ": "),
    "a list in UTF-16": (
        list_with(lambda text: text.encode("utf-16").decode("utf-8", "surrogateescape")),
        IMAGENET,
        LIST + ", line 1: ",
    ),
    "no label": (list_and("a.jpg"), IMAGENET, LIST + ", line 5: "),
    "a label in words": (list_and("a.jpg cat"), IMAGENET, LIST + ", line 5: "),
    "a label too large": (
        list_and("a.jpg 1000"),
        IMAGENET,
        LIST + ", line 5: label 1000 is not one of 0 .. 999 (1 such labels)",
    ),
    "a negative label": (
        list_and("a.jpg -1"),
        IMAGENET,
        LIST + ", line 5: ",
    ),
    "a list for other classes": (
        lambda tmp: (listed(tmp / "data"), write(tmp / "data/ina.txt", "a/1.jpg 0\na/2.jpg 8141\n")),
        IMAGENET + "train_txt ina.txt",
        "{tmp}/data/ina.txt, line 2: ",
    ),
    "a line twice": (
        list_with(lambda text: text + text.splitlines(keepends=True)[1]),
        IMAGENET,
        LIST + ", line 5: ",
    ),
    "an image with two labels": (
        list_and("train/n00000000/n00000000_1.JPEG 1"),
        IMAGENET,
        LIST + ", line 5: ",
    ),
    "a path that leaves the folder": (
        list_and("train/../../x.jpg 0"),
        IMAGENET,
        LIST + ", line 5: 'train/../../x.jpg' leaves data_path; paths are relative to it, without '..'",
    ),
    "an absolute path": (
        list_and("/etc/passwd 0"),
        IMAGENET,
        LIST + ", line 5: ",
    ),
    "only one label": (
        list_with(lambda text: "".join(text.splitlines(keepends=True)[:2])),
        IMAGENET,
        "data_path: ",
    ),
    "images that are elsewhere": (
        list_with(lambda text: text.replace("train/", "images/")),
        IMAGENET,
        "data_path: ",
    ),
    "a class map of other classes": (
        lambda tmp: (listed(tmp / "data"), write(tmp / "map.txt", "0 1 2")),
        IMAGENET + "class_map {tmp}/map.txt",
        "class_map: ",
    ),
    "annotations that leave the folder": (
        annotations(lambda content: content["images"][0].update(file_name="../x.jpg")),
        INA,
        "{tmp}/data/train2018.json, line 1: ",
    ),
    "an image without annotation": (
        annotations(lambda content: content["annotations"].pop()),
        INA,
        "{tmp}/data/train2018.json: ",
    ),
    "annotations cut short": (
        lambda tmp: (annotations(dict.clear)(tmp), write(tmp / "data/train2018.json", '{"images": [')),
        INA,
        "{tmp}/data/train2018.json: ",
    ),
}

CHECKPOINTS = {
    "no checkpoint": (nothing, RESUME, "{tmp}/x.pth.tar: "),
    "an empty file as checkpoint": (
        lambda tmp: write(tmp / "x.pth.tar", ""),
        RESUME,
        "{tmp}/x.pth.tar: ",
    ),
    "text as checkpoint": (
        lambda tmp: write(tmp / "x.pth.tar", "lr: 0.1\n" * 99),
        RESUME,
        "{tmp}/x.pth.tar: ",
    ),
    "half a checkpoint": (cut, RESUME, "{tmp}/x.pth.tar: "),
    "a checkpoint with code": (checkpoint(hostile), RESUME, "{tmp}/x.pth.tar: "),
    "an old pickle with code": (
        checkpoint(hostile, _use_new_zipfile_serialization=False),
        RESUME,
        "{tmp}/x.pth.tar: ",
    ),
    "code under another name": (
        renamed,
        TRAIN + "resume {tmp}/notes.txt",
        "{tmp}/notes.txt: ",
    ),
    "code in a zip file": (zipped, TRAIN + "resume {tmp}/x.zip", "{tmp}/x.zip: "),
    "code as pretrained weights": (
        checkpoint(hostile),
        TRAIN + "backbone resnet18 pretrained {tmp}/x.pth.tar",
        "pretrained: ",
    ),
    "a whole model": (
        checkpoint(lambda tmp: torch.nn.Linear(2, 2)),
        RESUME,
        "{tmp}/x.pth.tar: ",
    ),
    "no dict": (checkpoint([1, 2]), RESUME, "{tmp}/x.pth.tar: "),
    "no weights": (
        checkpoint({"epoch": 3}),
        RESUME,
        "{tmp}/x.pth.tar: ",
    ),
    "another architecture": (
        checkpoint(lambda tmp: weights()),
        RESUME + " backbone resnet32",
        "{tmp}/x.pth.tar: ",
    ),
    "another shape": (
        checkpoint(
            lambda tmp: weights(state_dict_classifier={"fc.weight": torch.ones(9, 64), "fc.bias": torch.ones(9)})
        ),
        RESUME,
        "{tmp}/x.pth.tar: is of another architecture: fc.weight is 9x64 in the file and 10x64 in the model; ...",
    ),
    "pretrained weights without names": (
        checkpoint({5: torch.ones(1)}),
        TRAIN + "backbone resnet18 pretrained {tmp}/x.pth.tar",
        "pretrained: ",
    ),
    "an epoch without end": (
        checkpoint(lambda tmp: weights(epoch=float("inf"))),
        RESUME,
        "{tmp}/x.pth.tar: ",
    ),
    "numbers that are text": (
        checkpoint(lambda tmp: weights(epoch="ten")),
        RESUME,
        "{tmp}/x.pth.tar: ",
    ),
}

TABLE = COMMANDS | FILES | IMAGES | IMAGE_LISTS | CHECKPOINTS
