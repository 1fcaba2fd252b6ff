"""Check a data set before training on it: python -m datasets.verify --cfg X [--images all|N] [--preview FILE.png]

Exit code 0: no problems; 1: problems; 2: it cannot be read at all (no such list, no such data set).
"""

import hashlib
import itertools
import os
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from yacs.config import CfgNode

from datasets.decoding import conversion_notes, open_rgb
from datasets.image_list import ImageLists, ListRows, class_names, count_classes, scan_image_list
from datasets.source import DataError
from datasets.specs import DatasetSpec, find_spec
from utils.command_line import exit_code, parse, positive, say
from utils.config import OPTIONS, load_config
from utils.report.preview import picture_file, write_preview

SHOWN = 5  # examples of each problem
CHUNK = 512  # files per task at most: one task per file would cost more than looking it up
LOOKERS = 16  # threads that look files up; they wait for the disk, not for a core


def main(arguments: Sequence[str] | None = None) -> int:
    images = {"type": positive(int, all=sys.maxsize), "default": 0, "metavar": "all|N"}
    images["help"] = "decode all images, or N per split"
    preview = {"type": picture_file, "metavar": "FILE.png", "help": "draw some images as the network sees them"}
    args = parse("Check a data set before training on it.", arguments, OPTIONS, images=images, preview=preview)
    cfg = load_config(args.cfg, args.overrides)
    spec = find_spec(cfg.dataset)
    report = Report()
    (check_lists if spec.lists else check_source)(spec, cfg, args.images, report)
    if not args.images:
        report.notes.append("no image was decoded; use --images all or --images N")
    say("", *(f"note: {note}" for note in report.notes))
    say("", f"problems: {len(report.problems)}", *(line for lines in report.problems for line in lines))
    if args.preview and report.problems:
        say("", "preview: not drawn, because of the problems")
    elif args.preview:
        write_preview(cfg, args.preview)
        say("", f"preview: {args.preview}")
    return 1 if report.problems else 0


