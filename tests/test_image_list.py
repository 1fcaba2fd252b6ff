"""Lists of images: what a line may look like, where lists and images lie, and the published lists themselves."""

import json
import lzma
import os
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from datasets import build_data
from datasets.class_order import class_map_for, legacy_order, stable_order
from datasets.image_list import ImageLists, class_names, on_disk, read_image_list, scan_image_list
from datasets.source import DataError
from datasets.specs import SPECS
from tests.bad_inputs import write

ROOT = Path(__file__).parents[1]
PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "lists"
PLACES = SPECS["places"].lists


def touch(root: Path, *names: str) -> None:
    """The readers open no image, so these need not be any."""
    for name in names:
        write(root / name, b"image")


def refusal(call, *arguments) -> str:
    with pytest.raises(DataError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def published(name: str) -> list[str]:
    path = PUBLISHED / f"{name}.txt.xz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return lzma.decompress(path.read_bytes()).decode().splitlines(keepends=True)


# ---------------------------------------------------------------------------------------------------------------------
# Lines


@pytest.mark.parametrize(
    ("content", "paths", "labels"),
    [
        ("a/1.jpg 0\nb/2.jpg 2\n", ["a/1.jpg", "b/2.jpg"], [0, 2]),
        ("a/1.jpg 0\nb/2.jpg 2", ["a/1.jpg", "b/2.jpg"], [0, 2]),
        ("a/1.jpg 0\r\nb/2.jpg 2\r\n", ["a/1.jpg", "b/2.jpg"], [0, 2]),
        ("\n\na/1.jpg 0\n   \n\nb/2.jpg 2\n\n", ["a/1.jpg", "b/2.jpg"], [0, 2]),
        ("a b/c  d 3.jpg 1\n", ["a b/c  d 3.jpg"], [1]),
        ("a/1.jpg\t1 \n", ["a/1.jpg"], [1]),
        ("Übung/ß 写真.jpg 1\n", ["Übung/ß 写真.jpg"], [1]),
        (b"\xef\xbb\xbfa/1.jpg 1\n", ["a/1.jpg"], [1]),
        (b"caf\xe9/1.jpg 1\n", [os.fsdecode(b"caf\xe9/1.jpg")], [1]),
        ("./a..b/..1.jpg 1\n", ["a..b/..1.jpg"], [1]),
        ("/a/1.jpg 1\n  .//b/2.jpg   2", ["a/1.jpg", "b/2.jpg"], [1, 2]),
        ("é/1.jpg 0\r\nb c/2.jpg\t2\r\n".encode("utf-16"), ["é/1.jpg", "b c/2.jpg"], [0, 2]),
    ],
    ids=[
        *("plain", "no last newline", "CRLF", "blank", "spaces", "tab", "UTF-8", "byte order mark", "Latin-1", "dots"),
        *("leading slash", "UTF-16"),
    ],
)
def test_a_line_is_a_path_and_a_label(tmp_path, content, paths, labels):
    read_paths, read_labels = read_image_list(write(tmp_path / "x.txt", content), 3)
    assert read_paths == paths
    assert read_labels.dtype == np.int64
    assert read_labels.tolist() == labels


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("b/2.jpg", "'b/2.jpg' is not 'relative/path label'"),
        ("b/2.jpg 1.5", "'b/2.jpg 1.5' is not 'relative/path label'"),
        ("b/2.jpg 1_0", "'b/2.jpg 1_0' is not 'relative/path label'"),
        ("b/2.jpg ٢", "'b/2.jpg ٢' is not 'relative/path label'"),
        ("b/2.jpg 99999999999999999999", "'b/2.jpg 99999999999999999999' is not 'relative/path label'"),
        ("b/2.jpg 3", "label 3 is not one of 0 .. 2 (1 such labels)"),
        ("b/2.jpg -1", "label -1 is not one of 0 .. 2 (1 such labels)"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, line, said):
    path = write(tmp_path / "x.txt", f"a/1.jpg 0\n\n{line}\nc/3.jpg 2\n")
    assert refusal(read_image_list, path, 3) == f"{path}, line 3: {said}"


def test_the_scan_goes_on_after_wrong_lines(tmp_path):
    rows = scan_image_list(write(tmp_path / "x.txt", "nothing\na/1.jpg 7\n\n b \nc/3.jpg x\nd/4.jpg -2\n"))
    assert rows.paths == ["a/1.jpg", "d/4.jpg"]
    assert (rows.labels.tolist(), rows.lines.tolist()) == ([7, -2], [2, 6])
    assert rows.malformed == [(1, "nothing"), (4, "b"), (5, "c/3.jpg x")]


@pytest.mark.parametrize("name", ["../1.jpg", "a/..", "a b/../../etc/1.jpg"])
def test_a_path_that_leaves_the_data_s_folder_is_refused(tmp_path, name):
    path = write(tmp_path / "x.txt", f"a/1.jpg 0\n{name} 1\n")
    said = f"{path}, line 2: {name!r} leaves data_path; paths are relative to it, without '..'"
    assert refusal(read_image_list, path, 3) == said
    path = write(tmp_path / "x.json", annotations([("a/1.jpg", 0), (name, 1)]))
    assert "leaves data_path" in refusal(read_image_list, path, 3)


def test_an_absolute_path_in_annotations_is_refused(tmp_path):
    path = write(tmp_path / "x.json", annotations([("a/1.jpg", 0), ("/etc/passwd", 1)]))
    assert "leaves data_path" in refusal(read_image_list, path, 3)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((1, 2, 3, 3), "its 3 labels are 1 .. 3, not 0 .. 2; in every list, subtract 1 from every one"),
        (
            (0, 2, 5, 6),
            "its 4 labels are 0, 2, 5 .. 6, not 0 .. 3; in every list, renumber them in this order, or set "
            "num_classes 7 if classes without images are meant",
        ),
    ],
)
def test_labels_that_do_not_count_from_0_are_said_with_a_way_out(tmp_path, labels, said):
    path = write(tmp_path / "x.txt", "".join(f"{i}.jpg {label}\n" for i, label in enumerate(labels)))
    assert refusal(read_image_list, path, None) == f"{path}: {said}"
    assert read_image_list(path, 7)[1].tolist() == list(labels)


