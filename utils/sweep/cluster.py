"""A sweep as jobs of a cluster, by submitit (``pip install submitit``): ``--cluster slurm``, or ``local`` or ``debug``.

SLURM gets one job array per generation of runs: forks after what they begin with. A job trains one run or several that
share its GPU, by :class:`utils.sweep.runner.Scheduler`, and goes back into the queue if it is stopped before its end.
``local`` (processes of this machine) and ``debug`` (this process) are submitit's own, for tries and tests.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from utils.errors import InputError, Interrupted
from utils.files import lock_file, write_text
from utils.signals import Signals
from utils.sweep import runner
from utils.sweep.plan import Run
from utils.sweep.spec import Sweep

CLUSTERS = ("slurm", "local", "debug")
# Options of sbatch, unless others are given.
SBATCH = {"ntasks": "1", "time": "1-00:00:00", "signal": "USR1@120", "requeue": True}
NEVER = 10**6  # minutes; submitit counts a job's time too, and SLURM's limit is the one that holds
PAUSES = {"slurm": 5.0, "local": runner.PAUSE, "debug": 0.0}  # seconds between two looks at the jobs
SETTLES = {"slurm": 60.0, "local": 0.0, "debug": 0.0}  # seconds after a job's end until its files are seen elsewhere
# Since 22.05 srun does not take this from sbatch.
SETUP = ['if [ "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi']


# ---------------------------------------------------------------------------------------------------------------------
# In a job


class JobScheduler(runner.Scheduler):
    """Trains the runs of a job. Their results are left to the command: several jobs would write them at once."""

    def write_results(self) -> None:
        pass


@dataclass
class Task:
    """What one job does; submitit pickles it and calls it there."""

    sweep: Sweep
    runs: list[Run]
    cluster: str

    def __call__(self) -> None:
        requeue = signal.getsignal(signal.SIGUSR1)  # submitit's handler
        with contextlib.ExitStack() as stack:
            locks = [stack.enter_context(_locked(run)).fileno() for run in self.runs]
            scheduler = JobScheduler(self.sweep, self.runs, len(self.runs), None, None, locks)
            try:
                with Signals(runner.GRACE) as signals, signals.noted():
                    scheduler.work(signals)
            except InputError as error:
                runner.tell(str(error))
            except Interrupted as stop:
                if self.cluster == "debug":
                    raise
                if stop.number == signal.SIGUSR1 or (self.cluster == "slurm" and _still_runs()):
                    requeue(signal.SIGUSR1, None)
                sys.exit(128 + stop.number)
        if scheduler.failed and self.cluster == "slurm":
            sys.exit(1)

    def checkpoint(self) -> Any:
        """What submitit runs when the job starts again: the same, since runs resume from their folders."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _still_runs() -> bool:
    """Whether SLURM takes this job for running: it preempts it after a while, and has neither ended nor requeued it."""
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() == "RUNNING"


def _lock(run: Run) -> Path:
    return run.home / "started" / f"{run.name}.lock"


def _output(run: Run) -> Path:
    return run.home / "started" / f"{run.name}.txt"


def _locked(run: Run) -> IO:
    """Lock a run for this job. What a lost node was training ends late: the job that replaces it waits."""
    _lock(run).parent.mkdir(exist_ok=True)
    end = time.monotonic() + runner.GRACE
    while True:
        try:
            return lock_file(_lock(run), f"{run.name} is trained by another job", inheritable=True)
        except InputError:
            if time.monotonic() > end:
                raise
            time.sleep(runner.PAUSE)


# ---------------------------------------------------------------------------------------------------------------------
# Before and beside the jobs


def live(home: Path, runs: Sequence[Run]) -> set[str]:
    """The names of those ``runs`` that a job trains or is queued for."""
    ids = _read_ids(home)
    queue: Collection[str] = ()
    if any(run.name in ids for run in runs):
        try:
            queue = _queue()
        except FileNotFoundError:
            raise InputError(
                f"{_ids(home)} names jobs of runs that have not ended, and there is no squeue here to ask for them: "
                "use a machine of the cluster, or delete that file"
            ) from None
    return {run.name for run in runs if ids.get(run.name) in queue or _is_locked(run)}


def _ids(home: Path) -> Path:
    return home / "jobs" / "ids.json"


def _read_ids(home: Path) -> dict[str, str]:
    """Run name -> number of the SLURM job that was last submitted for it."""
    return json.loads(_ids(home).read_text(encoding="utf-8")) if _ids(home).exists() else {}


def _queue() -> Collection[str]:
    """The user's queued and running jobs, as 12 or 12_3. Raises ``FileNotFoundError`` where there is no SLURM."""
    words = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    except subprocess.CalledProcessError as error:
        raise InputError(f"squeue does not tell which jobs there are: {error.stderr}") from None


def _is_locked(run: Run) -> bool:
    with contextlib.suppress(InputError):
        if _lock(run).exists():
            lock_file(_lock(run), "", inheritable=True).close()
        return False
    return True


def generations(runs: Sequence[Run]) -> list[list[Run]]:
    """``runs``, each after the one whose checkpoint it begins with, unless that is there already."""
    depth: dict[str, int] = {}
    for run in runs:  # parents come before their forks
        depth[run.name] = depth.get(run.parent.name, 0) + 1 if run.parent and run.origin() is None else 0
    return [[run for run in runs if depth[run.name] == number] for number in sorted(set(depth.values()))]


