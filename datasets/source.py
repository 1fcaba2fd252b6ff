"""What a data set's reader returns: labels at once, pixels on demand. Legend: N images."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.errors import InputError


class DataError(InputError):
    """Data that are missing, damaged or contradict the configuration."""


def as_text(name: str) -> str:
    """A file name as printable text: bytes that are not UTF-8 become ``\\xe9``, say."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class ImageFiles:
    """Paths of images, as bytes in one block: forked workers share it, but would each copy a list of strings."""

    root: str
    names: np.ndarray  # bytes [N], relative to the root

    @classmethod
    def under(cls, root: str | os.PathLike, names: Sequence[str]) -> "ImageFiles":
        """``names`` are relative to ``root``."""
        width = max((len(os.fsencode(name)) for name in names), default=1)
        encoded = (os.fsencode(name) for name in names)
        return cls(os.fspath(root), np.fromiter(encoded, dtype=f"S{max(width, 1)}", count=len(names)))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index].item()))

    def select(self, chosen: np.ndarray) -> "ImageFiles":
        """The files at positions ``chosen [n]``."""
        return ImageFiles(self.root, self.names[chosen])


@dataclass(frozen=True)
class StoredImages:
    """Small images of one size, read on demand."""

    load: Callable[[np.ndarray], np.ndarray]  # indices [n] -> uint8 [n, side, side, 3]; picklable
    chosen: np.ndarray  # int64 [N], indices that ``load`` takes
    side: int  # in pixels

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, chosen: np.ndarray) -> "StoredImages":
        """The images at positions ``chosen [n]``."""
        return StoredImages(self.load, self.chosen[chosen], self.side)

    def read(self, indices: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """uint8 [n, side, side, 3]; by default all of them."""
        return self.load(self.chosen[indices])


@dataclass(frozen=True)
class Split:
    """Training, validation or test images, not decoded yet."""

    targets: np.ndarray  # int64 [N]
    images: StoredImages | ImageFiles

    def select(self, chosen: np.ndarray) -> "Split":
        """The images at positions ``chosen [n]``."""
        return Split(self.targets[chosen], self.images.select(chosen))


@dataclass(frozen=True)
class Source:
    """A whole data set."""

    train: Split
    test: Split
    class_names: list[str]  # [C]
    val: Split | None = None  # validation images, where the data set has some of its own
    class_map: np.ndarray | None = None  # int64 [C], label in the lists -> class; None: labels are classes
    list_hash: str = ""  # of the lists; empty for data sets without lists
    notes: list[str] = field(default_factory=list)  # what the user should know, such as files that were skipped


def hash_labels(parts: Iterable[tuple[Sequence[str], np.ndarray]]) -> str:
    """SHA-256 over pairs of image names, possibly none, and labels int64 [N]."""
    digest = hashlib.sha256()
    for names, labels in parts:
        digest.update(os.fsencode("\n".join(names)) + b"\0" + np.ascontiguousarray(labels, np.int64).tobytes())
    return digest.hexdigest()
