"""An npz file of arrays that grow by a row per epoch, always written atomically."""

import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.files import atomic_file, named


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file. Raises :class:`InputError` if it is damaged."""
    try:
        with named(path), np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path}: is damaged; move it away") from None


class EpochArrays:
    """``epochs`` int64 [E], arrays with E rows, and fixed arrays."""

    def __init__(self, path: Path, fixed: Mapping[str, np.ndarray], first_epoch: int, last: Collection[str] = ()):
        """Continue the file if it exists, without its rows from ``first_epoch`` on.

        Args:
            path: Of the file.
            fixed: Arrays that do not grow and must equal those of an existing file.
            first_epoch: The first epoch that will be added.
            last: Names of arrays that are stored for the last epoch only.

        Raises:
            InputError: The file is damaged, or has other ``fixed`` arrays.
        """
        self.path, self.fixed, self.last = path, dict(fixed), tuple(last)
        self.rows: dict[str, np.ndarray] = {}
        if not path.exists():
            return
        stored = read_arrays(path)
        for name, value in self.fixed.items():
            if not np.array_equal(stored.get(name, ()), value):
                raise InputError(f"{path}: was begun with other {name}; go on with those, or move the file away")
        self.rows = {name: array for name, array in stored.items() if name not in (*self.fixed, *self.last)}
        epochs = self.rows.get("epochs", np.zeros(0))
        if any(array.shape[:1] != epochs.shape for array in self.rows.values()):
            raise InputError(f"{path}: is damaged, its arrays are not of one length; move it away")
        if (epochs >= first_epoch).any():
            self.rows = {name: array[epochs < first_epoch] for name, array in self.rows.items()}
            self._write({})

    def add(self, epoch: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Add the arrays of one epoch and write the file."""
        row = {"epochs": np.int64(epoch), **{name: a for name, a in arrays.items() if name not in self.last}}
        grown = {name: np.asarray(value)[None] for name, value in row.items()}
        old = self.rows or {name: array[:0] for name, array in grown.items()}
        if {name: array.shape[1:] for name, array in old.items()} != {n: a.shape[1:] for n, a in grown.items()}:
            raise InputError(f"{self.path}: has other arrays than this version writes; move the file away")
        self.rows = {name: np.concatenate([old[name], array]) for name, array in grown.items()}
        self._write({name: arrays[name] for name in self.last if name in arrays})

    def _write(self, last: Mapping[str, np.ndarray]) -> None:
        with atomic_file(self.path) as file:
            np.savez(file, **self.rows, **self.fixed, **last)
