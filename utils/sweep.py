"""Runs a grid of configurations and says what came of it: python -m utils.sweep SWEEP.yaml [--jobs N] [key value ...]

The file names arms (a configuration and what differs from it), axes, seeds and what is to be compared; see
config/sweeps/. Every run is one process of train_stage1.py, in ``<save_dir>/<sweep>/``; what is finished is skipped,
what was stopped goes on. ``results.json``, ``table.md``, ``table.tex`` and the figures there are brought up to date
whenever a run ends.
"""

import argparse
import ast
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from tqdm import tqdm
from yacs.config import CfgNode

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

import train_stage1
from utils import distributed, plots
from utils.checkpoint import INCIDENTAL, fork_of
from utils.command_line import exit_code
from utils.config import OPTIONS, dump_config, read_config
from utils.errors import InputError, Interrupted
from utils.files import write_text
from utils.intervals import estimate
from utils.run_log import read_rows
from utils.signals import WITH_PARENT, Signals
from utils.sweep_tables import MEASURES, arm_of, cells, fill_readme, latex, markdown, values, waterfall

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path("config/sweeps/results")  # of the sweeps in config/sweeps, under ROOT
README = "README.md"
KEYS = {
    "cfg": str,
    "options": dict,
    "axes": dict,
    "seeds": list,
    "subset_seeds": list,
    "arms": dict,
    "against": str,
    "pairs": list,
    "claims": dict,
    "waterfall": dict,
    "choose": bool,
}
OF_AN_ARM = ("cfg", "seeds", "fork")  # what an arm says beside options
SET_HERE = ("name", "save_dir", "seed", "subset_seed", "resume", "fork", "keep_epochs")  # by this module, for each run
GRACE = 60.0  # seconds that runs have for their checkpoints when the sweep is stopped
PAUSE = 1.0  # seconds between two looks at the runs
OVERHEAD = 1.2  # of a run over its training, where only that was measured: evaluation, start
SUMMARY = {"last epoch": "last", "cross-fitted best": "cross_fitted", "best on the test set": "best"}
# What starts.jsonl says of a run; the values are those of a run that has none.
ORIGIN = {"commit": "", "device": "", "cpu": "", "threads": None, "processes": None, "versions": {}, "data": ""}
DEFAULTS = {key: option.default for key, option in OPTIONS.items() if key not in INCIDENTAL}
IN_WORDS = {dict: "a mapping", list: "a list", str: "text", bool: "True or False"}


