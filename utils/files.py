"""Atomic writes and lock files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from utils.errors import InputError


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Make ``path`` the file name of any ``OSError`` that leaves the block."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file that replaces ``path`` when the block ends without an error.

    Raises ``OSError`` with ``path`` as its file name.
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
        with contextlib.suppress(OSError):  # a read-only folder, say, which has made the write fail as well
            beside.unlink()


def _flush_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system can flush folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, content: str) -> None:
    with atomic_file(path, "w") as handle:
        handle.write(content)


def lock_file(path: Path, taken: str, inheritable: bool = False) -> IO:
    """Lock ``path`` and return the open file; the lock ends when it is closed, or with this process.

    ``inheritable``: child processes that have the file's descriptor hold the lock too. A file system without locks
    grants it always. Raises :class:`InputError` with the message ``taken`` if another process holds the lock.
    """
    file = path.open("a")
    lock = fcntl and (fcntl.flock if inheritable else fcntl.lockf)
    try:
        if lock:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise InputError(taken) from None
    except OSError:
        pass  # a file system without locks
    return file


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in a block with this lock file; a file system without locks does not wait."""
    with named(path), path.open("a") as file:
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