def test_labels_from_1_of_a_known_number_of_classes_are_recognised(tmp_path):
    path = write(tmp_path / "x.txt", "a.jpg 1\nb.jpg 2\nc.jpg 3\n")
    assert refusal(read_image_list, path, 3).endswith("(1 such labels); subtract 1 from every label, in every list")


@pytest.mark.parametrize("name", ["a\0.jpg", "a.jpg\0", "\ud800.jpg"])
def test_what_can_be_no_file_s_name_is_refused(tmp_path, name):
    path = write(tmp_path / "x.json", annotations([("a.jpg", 0), (name, 1)]))
    assert refusal(read_image_list, path, 3) == f"{path}, line 2: {name!r} can be no file's name"


def test_an_image_that_is_listed_twice_is_refused_with_both_lines(tmp_path):
    path = write(tmp_path / "x.txt", "a/1.jpg 0\n\nb/2.jpg 1\na/1.jpg 2\nb/2.jpg 1\n")
    said = f"{path}, line 4: 'a/1.jpg' with label 2 is in line 1 already, with label 0 (2 such lines)"
    assert refusal(read_image_list, path, 3) == said


def test_no_published_list_names_an_image_twice_or_leaves_its_folder(tmp_path):
    for name, classes in (("Places_LT_train", 365), ("Places_LT_test", 365), ("ImageNet_LT_test", 1000)):
        lines = published(name)
        assert len(read_image_list(write(tmp_path / "x.txt", "".join(lines)), classes)[0]) == len(lines)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_list_is_refused(tmp_path, content):
    path = write(tmp_path / "x.txt", content)
    assert refusal(read_image_list, path, 3) == f"{path}: names no image"