class ClusterScheduler(runner.Scheduler):
    """Submits what is neither finished nor queued nor running, and follows all of it.

    On SLURM everything is submitted at once, and waits there. ``local`` and ``debug`` get ``jobs`` jobs at a time.
    """

    if_stopped = "the jobs go on; the same command follows them again"

    def __init__(
        self,
        sweep: Sweep,
        runs: Sequence[Run],
        images: str | None,
        cluster: str,
        jobs: int,
        per_gpu: int,
        sbatch: Mapping[str, str | bool],
    ):
        """``per_gpu``: runs of one job; ``sbatch``: options of that command. Raises :class:`InputError`."""
        super().__init__(sweep, runs, jobs * per_gpu, None, images)
        self.cluster, self.per_gpu, self.sbatch = cluster, per_gpu, SBATCH | sbatch
        self.pause = PAUSES[cluster]
        self.home = runs[0].home
        self.ids, self.submitted = _read_ids(self.home), {}
        self.queue: Collection[str] = ()
        self.ended: dict[str, float] = {}  # run name -> when its job was first found to have ended, without a result
        self.executor = _executor(self.home / "jobs", cluster)
        self.executor.update_parameters(
            name=sweep.name,
            timeout_min=NEVER,
            slurm_array_parallelism=jobs,
            slurm_setup=SETUP,
            local_gpus_per_node=torch.cuda.device_count(),
        )
        there = live(self.home, self.waiting)
        self.running = [self._job(run) for run in self.waiting if run.name in there]
        self.waiting = [run for run in self.waiting if run.name not in there]

    def submit(self) -> dict[str, str]:
        """Submit without waiting. Returns run name -> reason, of what cannot be trained."""
        going_on = len(self.running)
        self._start_ready()
        self.write_results()
        new = len(self.running) - going_on
        runner.tell(f"{len(self.runs)} runs, {self.finished_before} finished, {going_on} queued or running, {new} new")
        return self.failed

    def _start_ready(self) -> bool:
        self._fail_orphans()
        if self.cluster == "slurm":
            for runs in generations(self.waiting):
                self._submit(runs)
            return False
        if self.running:
            return True
        ready = [run for run in self.waiting if self.is_ready(run)][: self.jobs]
        if ready:
            self._submit(ready)
        return bool(ready)

    def _submit(self, runs: Sequence[Run]) -> None:
        groups = [list(runs[start : start + self.per_gpu]) for start in range(0, len(runs), self.per_gpu)]
        parents = {run.parent.name for run in runs if run.parent and run.origin() is None}
        awaited = sorted({self.ids[name] for name in parents & self.ids.keys()})
        # Not afterok: one parent that fails would keep the forks of all others from starting.
        after = [f"afterany:{':'.join(awaited)}"] if awaited else []
        after += [self.sbatch["dependency"]] if "dependency" in self.sbatch else []
        dependency = {"dependency": ",".join(after)} if after else {}
        self.executor.update_parameters(slurm_additional_parameters=self.sbatch | dependency)
        before = {run.name: f"; job {self.ids[run.name]}: {self._reason(run)}" for run in runs if run.name in self.ids}
        for run in runs:
            _output(run).unlink(missing_ok=True)
        with _submitting(self.cluster):
            jobs = self.executor.submit_array([Task(self.sweep, group, self.cluster) for group in groups])
        self.submitted |= {run.name: job for group, job in zip(groups, jobs, strict=True) for run in group}
        self.ids |= {run.name: self.submitted[run.name].job_id for run in runs}
        if self.cluster == "slurm":
            write_text(_ids(self.home), json.dumps(self.ids, indent=1) + "\n")
        for run in runs:
            self.waiting.remove(run)
            self.running.append(self._job(run))
            where = f"from epoch {run.epochs_done()}, as job {self.ids[run.name]}"
            self._say(f"submit {run.name}, {where}{before.get(run.name, '')}")

    @staticmethod
    def _job(run: Run) -> runner.Job:
        return runner.Job(run, None, 0, left_before=run.epochs_left())

    def _collect_finished(self) -> None:
        if self.cluster == "slurm":
            with contextlib.suppress(InputError, FileNotFoundError):  # SLURM is often out of reach for a moment
                self.queue = _queue()
        for job in list(self.running):
            run = job.run
            if job.left_before == run.epochs_left():
                job.since = time.monotonic()  # the time in the queue is not the run's
            if run.finished():
                self._end(job)
            elif self._is_live(run):
                self.ended.pop(run.name, None)
            elif time.monotonic() - self.ended.setdefault(run.name, time.monotonic()) >= SETTLES[self.cluster]:
                self._remove(job)
                self._fail(run, self._reason(run))

    def _is_live(self, run: Run) -> bool:
        if self.cluster == "slurm":
            return self.ids.get(run.name) in self.queue or _is_locked(run)
        job = self.submitted.get(run.name)
        return not job.done() if job else _is_locked(run)

    def _reason(self, run: Run) -> str:
        if run.parent and run.origin() is None:
            return f"{run.parent.name}, whose checkpoint it begins with, has not come so far"
        if not _output(run).exists():
            return f"its job did not start it, see {self.home / 'jobs'}"
        return runner.reason(1, _output(run))

    def _stop(self, why: str) -> None:
        self.running.clear()


def _executor(folder: Path, cluster: str) -> Any:
    # The trainer hears this signal, and would be ended by submitit's own choice. Read when submitit is imported.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    try:
        import submitit
    except ImportError:
        raise InputError(f"--cluster {cluster} needs submitit, which is not installed: pip install submitit") from None
    with _submitting(cluster):
        return submitit.AutoExecutor(folder, cluster=cluster)


@contextlib.contextmanager
def _submitting(cluster: str) -> Iterator[None]:
    """Turn submitit's errors into one line; what sbatch says, it prints as well."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except RuntimeError as error:
        raise InputError(f"--cluster {cluster}: {error}") from None
