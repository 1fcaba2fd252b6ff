"""CUDA without a GPU: a library under which torch sees devices whose kernels do nothing; see README.md."""

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

from tests.null_gpu.build import build, missing

LIBRARY = "libnullgpu.so"


def environment() -> dict[str, str]:
    """The variables with which a new Python sees null GPUs; empty if this machine cannot build them."""
    if missing():
        return {}
    folder, others = str(build()), os.environ.get("LD_LIBRARY_PATH", "")
    paths = {"LD_LIBRARY_PATH": f"{folder}:{others}".rstrip(":"), "TRITON_LIBCUDA_PATH": folder}
    return {"LD_PRELOAD": f"{folder}/{LIBRARY}", **paths}


def unavailable() -> str:
    """Why this process sees no null GPU, empty if it does."""
    maps = Path("/proc/self/maps")
    if maps.exists() and LIBRARY in maps.read_text():
        return ""
    return missing() or "only the workers of `python -m pytest -m nullgpu` see the null GPU"


class Operation(NamedTuple):
    """Something that a device was asked to do, outside of captures."""

    kind: (
        str  # kernel, copy, fill, graph (a launch), sync (the host waits), alloc, capture (one that ended), collective
    )
    name: str  # of a kernel; of a copy: from where to where, say "pinned to device"
    size: int  # bytes; of a graph its operations
    device: int  # the current one


def take() -> list[Operation]:
    """What this process has asked of its devices since the last call."""
    library = ctypes.CDLL(LIBRARY)
    library.nullgpu_take.restype = ctypes.c_char_p
    fields = (line.split("\t") for line in library.nullgpu_take().decode().splitlines())
    return [Operation(kind, name, int(size), int(device)) for kind, name, size, device in fields]


def contexts() -> list[int]:
    """The devices on which this process has a context."""
    library = ctypes.CDLL(LIBRARY)
    return [device for device in range(8) if library.nullgpu_has_context(device)]
