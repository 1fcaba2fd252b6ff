"""Runs a grid of configurations and says what came of it: python -m utils.sweep SWEEP.yaml [--jobs N] [key value ...]

The file names arms (a configuration and what differs from it), axes, seeds and what is to be compared; see
config/sweeps/. Every run is one process of train_stage1.py, in ``<save_dir>/<sweep>/``; what is finished is skipped,
what was stopped goes on. ``results.json``, ``table.md``, ``table.tex`` and the figures there are brought up to date
whenever a run ends.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

from utils import distributed
from utils.command_line import Parser
from utils.config import dump_config
from utils.errors import InputError, Interrupted
from utils.files import write_text
from utils.report import plots
from utils.run.folder import read_rows
from utils.signals import WITH_PARENT, Signals
from utils.sweep.intervals import estimate
from utils.sweep.plan import (
    DEFAULTS,
    SUMMARY,
    Run,
    Sweep,
    plan,
    read_sweep,
    rows_of,
    short,
    summary_of,
    telling,
)
from utils.sweep.tables import BEGIN, END, MARKS, cells, fill_readme, independent, latex, markdown, values, waterfall

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = Path("config/sweeps/results")  # of the sweeps in config/sweeps, under ROOT
README = "README.md"
GRACE = 60.0  # seconds that runs have for their checkpoints when the sweep is stopped
PAUSE = 1.0  # seconds between two looks at the runs
OVERHEAD = 1.2  # of a run over its training, where only that was measured: evaluation, start
RESULTS = {  # the keys of results.json
    *("sweep", "images", "overridden", "arms", "seeds", "subset_seeds", "axes", "against", "pairs", "claims"),
    *("waterfall", "choose", "planned", "failed", "defaults", "runs"),
}
# What starts.jsonl says of a run; the values are those of a run that has none.
ORIGIN = {"commit": "", "device": "", "cpu": "", "threads": None, "processes": None, "versions": {}, "data": ""}


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    sweep = read_sweep(Path(args.sweep))
    home = Path(args.save_dir) / sweep.name
    runs = plan(sweep, home, args.overrides)
    try:
        if args.publish:
            if args.overrides:
                raise InputError(
                    "command line: --publish takes no options: it is the file's own runs that are published"
                )
            return publish(sweep, runs, home, Path(args.sweep), args.images)
        home.mkdir(parents=True, exist_ok=True)
        with Signals(GRACE) as signals, signals.noted(), _claimed(home) as lock:
            failed = Crew(sweep, runs, args.jobs, args.minutes, args.images, lock).work(signals)
        for name, why in failed.items():
            print(f"failed: {name}: {why}", file=sys.stderr)
        _tell(f"{home / 'table.md'}\n\n{markdown(results_of(sweep, runs, failed, args.images))}")
    except OSError as error:
        raise InputError(f"{error.filename or home}: {error.strerror or error}") from None
    return 1 if failed else 0


def _tell(text: str) -> None:
    """On standard output; where nobody reads that any more, nowhere: the runs have to be seen to all the same."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _claimed(home: Path) -> Iterator[int]:
    """Two processes never work on one sweep. The lock is gone with this process and the runs that it has started.

    Gives its file's descriptor, which the runs get too.
    """
    with (home / ".lock").open("a") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{home}: another process works on this sweep, or runs that it has started; wait for it, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield lock.fileno()


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    prog, description = "python -m utils.sweep", "Runs a grid of configurations; makes tables with intervals."
    more = "[--jobs N] [--minutes N] [--save_dir FOLDER] [--images TEXT] [--publish]"
    hint = f" (usage: {prog} SWEEP.yaml {more} [key value ...])"
    parser = Parser(prog=prog, description=description, hint=hint)
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="YAML file, see config/sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="key value", help="options of every run, such as: data_path D")
    parser.add_argument(
        "--jobs",
        type=_positive(int, "whole number above 0"),
        default=1,
        metavar="N",
        help="runs at once; GPUs take turns",
    )
    parser.add_argument(
        "--minutes", type=_positive(float, "number above 0"), metavar="N", help="start nothing that cannot end by then"
    )
    parser.add_argument("--save_dir", default="saved", metavar="FOLDER", help="holds the sweep's folder")
    parser.add_argument("--images", metavar="TEXT", help="what the images are, in words, for the tables")
    parser.add_argument(
        "--publish", action="store_true", help=f"run nothing: what is finished goes to {PUBLISHED} and the README"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.sweep is None:
        parser.error("which sweep?")
    return args


def _positive(kind: type, words: str):
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if kind(text) > 0:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be a {words}, not {text!r}")

    return parse


# ---------------------------------------------------------------------------------------------------------------------
# Running


@dataclass
class Working:
    """A run that is going on."""

    run: Run
    process: subprocess.Popen
    slot: int
    since: float = field(default_factory=time.monotonic)
    left_before: int = 0  # epochs, when it was started
    stopped: bool = False

    def pace(self, least: int = 2) -> float | None:
        """Seconds per epoch so far, its start included; None before ``least`` epochs."""
        epochs = self.left_before - self.run.epochs_left()
        return (time.monotonic() - self.since) / epochs if epochs >= least else None


class Crew:
    """Runs what is not finished, ``jobs`` at once, until all is done or the time is over."""

    def __init__(
        self,
        sweep: Sweep,
        runs: Sequence[Run],
        jobs: int,
        minutes: float | None,
        images: str | None,
        lock: int | None = None,
    ):
        """``lock``: a file's descriptor that runs keep open, see :func:`_claimed`."""
        self.sweep, self.runs, self.jobs, self.images, self.lock = sweep, list(runs), jobs, images, lock
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.waiting = [run for run in runs if not run.finished()]
        self.working: list[Working] = []
        self.failed: dict[str, str] = {}
        self.left = {run.name: run.epochs_left() for run in runs}  # epochs
        self.paces: dict[str, list[float]] = {}  # of finished runs of an arm, seconds per epoch
        for run in runs:
            if run not in self.waiting:
                epochs = run.cfg.num_epochs - run.forked_after
                self.paces.setdefault(run.arm, []).append(OVERHEAD * _seconds(run) / epochs)

    def work(self, signals: Signals) -> dict[str, str]:
        """Returns what failed, by the run's name. Raises :class:`Interrupted` where a signal ends it."""
        total = sum(run.cfg.num_epochs - run.forked_after for run in self.runs)
        _tell(f"{len(self.runs)} runs, {len(self.runs) - len(self.waiting)} finished before")
        with tqdm(total=total, unit="epoch", disable=not sys.stderr.isatty()) as bar:
            try:
                while self._start_what_may() or self.working:
                    if signals.received:
                        kept = "every run is kept as far as it came; the same command goes on"
                        raise Interrupted(signals.received, kept)
                    self._reap()
                    bar.n = total - self._epochs_left()
                    bar.refresh()
                    if self.deadline is not None and time.monotonic() > self.deadline:
                        self._stop("the time is over")
                    time.sleep(PAUSE)
            finally:
                self._stop("the sweep was stopped")
                while self.working:
                    self._reap()
                    time.sleep(PAUSE / 10)
                write_results(self.sweep, self.runs, self.failed, self.images)
        left = sum(run.name not in self.failed and not run.finished() for run in self.runs)
        if left:
            _tell(f"{left} runs are left for another time; the same command goes on")
        return self.failed

    def _start_what_may(self) -> bool:
        """Starts runs while there is room; False where none is left that could be."""
        room = self.jobs - len(self.working)
        if not room:
            return True
        self._give_up()
        ready = [run for run in self.waiting if self._ready(run)]
        for run in ready[:room]:
            self.waiting.remove(run)
            self._start(run)
        return bool(ready)

    def _ready(self, run: Run) -> bool:
        if run.parent and run.kept() is None:
            return False
        return self.deadline is None or time.monotonic() + (self._seconds_left(run) or 0.0) < self.deadline

    def _give_up(self) -> None:
        """Forks that will never have what they begin with."""
        for run in [run for run in self.waiting if run.parent and run.kept() is None]:
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
        fork = str(run.kept()) if run.parent else ""
        write_text(begun / f"{run.name}.yaml", dump_config(run.cfg, fork=fork))
        slot = min(set(range(self.jobs)) - {busy.slot for busy in self.working})
        command = [sys.executable, str(ROOT / "train_stage1.py"), "--cfg", str(begun / f"{run.name}.yaml")]
        with (begun / f"{run.name}.txt").open("w") as said:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(slot, self.jobs),
                start_new_session=True,  # a terminal's Ctrl-C reaches the sweep alone, which then asks its runs to stop
                pass_fds=[] if self.lock is None else [self.lock],
            )
        self.working.append(Working(run, process, slot, left_before=run.epochs_left()))
        self._say(f"start {run.name}" + (f", from epoch {run.epochs_done()}" if run.epochs_done() else ""))

    def _reap(self) -> None:
        for worker in [worker for worker in self.working if worker.process.poll() is not None]:
            pace = worker.pace(least=1)
            self.working.remove(worker)
            run, code = worker.run, worker.process.returncode
            self.left[run.name] = run.epochs_left()
            if code == 0 and run.finished():
                if pace:
                    self.paces.setdefault(run.arm, []).append(pace)
                write_results(self.sweep, self.runs, self.failed, self.images)
                self._say(f"done {run.name}: {_row(run)['last']['top1']:.2f} at the last epoch; {self._outlook()}")
            elif worker.stopped:
                self._say(f"stopped {run.name} after {run.epochs_done()} epochs; it is kept")
            else:
                why = _why(code, run.home / "started" / f"{run.name}.txt")
                others = [self.failed.get(other.name) for other in self.runs if other.arm != run.arm]
                self._fail(run, why)
                if code == 2 and not run.epochs_done() and why in others:  # no arm's own fault, then
                    raise InputError(f"{why} (runs of two arms have ended so at once; no other was started)")

    def _stop(self, why: str) -> None:
        for worker in self.working:
            if not worker.stopped:
                worker.stopped = True
                worker.process.send_signal(signal.SIGTERM)
                self._say(f"{why}: {worker.run.name} writes a checkpoint")

    def _epochs_left(self) -> int:
        """Of all runs."""
        self.left |= {worker.run.name: worker.run.epochs_left() for worker in self.working}
        return sum(self.left.values())

    def _seconds_left(self, run: Run) -> float | None:
        """None where nothing is known of how long an epoch takes."""
        now = next((worker.pace() for worker in self.working if worker.run is run), None)
        pace = now or _median(self.paces.get(run.arm, [])) or _median(list(itertools.chain(*self.paces.values())))
        pace = pace or _median([p for worker in self.working if (p := worker.pace())])
        return None if pace is None else pace * run.epochs_left()

    def _outlook(self) -> str:
        """How much is done, and when all of it will be."""
        left = [self._seconds_left(run) or 0.0 for run in (*(worker.run for worker in self.working), *self.waiting)]
        seconds = max(sum(left) / self.jobs, max(left, default=0.0))
        ended = sum(run.finished() for run in self.runs)
        end = datetime.now() + timedelta(seconds=seconds)
        when = f", all will be by about {end:%Y-%m-%d %H:%M}" if left else ""
        return f"{ended} of {len(self.runs)} runs are finished{when}"

    def _say(self, line: str) -> None:
        _tell(f"{datetime.now():%H:%M:%S} {line}")


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """A run's share of the machine: a GPU in turn, or of the processors what divides evenly.

    Where the sweep is killed, its runs stop too, and keep what they have.
    """
    environment = os.environ | {WITH_PARENT: "1"}
    gpus = torch.cuda.device_count()
    if gpus:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = (visible or [str(n) for n in range(gpus)])[slot % gpus]
    threads = str(max(1, distributed.workers_here(sys.maxsize) // jobs))
    return {"OMP_NUM_THREADS": threads} | environment if jobs > 1 else environment


def _seconds(run: Run) -> float:
    """Of training; the epochs before a fork were its parent's."""
    folder = run.folder()
    rows = rows_of(folder) if folder else []
    return sum(row["timing"]["train_seconds"] for row in rows if row["epoch"] >= run.forked_after)


def _median(numbers: Sequence[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def _why(code: int, said: Path) -> str:
    """A run's end in words: the last line that it said, unless something else ended it."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name} (SIGKILL: most often there was too little memory)"
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].removeprefix("error: ") if lines else "said nothing"
    return last if code else f"ended without a result, see {said}"


# ---------------------------------------------------------------------------------------------------------------------
# Results


def results_of(
    sweep: Sweep, runs: Sequence[Run], failed: Mapping[str, str] | None = None, images: str | None = None
) -> dict[str, Any]:
    """What ``results.json`` holds: what was compared, and one row for every finished run.

    ``images``: what they are, in words; that and ``failed`` are by default what an earlier ``results.json`` has.
    """
    home, before = runs[0].home, {"images": "", "failed": {}}
    with contextlib.suppress(OSError, ValueError, TypeError):  # a damaged file is made anew
        before |= json.loads((home / "results.json").read_text(encoding="utf-8"))
    rows = [_row(run) for run in runs if run.finished()]
    failed = before["failed"] if failed is None else failed
    return {
        "sweep": sweep.name,
        "images": before["images"] if images is None else images,
        "overridden": runs[0].overridden,
        "arms": list(sweep.arms),
        "seeds": {arm.name: arm.seeds for arm in sweep.arms.values()},
        "subset_seeds": sweep.subset_seeds,
        "axes": sweep.axes,
        **sweep.compared,
        "planned": len(runs),
        "failed": {name: why for name, why in failed.items() if name not in {row["run"] for row in rows}},
        "defaults": DEFAULTS,  # of the options that a run does not tell
        "runs": rows,
    }


def _row(run: Run) -> dict[str, Any]:
    """One run: what it was, where it ran, and its numbers (top-1, groups and ECE in percent)."""
    folder = run.folder()
    rows, starts, summary = rows_of(folder), read_rows(folder / "starts.jsonl"), summary_of(folder)
    origin = ORIGIN | (starts[-1] if starts else {})
    if any(start["data"] != origin["data"] for start in starts):
        origin["data"] = ""  # of no one set of images, and so compared with nothing
    held_out = {"val": {"top1": rows[-1]["val"]["top1"]}} if "val" in rows[-1] else {}
    return {
        "run": run.name,
        "arm": run.arm,
        "axes": run.cell,
        "seed": run.seed,
        "subset_seed": run.cfg.subset_seed,
        "hash": run.hash,
        "options": telling(run.cfg),
        "forked": {"run": run.parent.name, "epoch": run.forked_after} if run.parent else None,
        **{key: origin[key] for key in ORIGIN},
        "starts": [{key: start[key] for key in ("epoch", "step", "commit", "date")} for start in starts],
        "epochs": rows[-1]["epoch"] + 1,
        "seconds": round(_seconds(run), 1),
        **{ours: summary[theirs] for theirs, ours in SUMMARY.items()},
        **held_out,
    }


def write_results(sweep: Sweep, runs: Sequence[Run], failed: Mapping[str, str], images: str | None) -> None:
    """``results.json``, the tables and the figures, in the sweep's folder."""
    results, home = results_of(sweep, runs, failed, images), runs[0].home
    write_text(home / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(home / "table.md", markdown(results))
    write_text(home / "table.tex", latex(results))
    for name, figure in figures(results):
        plots.save_png(figure, home / f"{name}.png")


def figures(results: Mapping[str, Any]) -> Iterator[tuple[str, plots.Figure]]:
    """(name, figure): the arms over the imbalance ratio where that is an axis, and the waterfall where there is one."""
    points = cells(results)
    rest = [{key: value for key, value in point.items() if key != "imb_factor"} for point in points]
    if "imb_factor" in results["axes"]:
        for number, point in enumerate(rest):
            curves = _over_imbalance(results, point) if point not in rest[:number] else {}
            if curves:
                yield _named("imbalance", point), plots.imbalance_figure(curves)
    for point in points if results["waterfall"] else []:
        found = waterfall(results, point)
        if found:
            bars = [(bar.name, bar.change.mean, bar.change.low, bar.change.high) for bar in found.bars()]
            yield _named("waterfall", point), plots.waterfall_figure(bars, results["waterfall"].get("published"))


def _over_imbalance(results: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, dict[str, list]]:
    curves = {}
    for arm in results["arms"]:
        found = {}
        for factor in filter(None, results["axes"]["imb_factor"]):  # None: the data as they are
            top1 = values(results, arm, {**point, "imb_factor": factor})
            if top1:
                found[1 / factor] = estimate(independent(top1))
        if found:
            told = found.values()
            curves[arm] = {"ratios": list(found), "means": [one.mean for one in told]}
            curves[arm] |= {"lows": [one.low for one in told], "highs": [one.high for one in told]}
    return curves


def _named(kind: str, point: Mapping[str, Any]) -> str:
    return "_".join([kind, *(f"{key}{short(value)}" for key, value in point.items())])


# ---------------------------------------------------------------------------------------------------------------------
# Publishing


def publish(sweep: Sweep, runs: Sequence[Run], home: Path, path: Path, images: str | None, root: Path = ROOT) -> int:
    """Puts the finished runs beside the sweep's file, and the tables of all published sweeps into the README.

    Runs that were published before and lie elsewhere stay, as long as the sweep still has them as they were.
    """
    if path.resolve().parent != (root / "config/sweeps").resolve():
        raise InputError(f"{path}: only sweeps in config/sweeps are published")
    readme = root / README
    _check_marks(readme, sweep.name, root)
    results, target = results_of(sweep, runs, images=images), root / PUBLISHED / f"{sweep.name}.json"
    before = published(sweep.name, root)
    if before:
        results["images"] = results["images"] or before["images"]
        here, planned = {row["run"] for row in results["runs"]}, {run.name: run.hash for run in runs}
        order = list(planned)
        same = all(before["defaults"][key] == DEFAULTS[key] for key in before["defaults"].keys() & DEFAULTS.keys())
        rows = before["runs"] if same else []  # with other defaults they were other runs
        kept = [row for row in rows if row["run"] not in here and planned.get(row["run"]) == row["hash"]]
        results["runs"] = sorted([*results["runs"], *kept], key=lambda row: order.index(row["run"]))
        failed, ended = before["failed"] | results["failed"], {row["run"] for row in results["runs"]}
        results["failed"] = {name: why for name, why in failed.items() if name in planned and name not in ended}
    if not results["runs"]:
        raise InputError(f"{home}: has no finished run of {sweep.name}; there is nothing to publish")
    target.parent.mkdir(exist_ok=True)
    write_text(target, json.dumps(results, indent=1) + "\n")
    for name, figure in figures(results):
        plots.save_png(figure, target.with_name(f"{sweep.name}_{name}.png"))
    write_text(readme, fill_readme(readme.read_text(encoding="utf-8"), lambda name: published(name, root)))
    print(f"{target}: {len(results['runs'])} of {len(runs)} runs; {readme.name} is up to date")
    return 0


def _check_marks(readme: Path, name: str, root: Path) -> None:
    """The README has a place for the sweep's tables, and for no tables of a sweep that does not exist."""
    places = [found["name"] for found in MARKS.finditer(readme.read_text(encoding="utf-8"))]
    for place in places:
        if not (root / "config/sweeps" / f"{place}.yaml").is_file():
            raise InputError(f"{readme.name}: has a place for results of {place}, which is no sweep in config/sweeps")
    if name not in places:
        raise InputError(
            f"{readme.name}: has no place for the tables; put the lines {BEGIN}{name} --> and {END} where they belong"
        )


def published(name: str, root: Path = ROOT) -> dict[str, Any] | None:
    """The results of a sweep as they lie in the repository, None where none do. Raises :class:`InputError`."""
    path = root / PUBLISHED / f"{name}.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read; publish that sweep, or take the file out of git ({error})") from None
    if not isinstance(found, dict) or not found.keys() >= RESULTS:
        raise InputError(f"{path}: does not hold what a sweep's results are; take the file out of git")
    return found
