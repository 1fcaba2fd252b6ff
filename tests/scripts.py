"""Scripts as real processes, without importing torch for each: one process has imported it, and forks.

A test file that uses the fixture ``scripts`` imports :func:`forked_scripts`. A forked script has a session, an
environment and files for its output of its own, and is a child of the test process, which waits for it (Linux only).
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT

# Forks twice: the second child is an orphan, which the kernel hands to the test process.
SERVER = """
import atexit, json, os, runpy, signal, sys, traceback
import eval, train_stage1
import pytest, sklearn.datasets

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test run under nohup has it ignored
for line in sys.stdin:
    job = json.loads(line)
    answer, question = os.pipe()
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        os.close(question)
        print(os.read(answer, 20).decode(), flush=True)
        os.close(answer)
        continue
    script = os.fork()
    if script:
        os.write(question, str(script).encode())
        os._exit(0)
    os.setsid()
    os.environ.update(job["variables"])
    for number, path in enumerate([os.devnull, job["out"], job["err"]]):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
    os.closerange(3, 64)
    sys.argv, code = job["words"], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")  # with its last line: sys.exit(exit_code(main))
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120  # as the interpreter
    os._exit(code or 0)  # finalizing torch would take a second
"""
# Downloads fail at once, with or without a network.
VARIABLES = {
    **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    **dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9"),
    **dict.fromkeys(["no_proxy", "NO_PROXY"], ""),
}
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


class Forked:
    """The part of :class:`subprocess.Popen` that tests use, for an orphan that became a child of this process."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Scripts:
    """``python script ...`` in the repository."""

    def __init__(self):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, **VARIABLES}
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=environment, **pipes)
        self._folder = Path(tempfile.mkdtemp())
        atexit.register(self._end)

    def _end(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def alive(
        self, folder: Path, *words: object, out: Path | None = None, err: Path | None = None, **variables: str
    ) -> Iterator[SimpleNamespace]:
        """Start the script: ``process``, and ``out()`` and ``err()``, which read its output so far.

        Output goes to new files in ``folder``, or to ``out`` and ``err`` (pipes, say). When the block ends, every
        process that writes to a file in ``folder`` is killed.
        """
        files = output_files(folder)
        job = {"words": [str(word) for word in words], "out": str(out or files[0]), "err": str(err or files[1])}
        self._server.stdin.write(f"{json.dumps({**job, 'variables': variables})}\n")
        self._server.stdin.flush()
        process = Forked(int(self._server.stdout.readline()))
        with watched(folder, process, files) as run:
            yield run

    def run(self, *words: object, folder: Path | None = None, **variables: str) -> SimpleNamespace:
        """Run the script to its end: ``code``, ``out`` and ``err``."""
        with self.alive(folder or self._folder, *words, **variables) as run:
            return ended(run)

    @contextlib.contextmanager
    def group(self, size: int, folder: Path, *words: object, **variables: str) -> Iterator[list[SimpleNamespace]]:
        """Start ``size`` ranks of one process group, without a launcher."""
        meeting = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        meeting |= {"MASTER_PORT": str(free_port()), **variables}
        with contextlib.ExitStack() as stack:
            ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
            yield [stack.enter_context(self.alive(folder, *words, **rank, **meeting)) for rank in ranks]


@functools.cache
def _scripts() -> Scripts:
    return Scripts()


@pytest.fixture(scope="session", name="scripts")
def forked_scripts() -> Scripts:
    """One server for all files of a session."""
    if not sys.platform.startswith("linux"):
        pytest.skip("orphans are inherited on Linux only")
    return _scripts()


@contextlib.contextmanager
def started(folder: Path, *words: object, **variables: str) -> Iterator[SimpleNamespace]:
    """``python ...`` from the shell, such as a launcher; otherwise as :meth:`Scripts.alive`."""
    files = output_files(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with files[0].open("w") as out, files[1].open("w") as err:
        options = {"stdout": out, "stderr": err, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment, **options)
    with watched(folder, process, files) as run:
        yield run


def output_files(folder: Path) -> list[Path]:
    return [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]


@contextlib.contextmanager
def watched(folder: Path, process: Forked | subprocess.Popen, files: list[Path]) -> Iterator[SimpleNamespace]:
    out, err = ((lambda file=file: file.read_text() if file.exists() else "") for file in files)
    try:
        yield SimpleNamespace(process=process, out=out, err=err)
    finally:
        process.kill()
        kill_all(folder)
        process.wait(10)


def completed(folder: Path, *words: object, **variables: str) -> SimpleNamespace:
    """``python ...`` from the shell, run to its end: ``code``, ``out`` and ``err``."""
    with started(folder, *words, **variables) as run:
        return ended(run)


def ended(run: SimpleNamespace, seconds: float = 240) -> SimpleNamespace:
    """Wait for a process: ``code``, ``out`` and ``err``."""
    code = run.process.wait(timeout=seconds)
    return SimpleNamespace(code=code, out=run.out(), err=run.err())


def wait_for(condition: Callable[[], object], run: SimpleNamespace | None = None, seconds: float = 120) -> None:
    """``run``: its standard error explains a failure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, run.err() if run else "in vain"
        time.sleep(0.005)


def until(condition: Callable[[], object], run: SimpleNamespace, seconds: float = 120) -> bool:
    """Wait for ``condition``; False if the process ends first."""
    met = False

    def over() -> bool:
        nonlocal met
        met = bool(condition())
        return met or run.process.poll() is not None

    wait_for(over, run, seconds)
    return met


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


@contextlib.contextmanager
def closed_pipe(path: Path) -> Iterator[Path]:
    """A pipe whose reader goes as soon as a script has opened it (``out=`` or ``err=``): what it writes fails."""
    os.mkfifo(path)
    end = threading.Thread(target=lambda: path.open("rb").close(), daemon=True)  # waits for the other side
    end.start()
    yield path
    end.join(10)


# ---------------------------------------------------------------------------------------------------------------------
# Looking for processes


def processes_of(folder: Path) -> list[int]:
    """Every process whose standard output or error is a file in ``folder``: what was started there and its children."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(entry / "fd" / number).startswith(f"{folder}/") for number in "12"):
                found.append(int(entry.name))
    return found


def kill_all(folder: Path) -> None:
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def assert_nothing_left(folder: Path, seconds: float = 0) -> None:
    """Within ``seconds``. A DataLoader's workers look for their parent every 5 seconds."""
    wait_for(lambda: not processes_of(folder), seconds=seconds)


def catches_sigterm(pid: int) -> bool:
    with contextlib.suppress(OSError):
        caught = re.search(r"^SigCgt:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M).group(1)
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def ranks_of(folder: Path, launcher: int) -> dict[str, int]:
    """Rank -> process, of the processes that a launcher has started."""
    found = {}
    for pid in processes_of(folder):
        with contextlib.suppress(OSError):
            parent = re.search(r"^PPid:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M).group(1)
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if int(parent) == launcher:
                found |= {variable.decode()[5:]: pid for variable in variables if variable.startswith(b"RANK=")}
    return found


def script_of(folder: Path, body: str, name: str = "script.py") -> Path:
    """``body`` as a script in ``folder``."""
    (folder / name).write_text(body, encoding="utf-8")
    return folder / name
