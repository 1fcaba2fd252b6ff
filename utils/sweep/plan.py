"""The runs that follow from a sweep's file; where each run's folder is and how far it has come."""

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from utils import build
from utils.config import FIXED, INCIDENTAL, OLD_SWITCHES, OPTIONS, read_config
from utils.errors import InputError
from utils.option_checks import MOVING_MEANS, has_moving_means
from utils.run.folder import read_rows
from utils.run.resume import fork_of
from utils.sweep.spec import Arm, Sweep, at, refuse_set_by_sweep, terms_of

SUMMARY = {"last epoch": "last", "cross-fitted best": "cross_fitted", "best on the test set": "best"}
DEFAULTS = {key: option.default for key, option in OPTIONS.items() if key not in INCIDENTAL}


@dataclass(frozen=True)
class Run:
    """One run of a sweep: planned, in progress, or finished."""

    name: str
    arm: str
    cell: dict[str, Any]  # the axes' values
    seed: int
    cfg: CfgNode
    home: Path  # the folder that holds the sweep's runs
    parent: "Run | None" = None
    forked_after: int = 0  # epochs of the parent
    overridden: dict[str, Any] = field(default_factory=dict)  # options of the command line that decide a result

    @cached_property
    def hash(self) -> str:
        """Of everything that decides the result. Defaults are left out, or a new option would make all runs new."""
        content = [non_defaults(self.cfg), [self.parent.hash, self.forked_after] if self.parent else None]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self) -> Path | None:
        """Its newest folder with this configuration and beginning, a finished one first; None if never started."""
        named = re.compile(re.escape(self.name) + r"_\d{14}(_\d+)?")
        folders = [path for path in self.home.glob(f"{glob.escape(self.name)}_*") if named.fullmatch(path.name)]
        parent = self.parent.folder() if self.parent else None
        if self.parent and parent is None:
            return None
        begun = [parent.name, "ckps", f"epoch_{self.forked_after}.pth.tar"] if parent else []
        folders = [path for path in folders if _identity(path) == (non_defaults(self.cfg), begun)]
        return max(folders, key=lambda path: (self._ended(path), path.stat().st_mtime_ns), default=None)

    def _ended(self, folder: Path) -> bool:
        rows = rows_of(folder) if summary_of(folder) else []
        return bool(rows) and rows[-1]["epoch"] + 1 == self.cfg.num_epochs

    def finished(self) -> bool:
        folder = self.folder()
        return folder is not None and self._ended(folder)

    def epochs(self) -> int:
        """Of its own, without its parent's."""
        return self.cfg.num_epochs - self.forked_after

    def epochs_done(self) -> int:
        folder = self.folder()
        return len(rows_of(folder)) if folder else 0

    def epochs_left(self) -> int:
        return self.cfg.num_epochs - max(self.epochs_done(), self.forked_after)

    def seconds(self) -> float:
        """Training time in seconds, without the parent's epochs."""
        folder = self.folder()
        rows = rows_of(folder) if folder else []
        return sum(row["timing"]["train_seconds"] for row in rows if row["epoch"] >= self.forked_after)

    def origin(self) -> Path | None:
        """The checkpoint of the parent that a fork begins with; None until it exists."""
        folder = self.parent.folder()
        path = folder / "ckps" / f"epoch_{self.forked_after}.pth.tar" if folder else None
        return path if path and path.is_file() else None


