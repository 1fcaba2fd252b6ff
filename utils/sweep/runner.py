"""Run what is not finished of a sweep, each run as one process of train_stage1.py.

Finished runs are skipped, stopped ones resumed. Results, tables and figures are updated whenever a run ends.
"""

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from utils import distributed
from utils.command_line import discard_if_closed
from utils.config import dump_config
from utils.errors import InputError, Interrupted
from utils.files import lock_file, write_text
from utils.signals import WITH_PARENT, Signals
from utils.sweep.plan import Run, summary_of
from utils.sweep.results import ROOT, write_results
from utils.sweep.spec import Sweep

GRACE = 60.0  # seconds that runs have for their checkpoints when the sweep is stopped
PAUSE = 1.0  # seconds between two looks at the runs
OVERHEAD = 1.2  # of a run over its training, if only that was measured: evaluation, start


def tell(text: str) -> None:
    """Print; without a reader the sweep goes on all the same."""
    with discard_if_closed(sys.stdout):
        tqdm.write(text)


@contextlib.contextmanager
def claimed(home: Path) -> Iterator[int]:
    """Keep other processes from working on this sweep; yield the lock's descriptor, which the runs inherit."""
    taken = f"{home}: another process works on this sweep, or runs that it has started; wait for it, or stop it"
    with lock_file(home / ".lock", taken, inheritable=True) as lock:
        yield lock.fileno()


@dataclass
class Job:
    """A run in progress."""

    run: Run
    process: subprocess.Popen
    slot: int
    since: float = field(default_factory=time.monotonic)
    left_before: int = 0  # epochs left when it was started
    stopped: bool = False

    def pace(self, least: int = 2) -> float | None:
        """Seconds per epoch so far, with its start; None before ``least`` epochs."""
        epochs = self.left_before - self.run.epochs_left()
        return (time.monotonic() - self.since) / epochs if epochs >= least else None