@dataclass(frozen=True)
class Report:
    problems: list[list[str]] = field(default_factory=list)  # lines of each
    notes: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.problems.append([f"- {text}"])

    def check(self, text: str, items: Sequence, show: Callable[[Any], str]) -> None:
        """Add a problem with its first examples, if there are any ``items``."""
        if len(items):
            more = [f"    and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
            self.problems.append([f"- {text}: {len(items)}", *(f"    {show(item)}" for item in items[:SHOWN]), *more])


# ---------------------------------------------------------------------------------------------------------------------
# Data sets without lists: their readers refuse what is missing or damaged


def check_source(spec: DatasetSpec, cfg: CfgNode, images: int, report: Report) -> None:
    """Print the counts and decode ``images`` images of each split."""
    source = spec.read(Path(cfg.data_path), cfg.image_size or spec.image_size, cfg.workers)
    names = source.class_names
    report.notes.extend(source.notes)
    if spec.num_classes not in (None, len(names)):
        report.problem(f"classes: {cfg.dataset} has {spec.num_classes}, here {len(names)}")
    say(f"{cfg.dataset} in {cfg.data_path}", f"classes: {', '.join(names[:SHOWN])}{', ...' if names[SHOWN:] else ''}")
    for title, split in (("train", source.train), ("test", source.test)):
        say("", title, *_numbers(np.bincount(split.targets, minlength=len(names)), names))
        chosen = _evenly(len(split.targets), images)
        for start in tqdm(range(0, len(chosen), CHUNK), f"{title}: decoding", disable=not images):
            split.images.read(chosen[start : start + CHUNK])
        if images:
            report.notes.append(f"{title}: {len(chosen)} of {len(split.targets)} images were decoded")


def _numbers(counts: np.ndarray, names: Sequence[str]) -> list[str]:
    present = np.flatnonzero(counts)
    lines = [f"  images: {counts.sum()}", f"  classes with images: {len(present)} of {len(counts)}"]
    if len(present):
        for size, label in (("largest", counts.argmax()), ("smallest", present[counts[present].argmin()])):
            lines.append(f"  {size} class: {counts[label]} images, label {label} ({names[label]})")
    return lines


def _evenly(total: int, wanted: int) -> np.ndarray:
    """At most ``wanted`` of ``total`` positions, evenly spaced; int64 [n]."""
    return np.linspace(0, total - 1, min(total, wanted)).round().astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets with lists


@dataclass(frozen=True)
class Listed:
    """One of the lists, with N lines."""

    title: str
    rows: ListRows
    files: list[str]  # [N], in the layout on this disk, relative to data_path
    labels: np.ndarray  # int64 [N], C where a label is out of range

    @classmethod
    def of(cls, title: str, rows: ListRows, root: Path, lists: ImageLists, classes: int) -> "Listed":
        files = lists.on_disk(rows.paths, root, title) if rows.paths else []
        return cls(title, rows, files, np.where((rows.labels >= 0) & (rows.labels < classes), rows.labels, classes))

    def line(self, index: int) -> str:
        return f"line {self.rows.lines[index]}: {self.rows.paths[index]}, label {self.rows.labels[index]}"


def check_lists(spec: DatasetSpec, cfg: CfgNode, images: int, report: Report) -> None:
    root = Path(cfg.data_path)
    say(f"{cfg.dataset} in {root}")
    paths = spec.lists.find(root, cfg.train_txt, cfg.val_txt, cfg.test_txt)
    rows = {title: scan_image_list(path) for title, path in paths.items()}
    classes = spec.num_classes or cfg.num_classes or count_classes(paths["train"], rows["train"].labels)
    splits = [Listed.of(title, rows[title], root, spec.lists, classes) for title in paths]
    train = splits[0]
    known = np.flatnonzero(train.labels < classes)
    names = class_names([train.rows.paths[i] for i in known], train.labels[known], classes)
    for split in splits:
        counts = np.bincount(split.labels, minlength=classes + 1)[:classes]
        say("", f"{split.title}: {paths[split.title]}", *_numbers(counts, names))
        if spec.published:
            say(_compare_with_mislas(split.title, paths[split.title], spec))
            _compare_with_published(split.title, counts, spec, report)
        _check_lines(split, classes, report)
    for one, other in itertools.combinations(splits, 2):
        first = {file: i for i, file in enumerate(one.files)}
        both = [(first[file], i) for i, file in enumerate(other.files) if file in first]
        report.check(
            f"images in {one.title} and {other.title}", both, lambda pair, a=one, b=other: _both_lines(a, b, *pair)
        )
    _check_labels(splits, names, report)
    contents = [_check_files(split, root, images, max(cfg.workers, 1), report) for split in splits]
    for (one, in_one), (other, in_other) in itertools.combinations(zip(splits, contents, strict=True), 2):
        same = sorted((in_one[content], i) for content, i in in_other.items() if content in in_one)
        if same:
            example = _both_lines(one, other, *same[0])
            report.notes.append(
                f"{len(same)} decoded files are the same in {one.title} and {other.title}, such as {example}"
            )


def _both_lines(one: Listed, other: Listed, i: int, j: int) -> str:
    return f"{one.title} {one.line(i)}; {other.title} {other.line(j)}"


def _compare_with_mislas(title: str, path: Path, spec: DatasetSpec) -> str:
    name, blob = {
        "train": (spec.lists.train[0], spec.published.train_blob),
        "test": (spec.lists.test[0], spec.published.test_blob),
    }[title]
    content = path.read_bytes()
    here = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if here == blob:
        return f"  this is MiSLAS's {name}, byte for byte"
    return f"  this is not MiSLAS's {name}, byte for byte (as a git blob that is {blob[:10]}, this one {here[:10]})"


def _compare_with_published(title: str, counts: np.ndarray, spec: DatasetSpec, report: Report) -> None:
    figures = [("images", getattr(spec.published, title), counts.sum())]
    if title == "train" and counts.any():
        figures.append(("largest class", spec.published.largest, counts.max()))
        figures.append(("smallest class", spec.published.smallest, counts[counts > 0].min()))
    for what, published, here in figures:
        if published != here:
            report.problem(f"{title}: {what}: published {published}, here {here}")


def _check_lines(split: Listed, classes: int, report: Report) -> None:
    """Malformed lines, labels out of range, duplicates."""
    report.check(
        f"{split.title}: lines that are not 'relative/path label'",
        split.rows.malformed,
        lambda line: f"line {line[0]}: {line[1][:80]!r}",
    )
    outside = np.flatnonzero(split.labels == classes)
    report.check(f"{split.title}: labels outside 0 .. {classes - 1}", outside, split.line)
    first: dict[str, int] = {}
    again = [(first[file], i) for i, file in enumerate(split.files) if first.setdefault(file, i) != i]
    report.check(
        f"{split.title}: images listed again", again, lambda pair: f"{split.line(pair[1])}; {split.line(pair[0])}"
    )


def _check_labels(splits: Sequence[Listed], names: Sequence[str], report: Report) -> None:
    """Images labelled unlike most of their class folder, and labels that several class folders share.

    A folder is a class folder if more than half of its images, of all lists, share a label.
    """
    index: dict[str, int] = {}  # class folder -> its number
    named = [[index.setdefault(folder, len(index)) for folder in map(_class_folder, s.files)] for s in splits]
    folders = [np.array(numbers, dtype=np.int64) for numbers in named]
    outside, known = len(names), list(index)
    pairs = np.concatenate(folders) * (outside + 1) + np.concatenate([split.labels for split in splits])
    kinds, counts = np.unique(pairs, return_counts=True)
    folder, label = np.divmod(kinds, outside + 1)
    most = 2 * counts > np.bincount(folder, counts)[folder]
    majority = np.full(len(known), outside)  # the label of each class folder; C for other folders
    majority[folder[most]] = label[most]
    for split, code in zip(splits, folders, strict=True):
        expected = majority[code]
        checked = (expected < outside) & (code != code[:1]).any()  # a single folder, such as val_256, is no class
        report.check(
            f"{split.title}: images labelled unlike most of their folder",
            np.flatnonzero(checked & (split.labels < outside) & (split.labels != expected)),
            lambda i, split=split, own=expected: f"{split.line(i)}, most have {own[i]} ({names[own[i]]})",
        )
        several: dict[int, list[str]] = {}
        for one in np.unique(code[checked]):
            several.setdefault(majority[one].item(), []).append(known[one])
        report.check(
            f"{split.title}: labels of more than one class folder",
            sorted((label, found) for label, found in several.items() if len(found) > 1),
            lambda item: f"label {item[0]}: {', '.join(item[1][:SHOWN])}",
        )
        if not checked.all():
            report.notes.append(f"{split.title}: {(~checked).sum()} images lie in no class folder; labels not checked")


def _class_folder(path: str) -> str:
    """Without the top folder, if there are several: ``train/cat`` and ``val/cat`` are one class folder."""
    folder = path.rpartition("/")[0]
    return folder.partition("/")[2] or folder


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _check_files(split: Listed, root: Path, images: int, workers: int, report: Report) -> dict[bytes, int]:
    """Look up every file and decode ``images`` of them; returns the position of each content's digest."""
    paths = [os.path.join(root, file) for file in split.files]
    there = np.array(_in_threads(_is_there, paths, LOOKERS, f"{split.title}: looking up"), dtype=bool)
    missing = np.flatnonzero(~there)
    report.check(f"{split.title}: missing or empty files", missing, lambda i: f"line {split.rows.lines[i]}: {paths[i]}")
    found = np.flatnonzero(there)
    report.notes.extend(conversion_notes(split.title, len(found), lambda i: paths[found[i]]))
    chosen = found[_evenly(len(found), images)]
    contents = _in_threads(_content, [paths[i] for i in chosen], workers, f"{split.title}: decoding")
    report.check(
        f"{split.title}: images that cannot be decoded",
        [(i, content) for i, content in zip(chosen, contents, strict=True) if isinstance(content, str)],
        lambda item: f"line {split.rows.lines[item[0]]}: {item[1]}",
    )
    if images:
        report.notes.append(f"{split.title}: {len(chosen)} of {len(paths)} images were decoded")
    return {content: i for i, content in zip(chosen, contents, strict=True) if isinstance(content, bytes)}


def _is_there(path: str) -> bool:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a NUL in the name
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def _content(path: str) -> bytes | str:
    """The file's digest, or an error message."""
    try:
        open_rgb(path)
    except DataError as error:
        return str(error)
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()


def _in_threads(look: Callable[[str], Any], paths: Sequence[str], threads: int, title: str) -> list:
    results, size = [], max(1, min(CHUNK, len(paths) // (8 * threads)))
    with ThreadPoolExecutor(threads) as pool, tqdm(desc=title, total=len(paths), disable=not paths) as bar:
        parts = (paths[start : start + size] for start in range(0, len(paths), size))
        for part in pool.map(lambda part: [look(path) for path in part], parts):
            results += part
            bar.update(len(part))
    return results


if __name__ == "__main__":
    sys.exit(exit_code(main))
