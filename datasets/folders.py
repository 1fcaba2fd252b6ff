"""Walks through folders of images: links are followed, what is skipped is recorded."""

import os
from collections.abc import Iterator

from datasets.source import DataError

LEFT_BY_TOOLS = ("thumbs.db", "desktop.ini", "__macosx")  # besides hidden names


def is_skipped(name: str) -> bool:
    """Whether a file or folder is hidden or left by a file manager: ``.DS_Store``, ``._1.png``, ``Thumbs.db``, ..."""
    return name.startswith(".") or name.lower() in LEFT_BY_TOOLS


def walk(top: str | os.PathLike, skipped: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files) for ``top`` and every folder below it, without those of :func:`is_skipped`.

    The paths of the others are appended to ``skipped``. Raises :class:`DataError` for a folder that cannot be read,
    and for a link to a folder that contains it, whose images would come again and again.
    """
    for where, folders, files in os.walk(top, onerror=_refuse, followlinks=True):
        if skipped is not None:
            skipped += [os.path.join(where, name) for name in (*folders, *files) if is_skipped(name)]
        folders[:] = [folder for folder in folders if not is_skipped(folder)]
        for folder in folders:
            if os.path.islink(os.path.join(where, folder)):
                _refuse_circle(os.fspath(top), where, folder)
        yield where, [file for file in files if not is_skipped(file)]


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}")


def _refuse_circle(top: str, where: str, link: str) -> None:
    target = os.path.realpath(os.path.join(where, link))
    place = where
    while len(place) >= len(top):  # any folder on the way here may be a link itself
        if os.path.commonpath([os.path.realpath(place), target]) == target:
            raise DataError(f"{os.path.join(where, link)}: is a link to {target}, which it lies in; remove it")
        place = os.path.dirname(place)
