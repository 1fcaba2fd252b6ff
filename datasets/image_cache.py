"""Decoded class folders in one file per split, which all runs on a machine map into memory.

The file begins with :data:`MAGIC`, the SHA-256 of what it was made from (names, sizes and times of the images, their
side, the decoder) and a CRC-32 of its pixels. A file that has another beginning, size or sum is written anew, never
read. Runs that start at once wait for the one that writes.
"""

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL

from datasets.image_folder import CHUNK, Decoder
from datasets.source import DataError, Source, StoredImages
from utils.files import atomic_file, locked

MAGIC = b"images as bytes, version 1\n"
OFFSET = 64  # of the pixels: MAGIC, 32 bytes of the key, 4 of the sum, 1 not used
LEAST = 4 * CHUNK  # images; fewer are decoded in a second
SHARE = 0.25  # of the free space that "auto" may take
BLOCK = 2**26  # bytes that are decoded, written and summed at once


@dataclass(frozen=True)
class Mapped:
    """Indices [n] -> uint8 [n, side, side, 3], from a file; a copy in another process maps the same memory."""

    path: Path
    shape: tuple[int, ...]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self.pixels()[indices])

    def pixels(self) -> np.ndarray:
        """uint8 [N, side, side, 3]."""
        return np.memmap(self.path, np.uint8, "r", OFFSET, self.shape)


def with_cache(source: Source, data_path: Path, where: str | bool) -> Source:
    """``source`` with the images of class folders from cache files; others stay as they are.

    ``where``: the files' folder; "auto": beside the data or in the folder for temporary files, if there are many
    images; False: no cache. Raises :class:`DataError` if a folder that is named cannot be written to.
    """
    if where is False or not isinstance(source.train.images, StoredImages):
        return source
    splits, notes = {}, []
    for name in ("train", "test"):
        split = getattr(source, name)
        folder = _folder(split.images, data_path, where)
        if folder is None:
            continue
        try:
            mapped, written = _mapped(split.images.load, folder)
        except (OSError, DataError) as error:  # of an image, maybe of one that the run does not need
            if where != "auto":
                why = f"data_cache: {folder} cannot be written to: {getattr(error, 'strerror', '')}"
                raise (error if isinstance(error, DataError) else DataError(why)) from None
            notes.append(f"data_cache: no file was written to {folder} ({error})")
            continue
        splits[name] = replace(split, images=replace(split.images, load=mapped))
        notes.append(f"{name}: decoded images {'written to' if written else 'are those of'} {mapped.path}")
    return replace(source, **splits, notes=[*source.notes, *notes])


def _folder(images: StoredImages, data_path: Path, where: str | bool) -> Path | None:
    """Where the cache of ``images`` belongs; None: they have none."""
    if not isinstance(images.load, Decoder):
        return None
    if where != "auto":
        return Path(where)
    beside = data_path / ".decoded"
    writable = os.access(beside if beside.is_dir() else data_path, os.W_OK)
    root = data_path if writable else Path(tempfile.gettempdir())
    size = len(images) * 3 * images.side**2
    if len(images) < LEAST or size > SHARE * shutil.disk_usage(root).free:
        return None
    if writable:
        return beside
    own = root / f"decoded-{getattr(os, 'getuid', int)()}"
    return None if own.exists() and own.stat().st_uid != getattr(os, "getuid", int)() else own  # anyone may write there


def _mapped(decoder: Decoder, folder: Path) -> tuple[Mapped, bool]:
    """The cache file of ``decoder``'s images, and whether it was written now."""
    key = _key(decoder)
    mapped = Mapped(folder / f"{key.hex()[:16]}.images", (len(decoder.paths), decoder.size, decoder.size, 3))
    if _is_valid(mapped, key):
        return mapped, False
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{mapped.path.stem}.lock"):
        if _is_valid(mapped, key):  # another run has written it meanwhile
            return mapped, False
        _write(mapped, decoder, key)
    return mapped, True


def _key(decoder: Decoder) -> bytes:
    digest = hashlib.sha256(f"{decoder.decode.__name__} {decoder.size} PIL {PIL.__version__}".encode())
    root = os.path.commonpath(decoder.paths)
    for path in decoder.paths:
        found = os.stat(path)
        digest.update(os.fsencode(os.path.relpath(path, root)) + f"\0{found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.digest()


def _blocks(count: int, side: int) -> Iterator[slice]:
    each = max(1, BLOCK // (3 * side**2))
    return (slice(start, min(start + each, count)) for start in range(0, count, each))


def _is_valid(mapped: Mapped, key: bytes) -> bool:
    try:
        with mapped.path.open("rb") as file:
            begin = file.read(OFFSET)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if begin[: len(MAGIC) + len(key)] != MAGIC + key or size != OFFSET + int(np.prod(mapped.shape)):
        return False
    pixels, crc = mapped.pixels(), 0
    for block in _blocks(*mapped.shape[:2]):
        crc = zlib.crc32(pixels[block], crc)
    return begin == _beginning(key, crc)


def _beginning(key: bytes, crc: int) -> bytes:
    return (MAGIC + key + crc.to_bytes(4, "little")).ljust(OFFSET, b"\0")


def _write(mapped: Mapped, decoder: Decoder, key: bytes) -> None:
    with atomic_file(mapped.path) as file:
        file.write(bytes(OFFSET))
        crc = 0
        for block in _blocks(*mapped.shape[:2]):
            pixels = decoder(np.arange(block.start, block.stop))
            crc = zlib.crc32(pixels, crc)
            file.write(pixels.data)
        file.seek(0)
        file.write(_beginning(key, crc))
