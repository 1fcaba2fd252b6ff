"""Walks through folders of images: links are followed, and nothing is passed over in silence."""

import os
from collections.abc import Iterator

from datasets.source import DataError


def hidden(name: str) -> bool:
    """Names that tools leave behind, such as .ipynb_checkpoints or ._image.png."""
    return name.startswith(".")


def walk(top: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of ``top`` and all that is in it, but for hidden folders.

    Raises :class:`DataError` for a folder that cannot be read, and for a link that leads back to where it lies: its
    images would come again and again.
    """
    for where, folders, files in os.walk(top, onerror=_refuse, followlinks=True):
        folders[:] = [folder for folder in folders if not hidden(folder)]
        for folder in folders:
            if os.path.islink(os.path.join(where, folder)):
                _refuse_circle(os.fspath(top), where, folder)
        yield where, files


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}")


def _refuse_circle(top: str, where: str, link: str) -> None:
    target = os.path.realpath(os.path.join(where, link))
    place = where
    while len(place) >= len(top):  # each folder on the way here may lie elsewhere itself
        if os.path.commonpath([os.path.realpath(place), target]) == target:
            raise DataError(f"{os.path.join(where, link)}: is a link to {target}, which it lies in; remove it")
        place = os.path.dirname(place)