@pytest.mark.parametrize("name", ["x.txt", "x.json"])
def test_a_list_that_cannot_be_read_is_refused(tmp_path, name):
    path = tmp_path / name
    assert refusal(read_image_list, path, 3) == f"{path}: cannot be read: No such file or directory"
    path.mkdir()
    assert refusal(read_image_list, path, 3) == f"{path}: cannot be read: Is a directory"


# ---------------------------------------------------------------------------------------------------------------------
# iNaturalist's annotations


def annotations(rows: list[tuple[str, int]]) -> str:
    """The official format; ids are no positions, and images come in an order of their own."""
    images = [{"id": 100 + i, "file_name": name, "width": 800, "height": 600} for i, (name, _) in enumerate(rows)]
    found = [{"id": 100 + i, "image_id": 100 + i, "category_id": label} for i, (_, label) in enumerate(rows)]
    categories = [{"id": label, "name": str(label), "supercategory": "Aves"} for label in range(3)]
    return json.dumps({"info": {}, "images": images[::-1], "annotations": found, "categories": categories})


ROWS = [("train_val2018/Aves/2/b.jpg", 2), ("train_val2018/Aves/0/a.jpg", 0), ("train_val2018/Aves/2/c.jpg", 2)]


def test_annotations_equal_the_list(tmp_path):
    as_json = read_image_list(write(tmp_path / "x.json", annotations(ROWS)), 3)
    as_text = read_image_list(write(tmp_path / "x.txt", "".join(f"{path} {label}\n" for path, label in ROWS)), 3)
    assert as_json[0] == as_text[0] == [path for path, _ in ROWS]
    assert as_json[1].dtype == np.int64
    assert as_json[1].tolist() == as_text[1].tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    "content",
    [
        "train_val2018/Aves/2/b.jpg 2",
        "[]",
        '{"images": [], "annotations": [{"image_id": 1, "category_id": 0}]}',
        '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1}]}',
        '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1, "category_id": 1.7}]}',
        '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1, "category_id": true}]}',
        '{"images": [{"id": 1, "file_name": null}], "annotations": [{"image_id": 1, "category_id": 1}]}',
        "[" * 200_000,
        b"\xff\xfe\xfd",
    ],
)
def test_other_json_is_refused(tmp_path, content):
    path = write(tmp_path / "x.json", content)
    assert refusal(read_image_list, path, 3).startswith(f"{path}: is no file of annotations in iNaturalist's format (")


def test_annotations_that_would_lose_images_are_refused(tmp_path):
    content = json.loads(annotations(ROWS))
    left = content["annotations"].pop()
    path = write(tmp_path / "x.json", json.dumps(content))
    assert "1 images have no annotation, such as 'train_val2018/Aves/2/c.jpg'" in refusal(read_image_list, path, 3)
    content["annotations"] += [left, left]
    write(path, json.dumps(content))
    assert "line 4: 'train_val2018/Aves/2/c.jpg' with label 2 is in line 3" in refusal(read_image_list, path, 3)
    content = json.loads(annotations(ROWS))
    content["images"][0]["id"] = content["images"][1]["id"]
    write(path, json.dumps(content))
    assert "several images have the same id" in refusal(read_image_list, path, 3)


def test_labels_of_annotations_are_checked(tmp_path):
    path = write(tmp_path / "x.json", annotations(ROWS))
    assert refusal(read_image_list, path, 2) == f"{path}, line 1: label 2 is not one of 0 .. 1 (2 such labels)"
    assert refusal(read_image_list, write(path, annotations([])), 2) == f"{path}: names no image"


# ---------------------------------------------------------------------------------------------------------------------
# Where the lists lie

LISTS = ImageLists(("train.txt", "train.json"), ("test.txt",))


@pytest.mark.parametrize("folder", ["", "data_txt"])
@pytest.mark.parametrize("train", ["train.txt", "train.json"])
def test_lists_have_default_places(tmp_path, folder, train):
    touch(tmp_path / folder, train, "test.txt")
    assert LISTS.find(tmp_path) == {"train": tmp_path / folder / train, "test": tmp_path / folder / "test.txt"}