class Scheduler:
    """Runs what is not finished, ``jobs`` at once, until all is done or the time is over."""

    pause = PAUSE
    if_stopped = "every run is kept as far as it came; the same command goes on"

    def __init__(
        self,
        sweep: Sweep,
        runs: Sequence[Run],
        jobs: int,
        minutes: float | None,
        images: str | None,
        locks: Sequence[int] = (),
    ):
        """``locks``: descriptors of files that runs keep open."""
        self.sweep, self.runs, self.jobs, self.images, self.locks = sweep, list(runs), jobs, images, locks
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.waiting = [run for run in runs if not run.finished()]
        self.finished_before = len(self.runs) - len(self.waiting)
        self.running: list[Job] = []
        self.failed: dict[str, str] = {}
        self.left = {run.name: run.epochs_left() for run in runs}  # epochs
        self.paces: dict[str, list[float]] = {}  # arm -> seconds per epoch of its finished runs
        for run in runs:
            if run not in self.waiting:
                self.paces.setdefault(run.arm, []).append(OVERHEAD * run.seconds() / run.epochs())

    def work(self, signals: Signals) -> dict[str, str]:
        """Run name -> reason, of what failed. Raises :class:`Interrupted` if a signal ends it."""
        total = sum(run.epochs() for run in self.runs)
        tell(f"{len(self.runs)} runs, {self.finished_before} finished before")
        with tqdm(total=total, unit="epoch", disable=not sys.stderr.isatty()) as bar:
            try:
                while self._start_ready() or self.running:
                    if signals.received:
                        raise Interrupted(signals.received, self.if_stopped)
                    self._collect_finished()
                    bar.n = total - self.total_epochs_left()
                    bar.refresh()
                    if self.deadline is not None and time.monotonic() > self.deadline:
                        self._stop("the time is over")
                    time.sleep(self.pause)
            finally:
                self._stop("the sweep was stopped")
                while self.running:
                    self._collect_finished()
                    time.sleep(self.pause / 10)
                self.write_results()
        left = sum(run.name not in self.failed and not run.finished() for run in self.runs)
        if left:
            tell(f"{left} runs are left for another time; the same command goes on")
        return self.failed

    def _start_ready(self) -> bool:
        """Start runs while there is room; return False if no run is left that could be started."""
        room = self.jobs - len(self.running)
        if not room:
            return True
        self._fail_orphans()
        ready = [run for run in self.waiting if self.is_ready(run)]
        for run in ready[:room]:
            self.waiting.remove(run)
            self._start(run)
        return bool(ready)

    def is_ready(self, run: Run) -> bool:
        """Whether what it begins with is there, and it can end in time."""
        if run.parent and run.origin() is None:
            return False
        return self.deadline is None or time.monotonic() + (self.seconds_left(run) or 0.0) < self.deadline

    def _fail_orphans(self) -> None:
        """Fail forks whose origin will never exist."""
        for run in [run for run in self.waiting if run.parent and run.origin() is None]:
            why = ""
            if run.parent.name in self.failed:
                why = f"{run.parent.name}, whose checkpoint it begins with, failed"
            elif run.parent.finished():
                why = f"{run.parent.folder()} has no ckps/epoch_{run.forked_after}.pth.tar to begin with, and has ended"
                why += "; move that folder away, and it is trained again and keeps it"
            if why:
                self.waiting.remove(run)
                self._fail(run, why)

    def _fail(self, run: Run, why: str) -> None:
        self.failed[run.name] = why
        self._say(f"failed {run.name}: {why}")

    def _start(self, run: Run) -> None:
        begun = run.home / "started"
        begun.mkdir(exist_ok=True)
        fork = str(run.origin()) if run.parent else ""
        write_text(begun / f"{run.name}.yaml", dump_config(run.cfg, fork=fork))
        slot = min(set(range(self.jobs)) - {job.slot for job in self.running})
        command = [sys.executable, str(ROOT / "train_stage1.py"), "--cfg", str(begun / f"{run.name}.yaml")]
        with (begun / f"{run.name}.txt").open("w") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(slot, self.jobs),
                start_new_session=True,  # a terminal's Ctrl-C reaches the sweep alone, which then asks its runs to stop
                pass_fds=self.locks,
            )
        self.running.append(Job(run, process, slot, left_before=run.epochs_left()))
        self._say(f"start {run.name}" + (f", from epoch {run.epochs_done()}" if run.epochs_done() else ""))

    def _collect_finished(self) -> None:
        for job in [job for job in self.running if job.process.poll() is not None]:
            run, code = job.run, job.process.returncode
            if code == 0 and run.finished():
                self._end(job)
                continue
            self._remove(job)
            if job.stopped:
                self._say(f"stopped {run.name} after {run.epochs_done()} epochs; it is kept")
            else:
                why = reason(code, run.home / "started" / f"{run.name}.txt")
                others = [self.failed.get(other.name) for other in self.runs if other.arm != run.arm]
                self._fail(run, why)
                if code == 2 and not run.epochs_done() and why in others:  # no arm's own fault, then
                    raise InputError(f"{why} (runs of two arms have ended so at once; no other was started)")

    def _remove(self, job: Job) -> None:
        self.running.remove(job)
        self.left[job.run.name] = job.run.epochs_left()

    def _end(self, job: Job) -> None:
        """Take a finished run into the results."""
        run, pace = job.run, job.pace(least=1)
        self._remove(job)
        if pace:
            self.paces.setdefault(run.arm, []).append(pace)
        self.write_results()
        top1 = summary_of(run.folder())["last epoch"]["top1"]
        self._say(f"done {run.name}: {top1:.2f} at the last epoch; {self.progress()}")

    def write_results(self) -> None:
        write_results(self.sweep, self.runs, self.failed, self.images)

    def _stop(self, why: str) -> None:
        for job in self.running:
            if not job.stopped:
                job.stopped = True
                job.process.send_signal(signal.SIGTERM)
                self._say(f"{why}: {job.run.name} writes a checkpoint")

    def total_epochs_left(self) -> int:
        self.left |= {job.run.name: job.run.epochs_left() for job in self.running}
        return sum(self.left.values())

    def seconds_left(self, run: Run) -> float | None:
        """By the pace of the run itself, of its arm, of all arms, or of other runs; None before any is known."""
        own = [job.pace() for job in self.running if job.run is run]
        of_arm, of_all = self.paces.get(run.arm, []), list(itertools.chain(*self.paces.values()))
        sources = (own, of_arm, of_all, [job.pace() for job in self.running])
        paces = next((found for source in sources if (found := list(filter(None, source)))), None)
        return statistics.median(paces) * run.epochs_left() if paces else None

    def progress(self) -> str:
        """How much is done, and when all of it will be."""
        left = [self.seconds_left(run) or 0.0 for run in (*(job.run for job in self.running), *self.waiting)]
        seconds = max(sum(left) / self.jobs, max(left, default=0.0))
        ended = sum(run.finished() for run in self.runs)
        end = datetime.now() + timedelta(seconds=seconds)
        when = f", all will be by about {end:%Y-%m-%d %H:%M}" if ended < len(self.runs) else ""
        return f"{ended} of {len(self.runs)} runs are finished{when}"

    def _say(self, line: str) -> None:
        tell(f"{datetime.now():%H:%M:%S} {line}")


def environment(slot: int, jobs: int) -> dict[str, str]:
    """A run's environment: one of the GPUs in turn, or its share of the processors.

    A run whose sweep is killed stops too, with a checkpoint.
    """
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}  # also within a SLURM job for several tasks
    variables = os.environ | {WITH_PARENT: "1"} | alone
    gpus = torch.cuda.device_count()
    if gpus:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        cards = visible or [str(number) for number in range(gpus)]
        variables["CUDA_VISIBLE_DEVICES"] = cards[slot % len(cards)]  # of MIG instances CUDA counts one
    threads = str(max(1, distributed.workers_here(sys.maxsize) // jobs))
    return {"OMP_NUM_THREADS": threads} | variables if jobs > 1 else variables


def reason(code: int, output: Path) -> str:
    """Why a run ended: the last line of its output, unless a signal killed it."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name} (SIGKILL: most often there was too little memory)"
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].removeprefix("error: ") if lines else "said nothing"
    return last if code else f"ended without a result, see {output}"
