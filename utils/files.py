"""Files that are either whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """An ``OSError`` leaves the block with ``path`` as its file name, whichever call it comes from."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A handle whose content appears at ``path`` when the block ends well; before that the old file stays as it is.

    An ``OSError`` names ``path``.
    """
    beside = path.with_name(f".{path.name}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with named(path):
            with beside.open(mode, **text) as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, path)
        _flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # what made the writing fail may make this fail too
            beside.unlink()


def _flush_folder(folder: Path) -> None:
    """So that the new name outlives a power cut; not every file system can do it, nor every system."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, content: str) -> None:
    with atomic_file(path, "w") as handle:
        handle.write(content)
