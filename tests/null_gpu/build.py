"""Build the null GPU for the torch of this Python; see README.md."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

HERE = Path(__file__).parent
SITE = Path(sysconfig.get_paths()["purelib"])
SOURCES = ("runtime.cpp", "libraries.cpp", "nccl.cpp")
TORCH = ("torch_cuda", "c10_cuda", "torch_python", "torch_cuda_linalg", "torch_nvshmem")
OF_CUDA = re.compile(r"cuda[A-Z]|__cuda|cublas|cudnn|nccl|cusolver|cu[A-Z]")
# What stays real: cuDNN's descriptors are plain memory, and versions are needed as they are.
REAL = re.compile(
    r"cudnn(Create|Destroy|Set|Get).*Descriptor|cudnnSetConvolution|cudnnGet(Version|CudartVersion|Property)"
    r"|cudnnGet(Last)?ErrorString|nccl(GetVersion|GetErrorString)"
)
# Functions that Triton's launcher needs in order to be loaded.
OF_TRITON = ("cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col", "cuTensorMapReplaceAddress", "cuStreamSynchronize")


def missing() -> str:
    """What this machine lacks for the null GPU, empty if nothing."""
    if sys.platform != "linux":
        return "the null GPU needs Linux"
    for tool in ("g++", "nm"):
        if not shutil.which(tool):
            return f"the null GPU needs {tool}, which is not there"
    if not torch.version.cuda:
        return "the null GPU needs a torch that is built for CUDA"
    if not any((folder / "cuda_runtime_api.h").is_file() for folder in _headers()):
        return "the null GPU needs CUDA's headers, which come with torch's package nvidia-cuda-runtime"
    return ""


def build() -> Path:
    """The folder with ``libnullgpu.so`` and ``libcuda.so.1``: of an earlier build of the same files, or built now."""
    content = [path.read_bytes() for path in sorted(HERE.iterdir()) if path.is_file()]
    content += [torch.__version__.encode(), str(SITE).encode()]
    name = f"null_gpu_{os.getuid()}_{hashlib.sha256(b''.join(content)).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            _build(Path(scratch))
            finished = shutil.copytree(scratch, tempfile.mkdtemp(prefix=name), dirs_exist_ok=True)
        try:
            os.rename(finished, folder)
        except OSError:  # another process was faster
            shutil.rmtree(finished)
    return folder


def _build(folder: Path) -> None:
    objects = [_compile(HERE / source, folder) for source in SOURCES]
    here, real = set().union(*map(_defined, objects)), REAL
    rest = {name for name in _needed() - here if not real.match(name)}
    _link(folder / "libnullgpu.so", *objects, _idle(rest, folder / "rest.c"))
    driver = [_compile(HERE / "driver.cpp", folder), _idle(OF_TRITON, folder / "driver_rest.c")]
    _link(folder / "libcuda.so.1", *driver, "-Wl,-soname,libcuda.so.1", "-ldl")
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


def _headers() -> list[Path]:
    known = [*SITE.glob("nvidia/cu*/include"), SITE / "nvidia/cuda_runtime/include"]
    return [*known, SITE / "triton/backends/nvidia/include", *Path("/usr/local").glob("cuda*/include")]


def _needed() -> set[str]:
    """The functions of CUDA and its libraries that torch calls."""
    libraries = [SITE / f"torch/lib/lib{name}.so" for name in TORCH]
    text = "".join(_run("nm", "-D", "--undefined-only", path) for path in libraries if path.is_file())
    names = (line.split()[-1].split("@")[0] for line in text.splitlines())
    return {name for name in names if OF_CUDA.match(name)}


def _defined(path: Path) -> set[str]:
    return {line.split()[-1] for line in _run("nm", "--defined-only", path).splitlines()}


def _compile(source: Path, folder: Path) -> Path:
    made = folder / f"{source.name}.o"
    includes = [f"-I{path}" for path in _headers() if path.is_dir()]
    _run("g++", "-std=c++20", "-O1", "-fPIC", "-c", source, *includes, "-o", made)
    return made


def _idle(names: Iterable[str], source: Path) -> Path:
    """Functions that do nothing and return 0, success everywhere."""
    source.write_text("".join(f'extern "C" long {name}() {{ return 0; }}\n' for name in sorted(names)))
    _run("g++", "-x", "c++", "-fPIC", "-c", source, "-o", source.with_suffix(".o"))
    return source.with_suffix(".o")


def _link(library: Path, *parts: object) -> None:
    _run("g++", "-shared", "-o", library, *parts)


def _run(*words: object) -> str:
    return subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True).stdout
