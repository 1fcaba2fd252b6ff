"""Walks through folders of images: what is followed, what is left out, what is refused."""

import os
from pathlib import Path

import pytest

from datasets.folders import walk
from datasets.source import DataError


def files(top: Path) -> list[str]:
    return sorted(os.path.relpath(os.path.join(where, name), top) for where, names in walk(top) for name in names)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("top/a.png", "top/in/deep/b.png", "elsewhere/c.png", "elsewhere/more/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "top"


def test_links_to_folders_and_files_are_followed(tree):
    (tree / "in" / "linked").symlink_to(tree.parent / "elsewhere")
    (tree / "e.png").symlink_to(tree / "a.png")
    assert files(tree) == ["a.png", "e.png", "in/deep/b.png", "in/linked/c.png", "in/linked/more/d.png"]
    (tree.parent / "top too").symlink_to(tree)
    assert len(files(tree.parent / "top too")) == 5


def test_hidden_folders_are_left_out(tree):
    (tree / ".ipynb_checkpoints").mkdir()
    (tree / ".ipynb_checkpoints" / "a-checkpoint.png").touch()
    assert files(tree) == ["a.png", "in/deep/b.png"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../in", "deep/../.."])
def test_a_link_to_where_it_lies_is_refused(tree, target):
    (tree / "in" / "circle").symlink_to(tree / "in" / target)
    with pytest.raises(DataError) as error:
        files(tree)
    found = os.path.realpath(tree / "in" / target)
    assert str(error.value) == f"{tree}/in/circle: is a link to {found}, which it lies in; remove it"


def test_two_links_that_lead_to_each_other_are_refused(tree):
    (tree / "in" / "x").symlink_to(tree.parent / "elsewhere")
    (tree.parent / "elsewhere" / "y").symlink_to(tree / "in")
    with pytest.raises(DataError, match=r"in/x/y: is a link to .*/top/in, which it lies in"):
        files(tree)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tree, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read everything
    with pytest.raises(DataError) as error:
        files(tree)
    assert str(error.value) == f"{tree}/in/deep: cannot be read: Permission denied"
