"""The day a GPU is there: every measurement in a process of its own, so that a crash or a hang loses no other."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils.bench.contestants import MODES
from utils.bench.timing import Row, cell

MPS = "nvidia-cuda-mps-control"
ROUNDS = 3
ERROR = re.compile(r"[\w.]*(Error|Exception|error)\b")  # how the last line of a traceback begins, and our own line


class Job(NamedTuple):
    """A part of the benchmark in one mode; "": in all that the part knows."""

    part: str
    mode: str
    seconds: int  # it may take these at least, while there is time; about half of them should do
    mps: bool = False  # as clients of NVIDIA's Multi-Process Service

    @property
    def title(self) -> str:
        return " ".join([self.part, *[self.mode] * bool(self.mode), *["MPS"] * self.mps])


JOBS = (
    Job("correctness", "", 40),
    *(Job("cifar", mode, 40) for mode in ("fp32", "tf32", "bf16", "fp16")),
    *(Job("together", "fp32", 90, mps) for mps in (False, True)),
    *(Job("large", mode, 45) for mode in ("fp32", "tf32", "bf16")),
    Job("pipeline", "", 40),
    Job("criterion", "", 40),
    *(Job("memory", mode, 40) for mode in ("fp32", "bf16")),
    # Compiling may take longer than all of the above.
    Job("cifar", "bf16+compile", 100),
    Job("large", "bf16+compile", 150),
    *(Job("cifar", f"{precision}+compile", 100) for precision in ("tf32", "fp16", "fp32")),
)


def results(args: argparse.Namespace) -> Iterator[tuple[Job, Row, Row]]:
    """Run ``JOBS`` within ``args.minutes``; yields each with its result and the machine's description as it ends.

    A result has the ``seconds`` that the job took; ``settings`` and ``tables`` if there are any; if it has failed,
    what :func:`run` returns. A job may take its ``seconds`` or its share of the time left, whichever is longer.
    """
    modes = [mode for mode in args.modes or MODES if args.compile or "+" not in mode]
    jobs = [job for job in JOBS if job.mode in ("", *modes) and (not job.mps or shutil.which(MPS))]
    end = time.monotonic() + 60 * args.minutes
    for number, job in enumerate(jobs):
        began = time.monotonic()
        share = (end - began) * job.seconds / sum(later.seconds for later in jobs[number:])
        limit = min(end - began, max(job.seconds, share))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            failed = run(job, args, limit, Path(name)) if limit > 0 else {"failed": "no time was left"}
            written = Path(name, "report.json")
            machine = json.loads(written.read_text()) if written.exists() else {"parts": {}}
        measured = machine.pop("parts").get(job.part, {})
        yield job, {"seconds": time.monotonic() - began, **measured, **failed}, machine


def run(job: Job, args: argparse.Namespace, limit: float, folder: Path) -> dict[str, str]:
    """Run ``job`` in ``folder``; after ``limit`` seconds kill it and what it has started.

    Returns nothing if all went well, else why it ``failed``, and the end of its ``stderr``.
    """
    errors = folder / "errors"
    try:
        with mps(folder) if job.mps else contextlib.nullcontext({}) as variables, errors.open("w") as stderr:
            environment = os.environ | variables | {"TMPDIR": str(folder)}  # a killed job's files go with the folder
            streams = {"stdout": subprocess.DEVNULL, "stderr": stderr, "start_new_session": True}
            process = subprocess.Popen(command(job, args, folder), env=environment, **streams)
            try:
                code = process.wait(limit)
                why = signal.Signals(-code).name if code < 0 else f"exit code {code}" * bool(code)
            except subprocess.TimeoutExpired:
                why = f"not done within {limit:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    with contextlib.suppress(subprocess.TimeoutExpired):  # it may be stuck in the driver
                        process.wait(10)
    except (OSError, subprocess.SubprocessError) as error:  # of MPS
        return {"failed": str(error)}
    said = errors.read_text(errors="replace")
    lines = [line.strip() for line in said.split("\n") if line.strip()]
    named = [line for line in lines if ERROR.match(line)]  # torch.compile's errors end with advice
    return {"failed": ": ".join([why, *(named or lines)[-1:]]), "stderr": said[-4000:]} if why else {}


def command(job: Job, args: argparse.Namespace, folder: Path) -> list[str]:
    """The command that writes ``report.json`` to ``folder``."""
    options = {
        "--json": folder / "report.json",
        "--device": "cuda" if args.device == "auto" else args.device,
        "--modes": job.mode,
        "--rounds": args.rounds or ROUNDS,
        "--steps": args.steps,
        "--photos": args.photos,
    }
    words = [str(word) for option, value in options.items() if value for word in (option, value)]
    return [sys.executable, "-m", "utils.bench", job.part, *words, *["--no-compile"] * ("+" not in job.mode)]


@contextlib.contextmanager
def mps(folder: Path) -> Iterator[dict[str, str]]:
    """Start NVIDIA's Multi-Process Service; yield the environment variables of its clients."""
    variables = {f"CUDA_MPS_{what}_DIRECTORY": str(folder) for what in ("PIPE", "LOG")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the daemon would keep a pipe open
    control = partial(subprocess.run, env=os.environ | variables, text=True, check=True, timeout=20, **quiet)
    control([MPS, "-d"])
    try:
        yield variables
    finally:
        control([MPS], input="quit -t 5\n")


def summary(job: Job, result: Row) -> str:
    """A line: the first column of the longest table, or why there is none."""
    said = [f"failed: {result['failed']}"] if "failed" in result else []
    if "tables" in result:
        title, rows = max(reversed(result["tables"].items()), key=lambda table: len(table[1]))
        unit = list(rows[0])[1]
        said.append(f"{title}, {unit}: " + ", ".join(f"[{row['what']}] {cell(row[unit])}" for row in rows))
    return f"{job.title:<18}  {result['seconds']:>4.0f} s  {'; '.join(said)}"
