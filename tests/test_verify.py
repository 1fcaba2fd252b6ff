"""Checks of data sets: small trees of real images with one thing wrong at a time."""

import lzma
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import verify
from datasets.specs import SPECS, Published
from utils.command_line import exit_code

ROOT = Path(__file__).parents[1]
LISTS = Path(__file__).parents[2] / "shared" / "data" / "lists"
TRAIN = [*(("a/attic", i, 0) for i in range(6)), *(("a/arena/hockey", i, 1) for i in range(4)), ("b/barn", 0, 3)]
TEST = [0, 0, 0, 1, 1, 1, 3]  # labels; label 2 has no image
BLOBS = ("b013e207347f5999123136ca47ab9dc0ee3e8b89", "5f40c9525b80a790c4e1b445d938e3447a874a91")  # git hash-object


def save_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """Places with four classes and eleven training images, as its published figures then say."""
    published = Published(len(TRAIN), len(TEST), largest=6, smallest=1, train_blob=BLOBS[0], test_blob=BLOBS[1])
    row = replace(SPECS["places"], num_classes=4, published=published)
    monkeypatch.setitem(SPECS, "places", row)
    train = [(f"data_256/{folder}/{i}.jpg", label) for folder, i, label in TRAIN]
    test = [(f"val_256/v{i}.jpg", label) for i, label in enumerate(TEST)]
    for i, (path, _) in enumerate(train + test):
        save_image(tmp_path / path, i)
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"Places_LT_{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
    (tmp_path / "x.yaml").write_text(f"dataset: places\ndata_path: {tmp_path}\nworkers: 2\n")
    return tmp_path


@pytest.fixture
def check(tree, capsys):
    """Runs the command in this process; returns its exit code and its output."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = exit_code(lambda: verify.main(["--cfg", str(tree / "x.yaml"), *arguments]))
        return code, capsys.readouterr().out

    return run


def problems(text: str) -> list[str]:
    """The report's last section, which counts its problems."""
    head, *lines = text[text.index("problems: ") :].splitlines()
    assert head == f"problems: {sum(line.startswith('- ') for line in lines)}"
    return lines


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_a_data_set_without_fault(tree, check):
    code, text = check()
    assert text.splitlines() == [
        f"places in {tree}",
        "",
        f"train: {tree}/Places_LT_train.txt",
        "  images: 11",
        "  classes with images: 3 of 4",
        "  largest class: 6 images, label 0 (a/attic)",
        "  smallest class: 1 images, label 3 (b/barn)",
        "  this is MiSLAS's Places_LT_train.txt, byte for byte",
        "",
        f"test: {tree}/Places_LT_test.txt",
        "  images: 7",
        "  classes with images: 3 of 4",
        "  largest class: 3 images, label 0 (a/attic)",
        "  smallest class: 1 images, label 3 (b/barn)",
        "  this is MiSLAS's Places_LT_test.txt, byte for byte",
        "",
        "note: test: 7 images lie in no class folder; labels not checked",
        "note: no image was decoded; use --images all or --images N",
        "",
        "problems: 0",
    ]
    assert code == 0


def test_a_list_with_other_bytes_than_mislas_s_is_said(tree, check):
    path = tree / "Places_LT_test.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    code, text = check()
    assert f"  this is not MiSLAS's Places_LT_test.txt, byte for byte (as a git blob that is {BLOBS[1][:10]}," in text
    assert (code, problems(text)) == (0, [])


def test_the_published_lists_are_known_by_their_ids(tmp_path):
    for name in ("places", "imagenet", "ina2018"):
        spec = SPECS[name]
        for title, list_name in (("train", spec.lists.train[0]), ("test", spec.lists.test[0])):
            packed = LISTS / f"{list_name}.xz"
            if packed.is_file():
                (tmp_path / list_name).write_bytes(lzma.decompress(packed.read_bytes()))
                said = verify._compare_with_mislas(title, tmp_path / list_name, spec)
                assert said == f"  this is MiSLAS's {list_name}, byte for byte"
    if not any(tmp_path.iterdir()):
        pytest.skip(f"{LISTS} is not here")