def test_the_first_of_the_default_places_is_taken(tmp_path):
    touch(tmp_path, "train.json", "data_txt/train.txt", "test.txt", "data_txt/test.txt")
    assert LISTS.find(tmp_path) == {"train": tmp_path / "data_txt/train.txt", "test": tmp_path / "test.txt"}
    touch(tmp_path, "train.txt")
    assert LISTS.find(tmp_path)["train"] == tmp_path / "train.txt"


def test_lists_may_be_given(tmp_path, monkeypatch):
    touch(tmp_path, "data/train.txt", "data/test.txt", "data/my/a.txt", "elsewhere/b.txt", "here/c.txt")
    monkeypatch.chdir(tmp_path / "here")
    data, b = tmp_path / "data", tmp_path / "elsewhere/b.txt"
    assert LISTS.find(data, "my/a.txt", str(b)) == {"train": data / "my/a.txt", "test": b}
    assert LISTS.find(data, "", "c.txt") == {"train": data / "train.txt", "test": Path("c.txt")}
    three = {"train": data / "train.txt", "val": Path("c.txt"), "test": b}
    assert LISTS.find(data, "", "c.txt", str(b)) == three
    assert "name the list that selects the best epoch" in refusal(LISTS.find, data, "", "", str(b))


def test_missing_lists_are_refused_with_every_place_that_was_tried(tmp_path):
    places = [tmp_path / folder / name for name in ("train.txt", "train.json") for folder in ("", "data_txt")]
    why = "; datasets/README.md says where the lists come from"
    assert refusal(LISTS.find, tmp_path) == f"train_txt: there is no {' nor '.join(map(str, places))}{why}"
    touch(tmp_path, "train.txt")
    assert refusal(LISTS.find, tmp_path, "", "x") == f"val_txt: there is no x nor {tmp_path / 'x'}{why}"
    absolute = str(tmp_path / "x.txt")
    assert refusal(LISTS.find, tmp_path, absolute) == f"train_txt: there is no {absolute}{why}"


# ---------------------------------------------------------------------------------------------------------------------
# A whole data set


def data_set(root: Path, train: list[tuple[str, int]], test: list[tuple[str, int]], images: list[str]) -> Path:
    for name, rows in (("Places_LT_train.txt", train), ("Places_LT_test.txt", test)):
        write(root / name, "".join(f"{path} {label}\n" for path, label in rows))
    touch(root, *images)
    return root


NESTED = [
    ("data_256/a/attic/1.jpg", 1),
    ("data_256/a/arena/hockey/1.jpg", 0),
    ("data_256/a/arena/hockey/2.jpg", 0),
    ("data_256/u/underwater/ocean_deep/1.jpg", 3),
    ("data_256/u/underwater/ocean_deep/2.jpg", 3),
    ("data_256/u/underwater/ocean_deep/3.jpg", 3),
]
FLAT = [("val_256/v1.jpg", 1), ("val_256/v2.jpg", 0), ("val_256/v3.jpg", 3)]