def plan(sweep: Sweep, home: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """All runs, seeds outermost: a sweep that is stopped has compared what it has. Raises :class:`InputError`.

    ``overrides``: options for every run, from the command line.
    """
    given = at("command line", partial(_given, sweep), overrides)
    points = [dict(zip(sweep.axes, point, strict=True)) for point in itertools.product(*sweep.axes.values())]
    seeds = sorted({seed for arm in sweep.arms.values() for seed in arm.seeds})
    found: dict[str, Run] = {}
    for subset, seed, cell, arm in itertools.product(sweep.subset_seeds, seeds, points, sweep.arms.values()):
        if seed in arm.seeds:
            run = _run(sweep, arm, cell, seed, subset, home, given)
            if arm.fork:
                parent = found.get(_name(arm.fork[0], cell, seed, subset))
                run = at(f"{sweep.name}: {arm.name}", partial(_fork, run, fork=arm.fork), parent)
            if run.name in found:
                raise InputError(f"{sweep.name}: two runs would be called {run.name}; give other names")
            found[run.name] = run
            _check_measured(sweep, run)
    at("command line", partial(_check_differences, sweep), given)
    return list(found.values())


def _given(sweep: Sweep, overrides: Sequence[str]) -> dict[str, str]:
    if len(overrides) % 2:
        raise InputError(f"options come in pairs, such as 'data_path D'; {overrides[-1]!r} stands alone")
    keys = overrides[::2]
    refuse_set_by_sweep(keys)
    for key in keys:
        if key in sweep.axes:
            raise InputError(f"{key} is set for every run by the sweep itself, as an axis")
        if key in OLD_SWITCHES:
            raise InputError(f"{key} is a switch of the originals; give the option that it stands for")
    return dict(zip(keys, overrides[1::2], strict=True))


def _run(sweep: Sweep, arm: Arm, cell: dict, seed: int, subset: int, home: Path, given: Mapping[str, str]) -> Run:
    name = _name(arm.name, cell, seed, subset)
    keep = sorted({other.fork[1] for other in sweep.arms.values() if other.fork and other.fork[0] == arm.name})
    own = {"name": name, "save_dir": str(home), "seed": seed, "subset_seed": subset}
    settings = {**arm.options, **cell, **given, **own, "resume": "auto", "keep_epochs": keep}
    try:
        cfg, _ = read_config(arm.cfg, list(itertools.chain(*settings.items())))
        build.check(cfg)
    except InputError as error:
        raise InputError(f"{sweep.name}: {arm.name}: {str(error).removeprefix('command line: ')}") from None
    overridden = {key: cfg[key] for key in given if key in cfg and key not in INCIDENTAL}
    return Run(name, arm.name, cell, seed, cfg, home, overridden=overridden)


def _name(arm: str, cell: Mapping, seed: int, subset: int) -> str:
    point = "".join(f"_{axis}{short(value)}" for axis, value in cell.items())
    return f"{arm}{point}_seed{seed}" + (f"_subset{subset}" if subset else "")


def _fork(run: Run, parent: Run | None, fork: tuple[str, int]) -> Run:
    """A run that continues its parent, with its parent's data and network."""
    arm, epoch = fork
    if parent is None:
        raise InputError(f"seed {run.seed} would fork a run of {arm} that the sweep does not have")
    if not parent.forked_after < epoch <= parent.cfg.num_epochs or epoch >= run.cfg.num_epochs:
        raise InputError(
            f"fork: epoch {epoch} must lie in the {parent.cfg.num_epochs} epochs of {arm} (after its own "
            f"{parent.forked_after}) and before the end of {run.cfg.num_epochs}"
        )
    changed = [key for key in FIXED if run.cfg[key] != parent.cfg[key]]
    changed += ["nc_within"] * ((run.cfg.nc_within > 0) != (parent.cfg.nc_within > 0))  # whether there are class means
    if has_moving_means(run.cfg) != has_moving_means(parent.cfg):
        changed.append(f"use of moving class means ({', '.join(MOVING_MEANS)})")
    if changed:
        raise InputError(f"a fork keeps its parent's data, network and optimizer, and its {changed[0]} is another")
    return replace(run, parent=parent, forked_after=epoch)


def _check_measured(sweep: Sweep, run: Run) -> None:
    """Without held-out images or averaged weights there is no accuracy of them to choose by or to compare."""
    compared = sweep.compared
    wanted = {
        "choose: True": compared["choose"],
        "end: val": compared["waterfall"].get("end") == "val",
        f"{run.arm}.val": f"{run.arm}.val" in terms_of(compared),
    }
    what = next((what for what, is_wanted in wanted.items() if is_wanted), None)
    if what and not (run.cfg.val_per_class or run.cfg.test_txt):
        raise InputError(f"{sweep.name}: {what} needs val_per_class above 0, and {run.arm} has none")
    averaged = compared["waterfall"].get("end") == "ema" or f"{run.arm}.ema" in terms_of(compared)
    if averaged and not run.cfg.ema:
        raise InputError(f"{sweep.name}: the measure ema needs ema above 0, and {run.arm} has none")


def _check_differences(sweep: Sweep, keys: Iterable[str]) -> None:
    """An option that arms differ in, by their own options or their configurations, cannot be one for all."""
    deciding, first = [key for key in keys if key in DEFAULTS], None
    for arm in sweep.arms.values() if deciding else ():
        cfg, _ = read_config(arm.cfg, list(itertools.chain(*arm.options.items())))
        first = first or (arm.name, cfg)
        for key in deciding:
            if cfg[key] != first[1][key]:
                raise InputError(f"{key} is what {first[0]} and {arm.name} differ in, and would be the same for all")


def short(value: Any) -> str:
    """``value`` as a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def non_defaults(cfg: Mapping) -> dict[str, Any]:
    """The options that decide a result and are not their default."""
    return {key: cfg[key] for key, default in DEFAULTS.items() if cfg[key] != default}


def rows_of(folder: Path) -> list[dict]:
    """Rows of ``metrics.jsonl``, or none if it is damaged (the run reports that itself)."""
    try:
        return read_rows(folder / "metrics.jsonl")
    except InputError:
        return []


def summary_of(folder: Path) -> dict[str, Any] | None:
    """``summary.json``; None if missing or damaged: resuming the run writes it again without training."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in SUMMARY)
    return found if whole and all("top1" in found[key] for key in SUMMARY) else None


def _identity(folder: Path) -> tuple[dict[str, Any], list[str]] | None:
    """:func:`non_defaults` of a run's ``config.yaml`` and what it was forked from; None if it cannot be read."""
    try:
        return _read_once(folder / "config.yaml", (folder / "config.yaml").stat().st_mtime_ns)
    except (OSError, InputError):
        return None


@cache
def _read_once(path: Path, changed: int) -> tuple[dict[str, Any], list[str]]:
    cfg, _ = read_config(path)
    return non_defaults(cfg), fork_of(cfg)