def line(number: int, path: str, label: int) -> str:
    return f"line {number}: {path}, label {label}"


def in_train(*changes: tuple[str, str]):
    return lambda tree: edit(tree / "Places_LT_train.txt", *changes)


FEWER = "- train: images: published 11, here 10"
FAULTS = {
    "fewer images": (
        in_train(("data_256/a/attic/3.jpg 0\n", "\n")),
        [FEWER, "- train: largest class: published 6, here 5"],
    ),
    "another smallest class": (
        in_train(("data_256/b/barn/0.jpg 3\n", "")),
        [FEWER, "- train: smallest class: published 1, here 4"],
    ),
    "no label": (
        in_train(("data_256/a/arena/hockey/2.jpg 1", "data_256/a/arena/hockey/2.jpg")),
        [FEWER, "- train: lines that are not 'relative/path label': 1", "    line 9: 'data_256/a/arena/hockey/2.jpg'"],
    ),
    "labels out of range": (
        in_train(("hockey/2.jpg 1", "hockey/2.jpg 4"), ("hockey/3.jpg 1", "hockey/3.jpg -1")),
        [
            "- train: images: published 11, here 9",
            "- train: labels outside 0 .. 3: 2",
            f"    {line(9, 'data_256/a/arena/hockey/2.jpg', 4)}",
            f"    {line(10, 'data_256/a/arena/hockey/3.jpg', -1)}",
        ],
    ),
    "listed twice": (
        in_train(("hockey/2.jpg 1", "hockey/1.jpg 1")),
        [
            "- train: images listed again: 1",
            f"    {line(9, 'data_256/a/arena/hockey/1.jpg', 1)}; {line(8, 'data_256/a/arena/hockey/1.jpg', 1)}",
        ],
    ),
    "in train and test": (
        lambda tree: edit(tree / "Places_LT_test.txt", ("val_256/v3.jpg", "data_256/a/arena/hockey/1.jpg")),
        [
            "- images in train and test: 1",
            f"    train {line(8, 'data_256/a/arena/hockey/1.jpg', 1)}; "
            f"test {line(4, 'data_256/a/arena/hockey/1.jpg', 1)}",
        ],
    ),
    "mislabelled": (
        in_train(("hockey/2.jpg 1", "hockey/2.jpg 0")),
        [
            "- train: largest class: published 6, here 7",
            "- train: images labelled unlike most of their folder: 1",
            f"    {line(9, 'data_256/a/arena/hockey/2.jpg', 0)}, most have 1 (a/arena/hockey)",
        ],
    ),
    "two folders with one label": (
        in_train(("b/barn/0.jpg 3", "b/barn/0.jpg 1")),
        [
            "- train: smallest class: published 1, here 5",
            "- train: labels of more than one class folder: 1",
            "    label 1: a/arena/hockey, b/barn",
        ],
    ),
    "missing": (
        lambda tree: shutil.rmtree(tree / "data_256/a/attic"),
        ["- train: missing or empty files: 6"]
        + [f"    line {i + 1}: TREE/data_256/a/attic/{i}.jpg" for i in range(5)]
        + ["    and 1 more"],
    ),
    "a folder and an empty file in the test list": (
        lambda tree: (
            (tree / "val_256/v4.jpg").unlink(),
            (tree / "val_256/v4.jpg").mkdir(),
            (tree / "val_256/v5.jpg").write_bytes(b""),
        ),
        ["- test: missing or empty files: 2", "    line 5: TREE/val_256/v4.jpg", "    line 6: TREE/val_256/v5.jpg"],
    ),
    "a path that no disk can have": (
        in_train(("hockey/2.jpg", "hockey/\0.jpg")),
        ["- train: missing or empty files: 1", "    line 9: TREE/data_256/a/arena/hockey/\0.jpg"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_one_problem_with_its_lines(tree, check, name):
    damage, expected = FAULTS[name]
    damage(tree)
    code, text = check()
    assert problems(text) == [line.replace("TREE", str(tree)) for line in expected]
    assert code == 1


@pytest.mark.parametrize(("split", "content"), [("train", ""), ("test", "nothing\n")])
def test_a_list_without_images_is_a_problem(tree, check, split, content):
    (tree / f"Places_LT_{split}.txt").write_text(content)
    code, text = check()
    assert code == 1
    assert problems(text)[0] == f"- {split}: images: published {11 if split == 'train' else 7}, here 0"


# ---------------------------------------------------------------------------------------------------------------------
# Class folders


def relist(tree: Path, train: list[tuple[str, int]], test: list[tuple[str, int]]) -> None:
    for name, rows in (("train", train), ("test", test)):
        (tree / f"Places_LT_{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))


def label_problems(text: str) -> list[str]:
    """Without the missing files, here all, and the counts."""
    kept = problems(text)
    first = next(i for i, line in enumerate(kept) if "missing" in line)
    return [line for line in kept[:first] if "published" not in line]


def test_a_folder_s_images_of_both_lists_count(tree, check):
    """Two of three images of n1 have label 1, though one of two in the training list has not."""
    train = [("train/n0/1.jpg", 0), ("train/n0/2.jpg", 0), ("train/n1/1.jpg", 1), ("train/n1/2.jpg", 0)]
    relist(tree, train, [("val/n0/3.jpg", 0), ("val/n1/3.jpg", 1)])
    _, text = check()
    assert label_problems(text) == [
        "- train: images labelled unlike most of their folder: 1",
        f"    {line(4, 'train/n1/2.jpg', 0)}, most have 1 (n1)",
    ]
    relist(tree, train[:3], [("val/n0/3.jpg", 1), ("val/n1/3.jpg", 1)])
    assert label_problems(check()[1])[0] == "- test: images labelled unlike most of their folder: 1"


def test_a_folder_without_a_majority_is_not_judged(tree, check):
    train = [("data_256/n0/1.jpg", 0), ("data_256/n1/1.jpg", 1), ("data_256/n1/2.jpg", 2), ("data_256/n0/2.jpg", 0)]
    relist(tree, train, [("val/n0/3.jpg", 0)])
    _, text = check()
    assert label_problems(text) == []
    assert "note: train: 2 images lie in no class folder; labels not checked\n" in text


@pytest.mark.parametrize("parts", ["", "ab"], ids=["flat", "below others"])
def test_folders_of_several_labels_are_no_class_folders(tree, check, parts):
    """Even if one label prevails."""
    test = [(f"val/{part}/{i}.jpg", i % 4) for part in parts for i in range(8)]
    test = test or [(f"val_256/{i}.jpg", i // 12) for i in range(16)]
    relist(tree, [("data_256/n0/1.jpg", 0), ("data_256/n1/1.jpg", 1)], test)
    _, text = check()
    assert label_problems(text) == []
    assert "note: test: 16 images lie in no class folder; labels not checked\n" in text


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_images_of_the_other_layout_are_looked_up_where_they_lie(tree, check):
    for folder, other in (("a/attic", "attic"), ("a/arena/hockey", "arena-hockey"), ("b/barn", "barn")):
        shutil.copytree(tree / "data_256" / folder, tree / "train" / other)
    for i, label in enumerate(TEST):
        save_image(tree / f"val/c{label}/v{i}.jpg", i)
    shutil.rmtree(tree / "data_256")
    shutil.rmtree(tree / "val_256")
    assert check()[0] == 0
    (tree / "train/arena-hockey/2.jpg").unlink()
    assert problems(check()[1]) == [
        "- train: missing or empty files: 1",
        f"    line 9: {tree}/train/arena-hockey/2.jpg",
    ]


@pytest.mark.parametrize("workers", ["0", "3"])
def test_images_that_do_not_decode_fully_are_named_where_asked(tree, check, workers):
    """A missing one is missing and not damaged too."""
    damaged = ("data_256/a/attic/2.jpg", "val_256/v1.jpg")
    for path in damaged:
        (tree / path).write_bytes((tree / path).read_bytes()[:-40])  # the header is whole
    assert check()[0] == 0
    (tree / "data_256/a/attic/4.jpg").unlink()
    code, text = check("--images", "all", "workers", workers)
    assert code == 1
    starts = [
        "- train: missing or empty files: 1",
        f"    line 5: {tree}/data_256/a/attic/4.jpg",
        "- train: images that cannot be decoded: 1",
        f"    line 3: {tree / damaged[0]}: is no readable image (",
        "- test: images that cannot be decoded: 1",
        f"    line 2: {tree / damaged[1]}: is no readable image (",
    ]
    assert all(found.startswith(start) for found, start in zip(problems(text), starts, strict=True)), text
    assert "note: train: 10 of 11 images were decoded\nnote: test: 7 of 7 images were decoded\n" in text
    assert "no image was decoded" not in text


@pytest.mark.parametrize(("number", "chosen"), [("1", [0]), ("4", [0, 3, 7, 10]), ("50", range(11))])
def test_some_images_are_evenly_spaced(tree, check, monkeypatch, number, chosen):
    looked = []
    monkeypatch.setattr(verify, "open_rgb", looked.append)
    _, text = check("--images", number)
    names = [f"{tree}/data_256/{folder}/{i}.jpg" for folder, i, _ in TRAIN]
    assert sorted(path for path in looked if "data_256" in path) == sorted(names[i] for i in chosen)
    assert f"note: train: {len(chosen)} of 11 images were decoded\n" in text


def test_one_content_in_train_and_test_is_noted(tree, check):
    shutil.copy(tree / "data_256/a/attic/2.jpg", tree / "val_256/v1.jpg")
    shutil.copy(tree / "data_256/b/barn/0.jpg", tree / "val_256/v6.jpg")
    code, text = check("--images", "all")
    assert code == 0
    assert (
        "note: 2 decoded files are the same in train and test, such as "
        f"train {line(3, 'data_256/a/attic/2.jpg', 0)}; test {line(2, 'val_256/v1.jpg', 0)}\n"
    ) in text
    assert "are the same" not in check()[1]


# ---------------------------------------------------------------------------------------------------------------------
# Data sets without lists, and the command itself


def test_own_lists_need_no_published_figures(tree, check):
    shutil.copy(tree / "Places_LT_test.txt", tree / "val.txt")
    edit(tree / "val.txt", ("val_256/v6.jpg 3\n", ""), ("val_256/v0.jpg 0", "data_256/a/attic/0.jpg 0"))
    edit(tree / "Places_LT_train.txt", ("b/barn/0.jpg 3", "b/barn/0.jpg 2"))
    options = ["dataset", "lists", "train_txt", "Places_LT_train.txt", "val_txt", "val.txt"]
    code, text = check(*options)
    assert (code, problems(text)[0]) == (1, "- images in train and test: 1")
    assert "MiSLAS" not in text
    edit(tree / "val.txt", ("data_256/a/attic/0.jpg 0\n", ""))
    write = (tree / "test.txt").write_text
    write("val_256/v6.jpg 2\nval_256/v0.jpg 0\n")
    code, text = check(*options, "test_txt", "test.txt", "--images", "all")
    assert (code, problems(text)) == (0, [])
    assert [line.split(":")[0] for line in text.splitlines() if ".txt" in line] == ["train", "val", "test"]
    write("val_256/v1.jpg 0\n")
    assert problems(check(*options, "test_txt", "test.txt")[1])[0] == "- images in val and test: 1"
    edit(tree / "Places_LT_train.txt", ("b/barn/0.jpg 2", "b/barn/0.jpg 4"))
    assert check(*options)[0] == 2


@pytest.fixture
def folders(tmp_path) -> Path:
    for i, name in enumerate(["train/cat/0", "train/cat/1", "train/dog/0", "test/cat/0"]):
        save_image(tmp_path / f"{name}.jpg", i)
    (tmp_path / "x.yaml").write_text(f"dataset: folder\ndata_path: {tmp_path}\n")
    return tmp_path


def test_class_folders(folders, capsys):
    (folders / "train/cat/Thumbs.db").touch()
    assert exit_code(lambda: verify.main(["--cfg", str(folders / "x.yaml"), "--images", "all"])) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"folder in {folders}",
        "classes: cat, dog",
        "",
        "train",
        "  images: 3",
        "  classes with images: 2 of 2",
        "  largest class: 2 images, label 0 (cat)",
        "  smallest class: 1 images, label 1 (dog)",
        "",
        "test",
        "  images: 1",
        "  classes with images: 1 of 2",
        "  largest class: 1 images, label 0 (cat)",
        "  smallest class: 1 images, label 0 (cat)",
        "",
        "note: data_path: 1 hidden or other files and folders skipped, such as train/cat/Thumbs.db",
        "note: train: 3 of 3 images were decoded",
        "note: test: 1 of 1 images were decoded",
        "",
        "problems: 0",
    ]
    assert "train: decoding: 100%" in err and "100%" not in out


def test_a_damaged_image_in_a_class_folder_ends_the_check(folders, capsys):
    path = folders / "train/dog/0.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    arguments = ["--cfg", str(folders / "x.yaml")]
    assert exit_code(lambda: verify.main(arguments)) == 0
    assert exit_code(lambda: verify.main([*arguments, "--images", "all"])) == 2
    assert f"error: {path}: is no readable image (" in capsys.readouterr().err


def test_another_number_of_classes_than_the_data_set_has_is_a_problem(folders, capsys):
    for path in folders.rglob("*.jpg"):
        Image.new("RGB", (32, 32)).save(path)
    assert exit_code(lambda: verify.main(["--cfg", str(folders / "x.yaml"), "dataset", "cifar10"])) == 1
    assert problems(capsys.readouterr().out) == ["- classes: cifar10 has 10, here 2"]


@pytest.mark.slow
def test_the_command_as_a_process(tree):
    """It knows the published figures, prints names that are not UTF-8, and is called from any folder."""
    (tree / "val_256/v3.jpg").unlink()
    train = (tree / "Places_LT_train.txt").read_bytes()
    (tree / "Places_LT_train.txt").write_bytes(train + b"data_256/caf\xe9/1.jpg 2\n")
    words = [sys.executable, "-m", "datasets.verify", "--cfg", "x.yaml", "--images", "2", "workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert problems(done.stdout) == [
        "- train: images: published 62500, here 12",
        "- train: largest class: published 4980, here 6",
        "- train: smallest class: published 5, here 1",
        "- test: images: published 36500, here 7",
        "- train: missing or empty files: 1",
        f"    line 12: {tree}/data_256/caf\\udce9/1.jpg",
        "- test: missing or empty files: 1",
        f"    line 4: {tree}/val_256/v3.jpg",
    ]
    assert "classes with images: 4 of 365" in done.stdout
    assert "train: looking up: 100%" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cfg", "nowhere.yaml"], "error: nowhere.yaml: no such configuration file"),
        (["--cfg", "x.yaml", "dataset", "place"], "error: dataset: 'place' is unknown; known are cifar10, "),
        (["--cfg", "x.yaml", "data_path", "nowhere"], "error: train_txt: there is no nowhere/Places_LT_train.txt"),
        (["--cfg", "x.yaml", "--images", "0"], "error: command line: argument --images: must be all or a whole"),
        (["--images", "all"], "error: command line: the following arguments are required: --cfg"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_line(tree, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tree)
    assert exit_code(lambda: verify.main(arguments)) == 2
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert "problems" not in out