def in_one_folder_each(joint: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    train = [(f"train/{path[11:].replace('/', joint, path.count('/') - 3)}", label) for path, label in NESTED]
    folders = {label: os.path.basename(os.path.dirname(path)) for path, label in train}
    return train, [(f"val/{folders[label]}/{os.path.basename(path)}", label) for path, label in FLAT]


def test_classes_are_numbered_by_frequency(tmp_path):
    source = PLACES.read(data_set(tmp_path, NESTED, FLAT, [path for path, _ in NESTED + FLAT]), 5)
    assert source.class_map.tolist() == [1, 2, 3, 0, 4]
    assert source.train.targets.tolist() == [2, 1, 1, 0, 0, 0]
    assert source.test.targets.tolist() == [2, 1, 0]
    assert source.class_names == ["u/underwater/ocean_deep", "a/arena/hockey", "a/attic", "2", "4"]
    for split, rows in ((source.train, NESTED), (source.test, FLAT)):
        assert [split.images.path(i) for i in range(len(split.images))] == [str(tmp_path / path) for path, _ in rows]


@pytest.mark.parametrize("class_map", [[4, 3, 2, 1, 0], "map.txt"])
def test_the_class_map_may_be_given(tmp_path, class_map):
    if isinstance(class_map, str):
        class_map = str(write(tmp_path / class_map, "4 3 2\n1 0\n"))
    source = PLACES.read(data_set(tmp_path, NESTED, FLAT, [NESTED[0][0], FLAT[0][0]]), 5, class_map=class_map)
    assert source.class_map.tolist() == [4, 3, 2, 1, 0]
    assert source.train.targets.tolist() == [3, 4, 4, 1, 1, 1]
    assert source.test.targets.tolist() == [3, 4, 1]
    assert source.class_names == ["4", "u/underwater/ocean_deep", "2", "a/attic", "a/arena/hockey"]


def test_the_legacy_order_reaches_the_labels(tmp_path):
    rows = [(f"data_256/a/c{label}/1.jpg", label) for label in range(20)]
    tree = data_set(tmp_path, rows, FLAT, [rows[0][0], FLAT[0][0]])
    legacy = PLACES.read(tree, 20, class_map="legacy").train.targets
    assert_array_equal(legacy[legacy_order([1] * 20)], np.arange(20))
    assert legacy.tolist() != list(range(20))
    assert PLACES.read(tree, 20).train.targets.tolist() == list(range(20))


@pytest.mark.parametrize("joint", ["-", "_"])
@pytest.mark.parametrize("listed", ["nested", "flat"])
@pytest.mark.parametrize("lies", ["nested", "flat"])
def test_a_list_of_either_layout_finds_the_images_of_either(tmp_path, joint, listed, lies):
    layouts = {"nested": (NESTED, FLAT), "flat": in_one_folder_each(joint)}
    images = [path for rows in layouts[lies] for path, _ in rows]
    source = PLACES.read(data_set(tmp_path, *layouts[listed], images), 4)
    files = [s.images.path(i) for s in (source.train, source.test) for i in range(len(s.images))]
    assert files == [str(tmp_path / path) for path in images]
    assert source.train.targets.tolist() == [2, 1, 1, 0, 0, 0]
    assert source.test.targets.tolist() == [2, 1, 0]


def test_paths_that_lie_as_listed_or_that_no_layout_explains_stay_as_they_are(tmp_path):
    touch(tmp_path, "train/barn/1.jpg", "val/barn/v1.jpg")
    assert on_disk(["train/barn/1.jpg"], tmp_path, PLACES.train_folders, False) == ["train/barn/1.jpg"]
    listed = ["data_256/b/barn/1.jpg", "data_256/c/cave/2.jpg"]
    assert on_disk(listed, tmp_path, PLACES.train_folders, False) == ["train/barn/1.jpg", "data_256/c/cave/2.jpg"]
    listed = ["val_256/v1.jpg", "val_256/v2.jpg"]
    assert on_disk(listed, tmp_path, PLACES.test_folders, True) == ["val/barn/v1.jpg", "val_256/v2.jpg"]


def test_a_file_name_in_two_folders_is_refused_where_the_list_says_only_the_name(tmp_path):
    touch(tmp_path, "val/barn/v1.jpg", "val/cave/v1.jpg", "val/barn/x.jpg", "val/cave/x.jpg", "val/barn/v2.jpg")
    message = refusal(on_disk, ["val_256/v2.jpg", "val_256/v1.jpg"], tmp_path, PLACES.test_folders, True)
    assert message.startswith("data_path: v1.jpg lies in ")
    assert f"{tmp_path}/val/barn" in message and f"{tmp_path}/val/cave" in message
    assert on_disk(["val_256/v2.jpg"], tmp_path, PLACES.test_folders, True) == ["val/barn/v2.jpg"]


def test_paths_that_the_system_does_not_take_are_refused(tmp_path):
    long = "x" * 5000
    tree = data_set(tmp_path, [(f"{long}.jpg", 0)], FLAT, [])
    assert refusal(PLACES.read, tree, 5).endswith(f"the first image that {tree}/Places_LT_train.txt names")
    assert refusal(PLACES.find, tree, long).startswith(f"train_txt: there is no {long} nor")
    assert refusal(PLACES.find, tmp_path / long).startswith("train_txt: there is no ")


def test_every_class_of_places_is_found_in_either_layout(tmp_path):
    """All 365 folders, among them underwater/ocean_deep and apartment_building/outdoor."""
    listed = sorted({line.rpartition("/")[0] for line in published("Places_LT_train")})
    assert len(listed) == 365
    for joint in "-_":
        flat = [f"train/{folder[11:].replace('/', joint)}" for folder in listed]
        for root, here, there in ((tmp_path / f"n{joint}", listed, flat), (tmp_path / f"f{joint}", flat, listed)):
            for folder in here:
                (root / folder).mkdir(parents=True)
            found = on_disk([f"{folder}/1.jpg" for folder in there], root, PLACES.train_folders, False)
            assert found == [f"{folder}/1.jpg" for folder in here]


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_that_lie_elsewhere_are_refused(tmp_path, split):
    missing = (NESTED if split == "train" else FLAT)[0][0]
    tree = data_set(tmp_path, NESTED, FLAT, [path for path, _ in NESTED + FLAT if path != missing])
    said = f"data_path: {tree / missing} does not exist, the first image that {tree}/Places_LT_{split}.txt names"
    assert refusal(PLACES.read, tree, 4) == said


# ---------------------------------------------------------------------------------------------------------------------
# Names of classes


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["train/n01/a.jpg", "train/n02/b.jpg", "train/n01/c.jpg"], ["n01", "n02", "2"]),
        (["t/Aves/1/a.jpg", "t/Insecta/2/b.jpg", "t/Aves/1/c.jpg"], ["Aves/1", "Insecta/2", "2"]),
        (["cat/a.jpg", "dog/b.jpg", "cat/c.jpg"], ["cat", "dog", "2"]),
        (["cat/a.jpg", "category/b.jpg", "cat/c.jpg"], ["cat", "category", "2"]),
        (["/t/cat/a.jpg", "t/dog/b.jpg", "/t/cat/c.jpg"], ["cat", "dog", "2"]),
        (["a.jpg", "dog/b.jpg", "c.jpg"], ["0", "dog", "2"]),
        (["caf\udce9/a.jpg", "dog/b.jpg", "caf\udce9/c.jpg"], ["caf\\xe9", "dog", "2"]),
    ],
)
def test_a_class_is_named_after_its_folder(paths, names):
    assert class_names(paths, np.array([0, 1, 0]), 3) == names


