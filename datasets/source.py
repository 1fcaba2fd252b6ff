"""What a data set's reader gives: labels at once, pixels on demand."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from utils.errors import InputError


class DataError(InputError):
    """Data that are missing, damaged or contradict the configuration."""


def as_text(name: str) -> str:
    """The name of a file as text that any file can hold: bytes that are no UTF-8 become ``\\xe9``, say."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class ImageFiles:
    """Where images lie: as bytes in one block, which forked workers share (a list of strings they would all copy)."""

    root: str
    names: np.ndarray  # bytes [N], relative to the root

    @classmethod
    def under(cls, root: str | os.PathLike, names: Iterable[str]) -> "ImageFiles":
        """``names`` relative to ``root``; an iterable of known length."""
        width = max((len(os.fsencode(name)) for name in names), default=1)
        encoded = (os.fsencode(name) for name in names)
        return cls(os.fspath(root), np.fromiter(encoded, dtype=f"S{max(width, 1)}", count=len(names)))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """The path of one image, as the operating system takes it."""
        return os.path.join(self.root, os.fsdecode(self.names[index].item()))

    def select(self, chosen: np.ndarray) -> "ImageFiles":
        """The files at positions ``chosen [n]``."""
        return ImageFiles(self.root, self.names[chosen])


@dataclass(frozen=True)
class StoredImages:
    """Small images that are read when they are needed."""

    load: Callable[[np.ndarray], np.ndarray]  # see Split
    chosen: np.ndarray  # int64 [N], which of those that ``load`` knows
    side: int  # in pixels

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, side, side, 3]."""
        return self.load(self.chosen[indices])


@dataclass(frozen=True)
class Split:
    """Training or test images that are not decoded yet."""

    targets: np.ndarray  # int64 [N]
    load: Callable[[np.ndarray], np.ndarray] | None = None  # indices [n] -> uint8 [n, H, W, 3], picklable; None: files
    files: ImageFiles | None = None  # None: the images are no files


@dataclass(frozen=True)
class Source:
    """A whole data set, as a reader found it."""

    train: Split
    test: Split
    class_names: list[str]  # [C]
    class_map: np.ndarray | None = None  # int64 [C], label in the lists -> class; None: labels are classes
    listed: str = ""  # fingerprint of the lists; empty: there are none


def fingerprint(parts: Iterable[tuple[Sequence[str], np.ndarray]]) -> str:
    """A hash of (names of images, labels int64 [N]) pairs; names may be left out."""
    digest = hashlib.sha256()
    for names, labels in parts:
        digest.update(os.fsencode("\n".join(names)) + b"\0" + np.ascontiguousarray(labels, np.int64).tobytes())
    return digest.hexdigest()
