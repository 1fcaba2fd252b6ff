"""Data sets that come as lists of ``relative/path label``: ImageNet-LT, iNaturalist 2018, Places-LT, your own.

Classes are numbered from the most to the least frequent (:mod:`datasets.class_order`), as in MiSLAS. Reading takes
O(images + classes log classes).
"""

import codecs
import json
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.class_order import class_map_for
from datasets.decoding import conversion_notes
from datasets.folders import walk
from datasets.source import DataError, ImageFiles, Source, Split, as_text, hash_labels

LEADING = re.compile(r"^(?:\.?/)+")  # ``find .`` writes ./a.jpg, and many scripts /a.jpg


class ListRows(NamedTuple):
    """The content of a list, unchecked."""

    paths: list[str]
    labels: np.ndarray  # int64 [N]
    lines: np.ndarray  # int64 [N], line numbers from 1
    malformed: list[tuple[int, str]]  # (line number, text) of lines that are not "path label"


def scan_image_list(path: str | Path) -> ListRows:
    """Parse every line of a list without checking it. Blank lines are skipped; a leading ``./`` or ``/`` is dropped.

    A ``.json`` file is read as iNaturalist's official annotations, one "line" each. Raises :class:`DataError` if the
    file cannot be read.
    """
    try:
        return _annotations(path) if Path(path).suffix == ".json" else _lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: str | Path) -> ListRows:
    paths, labels, lines, malformed = [], array("q"), array("q"), []
    with open(path, encoding=_encoding(path), errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            parts = line.strip().rsplit(None, 1)
            try:
                name, label = parts
                labels.append(_number(label))
            except (ValueError, OverflowError):
                if parts:
                    malformed.append((number, line.strip()))
                continue
            paths.append(LEADING.sub("", name))
            lines.append(number)
    return ListRows(paths, np.array(labels, dtype=np.int64), np.array(lines, dtype=np.int64), malformed)


def _encoding(path: str | Path) -> str:
    """UTF-8 with or without a byte-order mark; UTF-16, as Windows PowerShell writes it, has one."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _number(label: str) -> int:
    """``int`` alone would accept 1_0 and the digits of every script."""
    if not label.isascii() or "_" in label:
        raise ValueError
    return int(label)


def _annotations(path: str | Path) -> ListRows:
    """``images`` have id and file_name, ``annotations`` image_id and category_id; one annotation per image."""
    try:
        content = json.loads(Path(path).read_bytes())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        if len(names) < len(content["images"]):
            raise ValueError("several images have the same id")
        chosen = [annotation["image_id"] for annotation in content["annotations"]]
        paths = [names[image] for image in chosen]
        categories = [annotation["category_id"] for annotation in content["annotations"]]
        if not all(isinstance(path, str) for path in paths) or not all(type(c) is int for c in categories):
            raise ValueError("a file_name is no text or a category_id no whole number")
        left = names.keys() - chosen
        if left:
            raise ValueError(f"{len(left)} images have no annotation, such as {names[min(left)]!r}")
        labels = np.array(categories, dtype=np.int64)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: is no file of annotations in iNaturalist's format ({error!r})") from None
    return ListRows(paths, labels, np.arange(1, len(labels) + 1), [])


def read_image_list(path: str | Path, num_classes: int | None) -> tuple[list[str], np.ndarray]:
    """Read and check a list: (paths, labels int64 [N]), labels in 0 .. num_classes - 1.

    ``num_classes`` None: as :func:`count_classes` finds. Raises :class:`DataError` that names the first bad line.
    """
    rows = scan_image_list(path)
    if rows.malformed:
        number, text = rows.malformed[0]
        raise DataError(f"{path}, line {number}: {text[:80]!r} is not 'relative/path label'")
    if not rows.paths:
        raise DataError(f"{path}: names no image")
    num_classes = num_classes or count_classes(path, rows.labels)
    wrong = (rows.labels < 0) | (rows.labels >= num_classes)
    if wrong.any():
        first = int(wrong.argmax())
        from_1 = (rows.labels.min(), rows.labels.max()) == (1, num_classes)
        raise DataError(
            f"{path}, line {rows.lines[first]}: label {rows.labels[first]} is not one of 0 .. {num_classes - 1} "
            f"({int(wrong.sum())} such labels)" + "; subtract 1 from every label, in every list" * from_1
        )
    _check_paths(path, rows)
    _refuse_duplicates(path, rows)
    return rows.paths, rows.labels


def count_classes(path: str | Path, labels: np.ndarray) -> int:
    """Return C of a training list whose labels ``[N]`` are all of 0 .. C - 1, each at least once.

    Raises :class:`DataError` that says which labels there are, and how to renumber them.
    """
    present = np.unique(labels)
    count = max(len(present), 1)
    if not len(present) or (present[0], present[-1]) == (0, count - 1):
        return count
    runs = np.split(present, np.flatnonzero(np.diff(present) > 1) + 1)
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]} .. {run[-1]}" for run in runs]
    if len(runs) == 1:
        way = f"subtract {present[0]} from every one"
    else:
        way = f"renumber them in this order, or set num_classes {present[-1] + 1} if classes without images are meant"
    raise DataError(
        f"{path}: its {count} labels are {', '.join(shown[:5])}{', ...' * (len(shown) > 5)}, not 0 .. {count - 1}; "
        f"in every list, {way}"
    )


def _check_paths(path: str | Path, rows: ListRows) -> None:
    """Lists are downloaded, so their paths must stay under data_path. (Links are the user's own; they are followed.)"""
    for line, name in zip(rows.lines, rows.paths, strict=True):
        if name.startswith("/") or os.path.isabs(name) or (".." in name and ".." in name.split("/")):
            raise DataError(f"{path}, line {line}: {name!r} leaves data_path; paths are relative to it, without '..'")
        if "\0" in name or not (name.isascii() or _is_a_file_name(name)):
            raise DataError(f"{path}, line {line}: {name!r} can be no file's name")


def _is_a_file_name(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _refuse_duplicates(path: str | Path, rows: ListRows) -> None:
    count = len(rows.paths) - len(set(rows.paths))
    if count == 0:
        return
    first: dict[str, int] = {}
    again = next(i for i, name in enumerate(rows.paths) if first.setdefault(name, i) != i)
    before = first[rows.paths[again]]
    raise DataError(
        f"{path}, line {rows.lines[again]}: {rows.paths[again]!r} with label {rows.labels[again]} is in line "
        f"{rows.lines[before]} already, with label {rows.labels[before]} ({count} such lines)"
    )


@dataclass(frozen=True)
class ImageLists:
    """Default names of a data set's lists, and its top folders in the layouts that circulate."""

    train: tuple[str, ...]  # names under data_path or data_path/data_txt; the first that exists is read
    test: tuple[str, ...]
    train_folders: tuple[str, ...] = ()  # top folders of the training images, one per layout
    test_folders: tuple[str, ...] = ()

    def find(self, data_path: Path, train_txt: str = "", val_txt: str = "", test_txt: str = "") -> dict[str, Path]:
        """The paths of the lists "train", "test" and, if ``test_txt`` is given, "val".

        Options are as configured; empty for the default names. Without ``test_txt``, ``val_txt`` is the test list, as
        in the reference.
        """
        lists = {"train": _find("train_txt", train_txt, self.train, data_path)}
        if not test_txt:
            return lists | {"test": _find("val_txt", val_txt, self.test, data_path)}
        if not val_txt:
            raise DataError(
                f"val_txt: is empty, but test_txt is {test_txt}; name the list that selects the best epoch, or give "
                "the test list as val_txt alone"
            )
        lists["val"] = _find("val_txt", val_txt, (), data_path)
        return lists | {"test": _find("test_txt", test_txt, (), data_path)}

    def on_disk(self, paths: list[str], data_path: Path, split: str) -> list[str]:
        """Translate the ``paths`` of a list to the layout on this disk."""
        if split == "train":
            return on_disk(paths, data_path, self.train_folders, by_name=False)
        return on_disk(paths, data_path, self.test_folders, by_name=True)

    def read(
        self,
        data_path: Path,
        num_classes: int | None,
        train_txt: str = "",
        val_txt: str = "",
        test_txt: str = "",
        class_map: str | Sequence[int] = "stable",
    ) -> Source:
        """Read the lists without decoding an image. ``class_map``: "stable", "legacy", a path or the map itself."""
        listed, files, lists = {}, {}, self.find(data_path, train_txt, val_txt, test_txt)
        for split, path in lists.items():
            paths, labels = listed[split] = read_image_list(path, num_classes)
            num_classes = num_classes or labels.max().item() + 1
            files[split] = self.on_disk(paths, data_path, split)
            first = data_path / files[split][0]
            if not os.path.isfile(first):
                raise DataError(f"data_path: {first} does not exist, the first image that {path} names")
        train_labels = listed["train"][1]
        chosen = class_map_for(class_map, np.bincount(train_labels, minlength=num_classes))
        names = np.empty(num_classes, dtype=object)
        names[chosen] = class_names(files["train"], train_labels, num_classes)
        splits = {key: Split(chosen[listed[key][1]], ImageFiles.under(data_path, files[key])) for key in files}
        images = {key: split.images for key, split in splits.items()}
        return Source(
            **splits,
            class_names=names.tolist(),
            class_map=chosen,
            list_hash=hash_labels(listed.values()),
            notes=[
                *_unused(data_path / "test.txt", lists),
                *(note for key, split in images.items() for note in conversion_notes(key, len(split), split.path)),
            ],
        )


def _unused(third: Path, lists: Mapping[str, Path]) -> list[str]:
    """People who have three lists expect ``val.txt`` to be no test list."""
    if third in lists.values() or "val" in lists or not os.path.isfile(third):
        return []
    return [f"{third} is not used: {lists['test']} is the test list; with test_txt {third.name} it selects the epoch"]


def _find(option: str, given: str, names: Sequence[str], data_path: Path) -> Path:
    usual = [folder / name for name in names for folder in (data_path, data_path / "data_txt")]
    places = [Path(given), data_path / given] if given else usual
    for place in places:
        if os.path.isfile(place):
            return place
    wanted = " nor ".join(dict.fromkeys(str(place) for place in places))
    raise DataError(f"{option}: there is no {wanted}; datasets/README.md says where the lists come from")


def class_names(paths: Sequence[str], labels: np.ndarray, num_classes: int) -> list[str]:
    """One name per label: the folder of its first image, without the common prefix; else the label itself."""
    present, first = np.unique(labels, return_index=True)
    names = [str(label) for label in range(num_classes)]
    for label, folder in zip(present, below_common([os.path.dirname(paths[i]) for i in first]), strict=True):
        names[label] = as_text(folder) or names[label]
    return names


def below_common(folders: Sequence[str]) -> list[str]:
    """Strip the common parent; empty for a folder that is the parent itself."""
    rooted = [os.path.normpath("/" + folder.lstrip("/")) for folder in folders]
    above = os.path.commonpath(rooted) if rooted else ""
    return [folder[len(above) :].strip("/") for folder in rooted]


# ---------------------------------------------------------------------------------------------------------------------
# Layouts of Places: data_256/a/arena/hockey/1.jpg and val_256/2.jpg, or train/arena-hockey/1.jpg and
# val/arena-hockey/2.jpg


def on_disk(paths: list[str], data_path: Path, folders: Sequence[str], by_name: bool) -> list[str]:
    """Translate ``paths`` to the layout on this disk, if the list was written for another one of ``folders``.

    ``by_name``: find images by file name, which must be unique; otherwise translate the class folder's spelling.
    """
    listed = paths[0].partition("/")[0]
    here = [folder for folder in folders if os.path.isdir(data_path / folder)]
    if listed not in folders or listed in here or not here:
        return paths
    return (_by_name if by_name else _by_class_folder)(paths, data_path, here[0])


def _by_name(paths: list[str], data_path: Path, top: str) -> list[str]:
    wanted = {os.path.basename(path) for path in paths}
    places: dict[str, str] = {}
    for folder, names in walk(data_path / top):
        for name in wanted.intersection(names):
            if places.setdefault(name, folder) != folder:
                raise DataError(
                    f"data_path: {name} lies in {places[name]} and in {folder}; the list, which is of another "
                    "layout, does not say which is meant"
                )
    found = {name: os.path.relpath(os.path.join(folder, name), data_path) for name, folder in places.items()}
    return [found.get(os.path.basename(path), path) for path in paths]


def _by_class_folder(paths: list[str], data_path: Path, top: str) -> list[str]:
    folders: dict[str, str] = {}
    for listed in {os.path.dirname(path) for path in paths}:
        spellings = (f"{top}/{other}" for other in _other_spellings(listed.partition("/")[2]))
        folders[listed] = next((folder for folder in spellings if os.path.isdir(data_path / folder)), listed)
    return [f"{folders[os.path.dirname(path)]}/{os.path.basename(path)}" for path in paths]


def _other_spellings(folder: str) -> list[str]:
    """``a/arena/hockey`` -> ``arena-hockey``, ...; ``arena-hockey`` -> ``a/arena/hockey``, ..."""
    letter, _, name = folder.partition("/")
    if len(letter) == 1 and name:
        return [name.replace("/", joint) for joint in ("-", "_", "/")]
    cuts = (i for i, sign in enumerate(folder) if sign == "_")  # underwater_ocean_deep is underwater/ocean_deep
    others = [folder, folder.replace("-", "/"), *(f"{folder[:i]}/{folder[i + 1 :]}" for i in cuts)]
    return [f"{folder[:1]}/{other}" for other in others]