# ---------------------------------------------------------------------------------------------------------------------
# The published lists


@pytest.fixture
def published_places(tmp_path):
    lists = [write(tmp_path / name, "".join(published(name))) for name in ("Places_LT_train", "Places_LT_test")]
    return [read_image_list(path, 365) for path in lists]


def test_places_lt_gives_the_published_orders(published_places):
    train, test = published_places
    assert (len(train[1]), len(test[1])) == (62500, 36500)
    counts = np.bincount(train[1], minlength=365)
    stored = np.load(ROOT / "tests" / "goldens" / "class_order.npz")
    assert_array_equal(counts, stored["places.counts"])
    assert_array_equal(stable_order(counts), stored["places.stable_order"])
    assert_array_equal(legacy_order(counts), stored["places.legacy_order"])


def test_a_stable_map_would_score_42_percent_of_places_test_images_against_another_class(published_places):
    train, test = published_places
    counts = np.bincount(train[1], minlength=365)
    stable, legacy = class_map_for("stable", counts), class_map_for("legacy", counts)
    assert (stable != legacy).sum() == 153
    assert np.mean(stable[test[1]] != legacy[test[1]]) == pytest.approx(0.42, abs=0.005)


@pytest.mark.parametrize(
    ("name", "spec", "per_class", "first"),
    [("ImageNet_LT_test", "imagenet", 50, "n01440764"), ("iNaturalist18_val", "ina2018", 3, "Animalia/0")],
)
def test_published_test_lists_are_balanced(tmp_path, name, spec, per_class, first):
    classes = SPECS[spec].num_classes
    paths, labels = read_image_list(write(tmp_path / "x.txt", "".join(published(name))), classes)
    assert len(set(paths)) == len(labels) == SPECS[spec].published.test
    assert_array_equal(np.bincount(labels), np.full(classes, per_class))
    names = class_names(paths, labels, classes)
    assert len(set(names)) == classes
    assert names[0] == first