class Arm(NamedTuple):
    """One thing that is compared."""

    name: str
    cfg: Path
    options: dict[str, Any]
    seeds: list[int]
    fork: tuple[str, int] | None  # the arm whose runs it continues, and after how many epochs


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says."""

    name: str
    arms: dict[str, Arm]
    axes: dict[str, list]  # option -> values
    subset_seeds: list[int]
    compared: dict[str, Any]  # against, pairs, claims, waterfall, choose: see utils.sweep_tables


@dataclass(frozen=True)
class Run:
    """One run of a sweep: planned, going on, or finished."""

    name: str
    arm: str
    cell: dict[str, Any]  # the axes' values
    seed: int
    cfg: CfgNode
    home: Path  # the folder that holds the sweep's runs
    parent: "Run | None" = None
    forked_after: int = 0  # epochs of the parent
    overridden: dict[str, Any] = field(default_factory=dict)  # by the command line, of what decides a result

    @cached_property
    def hash(self) -> str:
        """Of everything that decides the result: options that are not their default, but for paths and the like.

        Defaults are left out, or every new option would make all runs new ones.
        """
        told = [_telling(self.cfg), [self.parent.hash, self.forked_after] if self.parent else None]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self) -> Path | None:
        """Its newest folder with this configuration and beginning, a finished one first; None: it was never started."""
        named = re.compile(re.escape(self.name) + r"_\d{14}(_\d+)?")
        folders = [path for path in self.home.glob(f"{glob.escape(self.name)}_*") if named.fullmatch(path.name)]
        parent = self.parent.folder() if self.parent else None
        if self.parent and parent is None:
            return None
        begun = [parent.name, "ckps", f"epoch_{self.forked_after}.pth.tar"] if parent else []
        folders = [path for path in folders if _told_by(path) == (_telling(self.cfg), begun)]
        return max(folders, key=lambda path: (self._ended(path), path.stat().st_mtime_ns), default=None)

    def _ended(self, folder: Path) -> bool:
        rows = _rows(folder) if _summary(folder) else []
        return bool(rows) and rows[-1]["epoch"] + 1 == self.cfg.num_epochs

    def finished(self) -> bool:
        folder = self.folder()
        return folder is not None and self._ended(folder)

    def epochs_done(self) -> int:
        folder = self.folder()
        return len(_rows(folder)) if folder else 0

    def epochs_left(self) -> int:
        return self.cfg.num_epochs - max(self.epochs_done(), self.forked_after)

    def kept(self) -> Path | None:
        """The checkpoint of the parent that it begins with; None where that is not there yet."""
        folder = self.parent.folder()
        path = folder / "ckps" / f"epoch_{self.forked_after}.pth.tar" if folder else None
        return path if path and path.is_file() else None


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


class _Parser(argparse.ArgumentParser):
    """One line, as for every other bad input."""

    def error(self, message: str) -> NoReturn:
        usage = "python -m utils.sweep SWEEP.yaml [--jobs N] [--minutes N] [key value ...]"
        raise InputError(f"command line: {message} (usage: {usage})")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser("python -m utils.sweep", description="Runs a grid of configurations; makes tables with intervals.")
    parser.add_argument("sweep", metavar="SWEEP", help="YAML file, see config/sweeps/")
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
    return parser.parse_intermixed_args(arguments)


def _positive(kind: type, words: str):
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = words  # argparse says it: invalid ... value
    return parse


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep's file. Raises :class:`InputError`."""
    if not path.is_file():
        raise InputError(f"{path}: no such sweep (give the path of a YAML file, see config/sweeps/)")
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise InputError(f"{path}: a sweep has arms: {{name: {{option: value, ...}}, ...}}")
    for key, value in content.items():
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}; a sweep has {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise InputError(f"{path}: {key}: must be {IN_WORDS[KEYS[key]]}, not {value!r}")
    axes = {axis: _along(path, axis, values) for axis, values in content.get("axes", {}).items()}
    _check_options(path, "options", content.get("options", {}), axes)
    arms: dict[str, Arm] = {}
    for name, options in content["arms"].items():
        arms[name] = _arm(path, content, name, options, arms)
    subset_seeds = content.get("subset_seeds", [0])
    _check_seeds(path, "subset_seeds", subset_seeds)
    return Sweep(path.stem, arms, axes, subset_seeds, _compared(path, content, arms, axes))


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        twice = _given_twice(yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    except Exception as error:  # PyYAML lets through whatever its constructors meet
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if twice is not None:
        raise InputError(f"{path}: {twice} is given twice; keep one")
    return content


def _given_twice(node: yaml.Node | None) -> str | None:
    """A key that some mapping in ``node`` has more than once, of which YAML would silently take the last one."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        inside = [value for _, value in node.value]
    else:
        twice, inside = None, node.value if isinstance(node, yaml.SequenceNode) else []
    return twice if twice is not None else next(filter(None, map(_given_twice, inside)), None)


def _along(path: Path, axis: str, values: Any) -> list:
    """An axis's values as the configuration will have them: 1e-2, which is text to YAML, is a number."""
    if not isinstance(values, list) or not values or axis not in OPTIONS or axis in SET_HERE:
        raise InputError(f"{path}: axes: {axis}: must be an option with a list of values")
    found = []
    for value in values:
        try:
            found.append(_value(axis, value))
        except ValueError as error:
            raise InputError(f"{path}: axes: {axis}: {value!r} {error}") from None
        if found[-1] in found[:-1]:
            raise InputError(f"{path}: axes: {axis}: {value!r} is there twice; keep one")
    return found


def _value(option: str, value: Any) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, TypeError, SyntaxError):
            value = ast.literal_eval(value)
    return OPTIONS[option].parse(value)


def _check_options(path: Path, where: str, options: Mapping, axes: Mapping) -> None:
    """Refuses what the sweep itself sets for every run."""
    for key in options:
        if key in SET_HERE:
            instead = {"seed": "seeds", "subset_seed": "subset_seeds of the sweep"}.get(key, "")
            raise InputError(
                f"{path}: {where}: {key} is set for every run by the sweep itself" + f"; give {instead}" * bool(instead)
            )
        if key in axes:
            raise InputError(f"{path}: {where}: {key} is an axis already, which sets it for every run; keep one")


def _check_seeds(path: Path, what: str, seeds: Any) -> None:
    numbers = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not numbers or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: {what}: must be a list of different whole numbers >= 0, not {seeds!r}")


def _arm(path: Path, content: Mapping, name: str, options: Any, before: Mapping[str, Arm]) -> Arm:
    if not isinstance(name, str) or not re.fullmatch(r"\w+(-\w+)*", name):
        raise InputError(f"{path}: arms: {name!r} must be a name of letters, digits and _")
    if options is not None and not isinstance(options, dict):
        raise InputError(f"{path}: {name}: must be a mapping of options, not {options!r}")
    options = dict(options or {})
    given = {key: options.pop(key, None) for key in OF_AN_ARM}
    _check_options(path, name, options, content.get("axes", {}))
    fork, parent = None, None
    if given["fork"] is not None:
        fork = _fork(path, name, given["fork"], before)
        parent = before[fork[0]]
    base = given["cfg"] or content.get("cfg")
    if parent is None and base is None:
        raise InputError(f"{path}: {name}: has no cfg, and neither has the sweep: the configuration it starts from")
    cfg = parent.cfg if parent and given["cfg"] is None else path.parent / str(base)
    own = {**content.get("options", {}), **(parent.options if parent else {}), **options}
    seeds = given["seeds"]
    if seeds is None:
        seeds = parent.seeds if parent else content.get("seeds", [0])
    _check_seeds(path, f"{name}: seeds" if given["seeds"] is not None else "seeds", seeds)
    return Arm(name, cfg, own, seeds, fork)


def _fork(path: Path, name: str, given: Any, before: Mapping[str, Arm]) -> tuple[str, int]:
    whole = isinstance(given, dict) and given.keys() == {"arm", "epoch"}
    if not whole or type(given["epoch"]) is not int or given["epoch"] < 1 or str(given["arm"]) not in before:
        raise InputError(
            f"{path}: {name}: fork: must be {{arm: an arm above, epoch: number >= 1}}, not {given!r}"
            + f" (above: {', '.join(before) or 'none'})"
        )
    return given["arm"], given["epoch"]


def _compared(path: Path, content: Mapping, arms: Mapping[str, Arm], axes: Mapping[str, list]) -> dict[str, Any]:
    """What is compared, with numbers as numbers; every name in it is an arm's."""
    told = {"against": next(iter(arms)), "pairs": [], "claims": {}, "waterfall": {}, "choose": False}
    told = {key: content.get(key, default) for key, default in told.items()}
    try:
        told["pairs"] = [_pair(pair) for pair in told["pairs"]]
        told["claims"] = {str(name): _claim(claim, axes) for name, claim in told["claims"].items()}
        told["waterfall"] = _steps(told["waterfall"]) if told["waterfall"] else {}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: pairs are [arm, another arm]; claims {{arm, published}} or {{pair, at_least}}, with at: {{axis: "
            f"value}} for one point; a waterfall has start, steps {{name: {{arm: weight}}}}, end "
            f"({', '.join(MEASURES)}) and published (wrong: {error})"
        ) from None
    plain = [
        *[told["against"]] * bool(told["against"]),
        *(claim["arm"] for claim in told["claims"].values() if "arm" in claim),
    ]
    terms = list(itertools.chain(*told["pairs"], *(claim.get("pair", []) for claim in told["claims"].values())))
    if told["waterfall"]:
        terms += [told["waterfall"]["start"], *itertools.chain(*told["waterfall"]["steps"].values())]
    for name in (*plain, *(arm_of(str(term)) for term in terms)):
        if name not in arms:
            raise InputError(f"{path}: {name!r} is compared and is no arm; there are {', '.join(arms)}")
    for term in terms:
        if term.partition(".")[1] and term.partition(".")[2] not in MEASURES:
            raise InputError(f"{path}: {term!r}: a term is an arm, or arm.{' or arm.'.join(MEASURES)}")
    return told


def _pair(given: Any) -> list[str]:
    if not isinstance(given, list) or len(given) != 2 or given[0] == given[1]:
        raise ValueError(f"{given!r} is no pair")
    return given


def _claim(given: Any, axes: Mapping[str, list]) -> dict[str, Any]:
    """``at``: the point of the grid that it is of, if it is not of every one."""
    told = {}
    if "at" in given:
        told["at"] = {axis: _value(axis, value) for axis, value in given["at"].items()}
        if any(value not in axes.get(axis, []) for axis, value in told["at"].items()):
            raise ValueError(f"at: {given['at']!r} is on no axis")
    if given.keys() - {"at"} == {"arm", "published"}:
        return {"arm": given["arm"], "published": _figure(given["published"])} | told
    if given.keys() - {"at"} == {"pair", "at_least"}:
        return {"pair": _pair(given["pair"]), "at_least": _number(given["at_least"])} | told
    raise ValueError(f"{given!r} is no claim")


def _figure(given: Any) -> float | list[float]:
    """A published one: a number, or [lowest, highest] of several."""
    if not isinstance(given, list):
        return _number(given)
    if len(given) != 2 or not _number(given[0]) <= _number(given[1]):
        raise ValueError(f"{given!r} is not [lowest, highest]")
    return [_number(value) for value in given]


def _steps(given: Mapping) -> dict[str, Any]:
    known = {"start", "steps", "end", "published"}
    if given.keys() - known or given["end"] not in MEASURES or not given["steps"]:
        raise ValueError(f"{dict(given)!r} is no waterfall")
    steps = {
        str(name): {str(term): _number(weight) for term, weight in terms.items()}
        for name, terms in given["steps"].items()
    }
    if not all(steps.values()):
        raise ValueError("a step without arms")
    published = given.get("published")
    return {
        **{"start": str(given["start"]), "steps": steps, "end": given["end"]},
        "published": None if published is None else _number(published),
    }


def _number(value: Any) -> float:
    """5e-1 is text to YAML."""
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def plan(sweep: Sweep, home: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """All runs: seeds outermost, so that a sweep that is stopped has compared what it has. Raises :class:`InputError`.

    ``overrides``: options for every run, from the command line.
    """
    if len(overrides) % 2:
        raise InputError(f"command line: options come in pairs, such as 'data_path D'; {overrides[-1]!r} stands alone")
    for key in overrides[::2]:
        if key in SET_HERE or key in sweep.axes:
            raise InputError(f"command line: {key} is set for every run by the sweep itself")
    found: dict[str, Run] = {}
    points = [dict(zip(sweep.axes, point, strict=True)) for point in itertools.product(*sweep.axes.values())]
    order = sorted({seed for arm in sweep.arms.values() for seed in arm.seeds})
    for subset, seed, cell, arm in itertools.product(sweep.subset_seeds, order, points, sweep.arms.values()):
        if seed in arm.seeds:
            run = _run(sweep, arm, cell, seed, subset, home, overrides, found)
            if run.name in found:
                raise InputError(f"{sweep.name}: two runs would be called {run.name}; give other names")
            found[run.name] = run
            if sweep.compared["choose"] and not run.cfg.val_per_class:
                raise InputError(f"{sweep.name}: choose: True needs val_per_class above 0, and {arm.name} has none")
    _check_overrides(sweep, overrides[::2])
    return list(found.values())


def _check_overrides(sweep: Sweep, keys: Sequence[str]) -> None:
    """What arms differ in, by their own options or by those of their configurations, cannot be one for all."""
    arms = {
        arm.name: read_config(arm.cfg, list(itertools.chain(*arm.options.items())))[0] for arm in sweep.arms.values()
    }
    for key in set(keys) & set(OPTIONS) - set(INCIDENTAL):
        first, *others = arms
        other = next((name for name in others if arms[name][key] != arms[first][key]), None)
        if other:
            raise InputError(
                f"command line: {key} is what {first} and {other} differ in, and would be the same for all"
            )


def _run(
    sweep: Sweep,
    arm: Arm,
    cell: dict,
    seed: int,
    subset: int,
    home: Path,
    overrides: Sequence[str],
    before: Mapping[str, Run],
) -> Run:
    def named(arm: str) -> str:
        along = "".join(f"_{axis}{_short(value)}" for axis, value in cell.items())
        return f"{arm}{along}_seed{seed}" + (f"_subset{subset}" if subset else "")

    keep = sorted({other.fork[1] for other in sweep.arms.values() if other.fork and other.fork[0] == arm.name})
    ours = {"name": named(arm.name), "save_dir": str(home), "seed": seed, "subset_seed": subset}
    told = {**arm.options, **cell, **dict(zip(overrides[::2], overrides[1::2], strict=True))}
    pairs = itertools.chain(*{**told, **ours, "resume": "auto", "keep_epochs": keep}.items())
    try:
        cfg, _ = read_config(arm.cfg, list(pairs))
        train_stage1.check(cfg)
    except InputError as error:
        said = str(error).removeprefix("command line: ")
        raise InputError(f"{sweep.name}: {arm.name}: {said}") from None
    overridden = {key: cfg[key] for key in overrides[::2] if key in cfg and key not in INCIDENTAL}
    if arm.fork is None:
        return Run(ours["name"], arm.name, cell, seed, cfg, home, overridden=overridden)
    parent, epoch = before.get(named(arm.fork[0])), arm.fork[1]
    if parent is None:
        raise InputError(f"{arm.name}: seed {seed} would fork a run of {arm.fork[0]} that the sweep does not have")
    if not parent.forked_after < epoch <= parent.cfg.num_epochs or epoch >= cfg.num_epochs:
        raise InputError(
            f"{arm.name}: fork: epoch {epoch} must lie in the {parent.cfg.num_epochs} epochs of {arm.fork[0]} (after "
            f"its own {parent.forked_after}) and before the end of {cfg.num_epochs}"
        )
    other = [key for key in train_stage1.FIXED if cfg[key] != parent.cfg[key]]
    other += ["nc_within"] * ((cfg.nc_within > 0) != (parent.cfg.nc_within > 0))  # whether there are class means
    if other:
        raise InputError(
            f"{arm.name}: a fork goes on with its parent's data and network, and its {other[0]} is another"
        )
    return Run(ours["name"], arm.name, cell, seed, cfg, home, parent, epoch, overridden)


def _short(value: Any) -> str:
    """As a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def _telling(cfg: Mapping) -> dict[str, Any]:
    """The options that decide a result and are not their default."""
    return {key: cfg[key] for key in OPTIONS if key not in INCIDENTAL and cfg[key] != OPTIONS[key].default}


def _rows(folder: Path) -> list[dict]:
    """Of ``metrics.jsonl``; none where it is damaged: the run itself will say so."""
    try:
        return read_rows(folder / "metrics.jsonl")
    except InputError:
        return []


def _told_by(folder: Path) -> tuple[dict[str, Any], list[str]] | None:
    """:func:`_telling` of a run's ``config.yaml`` and what it was forked from; None where none can be read."""
    try:
        return _read_once(folder / "config.yaml", (folder / "config.yaml").stat().st_mtime_ns)
    except (OSError, InputError):
        return None


@cache
def _read_once(path: Path, changed: int) -> tuple[dict[str, Any], list[str]]:
    cfg, _ = read_config(path)
    return _telling(cfg), fork_of(cfg)


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
        self._give_up()
        ready = [run for run in self.waiting if self._ready(run)]
        for run in ready[: self.jobs - len(self.working)]:
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
                self._fail(run, _why(code, run.home / "started" / f"{run.name}.txt"))

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
    rows = _rows(folder) if folder else []
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
    rows, starts, summary = _rows(folder), read_rows(folder / "starts.jsonl"), _summary(folder)
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
        "options": _telling(run.cfg),
        "forked": {"run": run.parent.name, "epoch": run.forked_after} if run.parent else None,
        **{key: origin[key] for key in ORIGIN},
        "starts": [{key: start[key] for key in ("epoch", "step", "commit", "date")} for start in starts],
        "epochs": rows[-1]["epoch"] + 1,
        "seconds": round(_seconds(run), 1),
        **{ours: summary[theirs] for theirs, ours in SUMMARY.items()},
        **held_out,
    }


def _summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json``; None where it is not there or damaged: the run goes on for no further epoch and writes it."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in SUMMARY)
    return found if whole and all("top1" in found[key] for key in SUMMARY) else None


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
            top1 = list(values(results, arm, {**point, "imb_factor": factor}).values())
            if top1:
                found[1 / factor] = estimate(top1)
        if found:
            told = found.values()
            curves[arm] = {"ratios": list(found), "means": [one.mean for one in told]}
            curves[arm] |= {"lows": [one.low for one in told], "highs": [one.high for one in told]}
    return curves


def _named(kind: str, point: Mapping[str, Any]) -> str:
    return "_".join([kind, *(f"{key}{_short(value)}" for key, value in point.items())])


# ---------------------------------------------------------------------------------------------------------------------
# Publishing


def publish(sweep: Sweep, runs: Sequence[Run], home: Path, path: Path, images: str | None, root: Path = ROOT) -> int:
    """Puts the finished runs beside the sweep's file, and the tables of all published sweeps into the README.

    Runs that were published before and lie elsewhere stay, as long as the sweep still has them as they were.
    """
    if path.resolve().parent != (root / "config/sweeps").resolve():
        raise InputError(f"{path}: only sweeps in config/sweeps are published")
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
    readme = root / README
    write_text(readme, fill_readme(readme.read_text(encoding="utf-8"), lambda name: published(name, root)))
    print(f"{target}: {len(results['runs'])} of {len(runs)} runs; {readme.name} is up to date")
    return 0


def published(name: str, root: Path = ROOT) -> dict[str, Any] | None:
    """The results of a sweep as they lie in the repository, None where none do. Raises :class:`InputError`."""
    path = root / PUBLISHED / f"{name}.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read; publish that sweep, or take the file out of git ({error})") from None
    if not isinstance(found, dict) or not {"images", "defaults", "runs"} <= found.keys():
        raise InputError(f"{path}: holds no results; take the file out of git")
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main))