# ---------------------------------------------------------------------------------------------------------------------
# Size


@pytest.mark.slow
def test_the_largest_lists_take_linear_time_and_little_memory(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.minimum(rng.exponential(1500, 437_513).astype(np.int64), 8141)
    labels[:8142] = np.arange(8142)
    for name, chosen in (("iNaturalist18_train.txt", labels), ("iNaturalist18_val.txt", np.arange(24_426) // 3)):
        lines = [f"train_val2018/Plantae/{y}/{rng.bytes(16).hex()}.jpg {y}\n" for y in chosen]
        write(tmp_path / name, "".join(lines))
        touch(tmp_path, lines[0].split()[0])
    del lines
    tracemalloc.start()
    start = time.process_time()
    source = SPECS["ina2018"].lists.read(tmp_path, 8142)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(source.train.targets), len(source.class_names)) == (437_513, 8142)
    assert seconds < 60  # 3 on a fast machine without tracemalloc; anything quadratic would take hours
    assert peak < 200 * 2**20


# ---------------------------------------------------------------------------------------------------------------------
# A user's own lists


def own(root: Path) -> Path:
    """Three classes, and lists as people write them."""
    lists = {"train": "./a 1.jpg\t0\r\na2.jpg 0\r\nb1.jpg 1\r\nb2.jpg 1\r\nb3.jpg 1\r\nc.jpg 2"}
    lists |= {"val": "/v.jpg 1\n", "test": "t1.jpg 0\nt2.jpg 2\n"}
    for name, text in lists.items():
        write(root / f"{name}.txt", text)
    touch(root, "a 1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "b3.jpg", "c.jpg", "v.jpg", "t1.jpg", "t2.jpg")
    return root


def test_own_lists_say_how_many_classes_there_are(tmp_path):
    data = build_data("lists", str(own(tmp_path)))
    assert data.class_counts.tolist() == [3, 2, 1]
    assert data.class_map.tolist() == [1, 0, 2]
    assert (data.test.targets.tolist(), data.val) == ([0], None)
    assert (data.num_classes, data.image_size, data.spec.shot_ranges) == (3, 224, None)
    assert data.notes[0].startswith(f"{tmp_path / 'test.txt'} is not used: {tmp_path / 'val.txt'} is the test list;")


def test_a_third_list_makes_the_second_one_select_the_epoch(tmp_path):
    data = build_data("lists", str(own(tmp_path)), val_txt="val.txt", test_txt="test.txt", num_classes=4)
    assert (data.val.targets.tolist(), data.test.targets.tolist()) == ([0], [1, 2])
    assert data.class_counts.tolist() == [3, 2, 1, 0]
    options = {"val_txt": "val.txt", "test_txt": "test.txt"}
    assert not [note for note in data.notes if "not used" in note]
    assert data.label_hash != build_data("lists", str(tmp_path), val_txt="test.txt").label_hash
    said = refusal(partial(build_data, "lists", str(tmp_path), val_per_class=1, **options))
    assert said == "val_per_class: 1, but the images of val_txt select the best epoch; use 0"


def test_the_other_lists_labels_are_among_the_training_list_s(tmp_path):
    write(own(tmp_path) / "val.txt", "v.jpg 3\n")
    said = f"{tmp_path / 'val.txt'}, line 1: label 3 is not one of 0 .. 2 (1 such labels)"
    assert refusal(build_data, "lists", str(tmp_path)) == said
