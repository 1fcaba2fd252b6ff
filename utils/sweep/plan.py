"""What a sweep's file says, and the runs that follow from it; where a run's folder is and how far it came.

A part of :mod:`utils.sweep`, which starts the runs.
"""

import glob
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from utils import build
from utils.config import (
    INCIDENTAL,
    OLD_SWITCHES,
    OPTIONS,
    RepeatedKey,
    UniqueKeyLoader,
    known,
    parse_option,
    read_config,
    shown,
)
from utils.errors import InputError
from utils.run import resume
from utils.run.folder import read_rows
from utils.run.resume import fork_of
from utils.sweep.tables import MEASURES, arm_of

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
SET_HERE = ("name", "save_dir", "seed", "subset_seed", "resume", "fork", "keep_epochs")  # for each run, by the sweep
SUMMARY = {"last epoch": "last", "cross-fitted best": "cross_fitted", "best on the test set": "best"}
DEFAULTS = {key: option.default for key, option in OPTIONS.items() if key not in INCIDENTAL}
# What a part of the file must be, in words.
PAIR = "[arm, another arm]"
CLAIM = (
    "{arm: an arm, published: number or [lowest, highest]} or {pair: [arm, another arm], at_least: number}, with at: "
    "{axis: one of its values} where it is of one point of the axes"
)
WATERFALL = (
    "{start: an arm, steps: {name: {arm: weight, ...}, ...}, end: one of "
    + ", ".join(MEASURES)
    + ", published: number}"
)
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
    compared: dict[str, Any]  # against, pairs, claims, waterfall, choose: see utils.sweep.tables


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
        told = [telling(self.cfg), [self.parent.hash, self.forked_after] if self.parent else None]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self) -> Path | None:
        """Its newest folder with this configuration and beginning, a finished one first; None: it was never started."""
        named = re.compile(re.escape(self.name) + r"_\d{14}(_\d+)?")
        folders = [path for path in self.home.glob(f"{glob.escape(self.name)}_*") if named.fullmatch(path.name)]
        parent = self.parent.folder() if self.parent else None
        if self.parent and parent is None:
            return None
        begun = [parent.name, "ckps", f"epoch_{self.forked_after}.pth.tar"] if parent else []
        folders = [path for path in folders if _told_by(path) == (telling(self.cfg), begun)]
        return max(folders, key=lambda path: (self._ended(path), path.stat().st_mtime_ns), default=None)

    def _ended(self, folder: Path) -> bool:
        rows = rows_of(folder) if summary_of(folder) else []
        return bool(rows) and rows[-1]["epoch"] + 1 == self.cfg.num_epochs

    def finished(self) -> bool:
        folder = self.folder()
        return folder is not None and self._ended(folder)

    def epochs_done(self) -> int:
        folder = self.folder()
        return len(rows_of(folder)) if folder else 0

    def epochs_left(self) -> int:
        return self.cfg.num_epochs - max(self.epochs_done(), self.forked_after)

    def kept(self) -> Path | None:
        """The checkpoint of the parent that it begins with; None where that is not there yet."""
        folder = self.parent.folder()
        path = folder / "ckps" / f"epoch_{self.forked_after}.pth.tar" if folder else None
        return path if path and path.is_file() else None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep's file. Raises :class:`InputError`."""
    if not os.path.isfile(path):  # unlike pathlib's, False for any name that cannot be
        raise InputError(f"{path}: no such sweep (give the path of a YAML file, see config/sweeps/)")
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise InputError(f"{path}: a sweep has arms: {{name: {{option: value, ...}}, ...}}")
    for key, value in content.items():
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}; a sweep has {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise InputError(f"{path}: {key}: must be {IN_WORDS[KEYS[key]]}, not {shown(value)}")
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
        return yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except RepeatedKey as error:
        line = error.problem_mark.line + 1
        raise InputError(f"{path}, line {line}: {error.key} is given twice; keep one") from None
    except Exception as error:  # PyYAML lets through whatever its constructors meet
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def _along(path: Path, axis: str, values: Any) -> list:
    """An axis's values as the configuration will have them: 1e-2, which is text to YAML, is a number."""
    known(axis, f"{path}: axes")
    _check_options(path, "axes", [axis])
    if axis not in OPTIONS:
        raise InputError(f"{path}: axes: {axis} is a switch of the originals; give the option that it stands for")
    if not isinstance(values, list) or not values:
        raise InputError(f"{path}: axes: {axis}: must be a list of values, not {shown(values)}")
    found = []
    for value in values:
        try:
            found.append(parse_option(axis, value))
        except ValueError as error:
            raise InputError(f"{path}: axes: {axis}: {shown(value)} {error}") from None
        if found[-1] in found[:-1]:
            raise InputError(f"{path}: axes: {axis}: {shown(value)} is there twice; keep one")
    return found


def _check_options(path: Path, where: str, options: Iterable[str], axes: Collection[str] = ()) -> None:
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
        raise InputError(f"{path}: {what}: must be a list of different whole numbers >= 0, not {shown(seeds)}")


def _arm(path: Path, content: Mapping, name: str, options: Any, before: Mapping[str, Arm]) -> Arm:
    if not isinstance(name, str) or not re.fullmatch(r"\w+(-\w+)*", name):
        raise InputError(f"{path}: arms: {shown(name)} must be a name of letters, digits and _")
    if options is not None and not isinstance(options, dict):
        raise InputError(f"{path}: {name}: must be a mapping of options, not {shown(options)}")
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
            f"{path}: {name}: fork: must be {{arm: an arm above, epoch: number >= 1}}, not {shown(given)}"
            + f" (above: {', '.join(before) or 'none'})"
        )
    return str(given["arm"]), given["epoch"]


def _compared(path: Path, content: Mapping, arms: Mapping[str, Arm], axes: Mapping[str, list]) -> dict[str, Any]:
    """What is compared, with numbers as numbers; every name in it is an arm's."""
    told = {"against": next(iter(arms)), "pairs": [], "claims": {}, "waterfall": {}, "choose": False}
    told = {key: content.get(key, default) for key, default in told.items()}
    told["pairs"] = [_checked(f"{path}: pairs", _pair, PAIR, pair) for pair in told["pairs"]]
    told["claims"] = {
        str(name): _checked(f"{path}: claims: {name}", partial(_claim, axes=axes), CLAIM, claim)
        for name, claim in told["claims"].items()
    }
    if told["waterfall"]:
        told["waterfall"] = _checked(f"{path}: waterfall", _steps, WATERFALL, told["waterfall"])
    plain = [told["against"], told["waterfall"].get("start"), *(claim.get("arm") for claim in told["claims"].values())]
    terms = _terms(told)
    for name in (*filter(None, plain), *map(arm_of, terms)):
        if name not in arms:
            raise InputError(f"{path}: {name!r} is compared and is no arm; there are {', '.join(arms)}")
    for term in terms:
        if term.partition(".")[1] and term.partition(".")[2] not in MEASURES:
            raise InputError(f"{path}: {term!r}: a term is an arm, or arm.{' or arm.'.join(MEASURES)}")
    return told


def _terms(compared: Mapping[str, Any]) -> list[str]:
    """All that differences are made of: an arm, or ``arm.best`` and the like."""
    of_claims = (claim.get("pair", []) for claim in compared["claims"].values())
    return list(itertools.chain(*compared["pairs"], *of_claims, *compared["waterfall"].get("steps", {}).values()))


def _checked(where: str, parse: Callable[[Any], Any], right: str, given: Any) -> Any:
    """What ``parse`` makes of it; it raises whatever it meets in what is wrong."""
    try:
        return parse(given)
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError):
        raise InputError(f"{where}: must be {right}, not {shown(given)}") from None


def _pair(given: list) -> list[str]:
    first, second = given
    if not isinstance(given, list) or not isinstance(first, str) or not isinstance(second, str) or first == second:
        raise ValueError
    return [first, second]


def _claim(given: Mapping, axes: Mapping[str, list]) -> dict[str, Any]:
    """``at``: the point of the grid that it is of, if it is not of every one."""
    told = {}
    if "at" in given:
        told["at"] = {axis: parse_option(axis, value) for axis, value in given["at"].items()}
        if any(value not in axes.get(axis, []) for axis, value in told["at"].items()):
            raise ValueError
    if given.keys() - {"at"} == {"arm", "published"} and isinstance(given["arm"], str):
        return {"arm": given["arm"], "published": _figure(given["published"])} | told
    if given.keys() - {"at"} == {"pair", "at_least"}:
        return {"pair": _pair(given["pair"]), "at_least": _number(given["at_least"])} | told
    raise ValueError


def _figure(given: Any) -> float | list[float]:
    """A published one: a number, or [lowest, highest] of several."""
    if not isinstance(given, list):
        return _number(given)
    least, most = map(_number, given)
    if least > most:
        raise ValueError
    return [least, most]


def _steps(given: Mapping) -> dict[str, Any]:
    steps = {
        str(name): {str(term): _number(weight) for term, weight in terms.items()}
        for name, terms in given["steps"].items()
    }
    if (
        given.keys() - {"start", "steps", "end", "published"}
        or given["end"] not in MEASURES
        or not steps
        or not all(steps.values())
    ):
        raise ValueError
    published = given.get("published")
    return {
        "start": str(given["start"]),
        "steps": steps,
        "end": given["end"],
        "published": None if published is None else _number(published),
    }


def _number(value: Any) -> float:
    """5e-1 is text to YAML."""
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
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
        if key in OLD_SWITCHES:
            raise InputError(f"command line: {key} is a switch of the originals; give the option that it stands for")
    found: dict[str, Run] = {}
    points = [dict(zip(sweep.axes, point, strict=True)) for point in itertools.product(*sweep.axes.values())]
    order = sorted({seed for arm in sweep.arms.values() for seed in arm.seeds})
    for subset, seed, cell, arm in itertools.product(sweep.subset_seeds, order, points, sweep.arms.values()):
        if seed in arm.seeds:
            run = _run(sweep, arm, cell, seed, subset, home, overrides, found)
            if run.name in found:
                raise InputError(f"{sweep.name}: two runs would be called {run.name}; give other names")
            found[run.name] = run
            _check_held_out(sweep, run)
    _check_overrides(sweep, overrides[::2])
    return list(found.values())


def _check_held_out(sweep: Sweep, run: Run) -> None:
    """Without held-out images there is no accuracy on them to choose by or to compare."""
    told = sweep.compared
    wanted = {
        "choose: True": told["choose"],
        "end: val": told["waterfall"].get("end") == "val",
        f"{run.arm}.val": f"{run.arm}.val" in _terms(told),
    }
    what = next((what for what, is_wanted in wanted.items() if is_wanted), None)
    if what and not run.cfg.val_per_class:
        raise InputError(f"{sweep.name}: {what} needs val_per_class above 0, and {run.arm} has none")


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
        along = "".join(f"_{axis}{short(value)}" for axis, value in cell.items())
        return f"{arm}{along}_seed{seed}" + (f"_subset{subset}" if subset else "")

    keep = sorted({other.fork[1] for other in sweep.arms.values() if other.fork and other.fork[0] == arm.name})
    ours = {"name": named(arm.name), "save_dir": str(home), "seed": seed, "subset_seed": subset}
    told = {**arm.options, **cell, **dict(zip(overrides[::2], overrides[1::2], strict=True))}
    pairs = itertools.chain(*{**told, **ours, "resume": "auto", "keep_epochs": keep}.items())
    try:
        cfg, _ = read_config(arm.cfg, list(pairs))
        build.check(cfg)
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
    other = [key for key in resume.FIXED if cfg[key] != parent.cfg[key]]
    other += ["nc_within"] * ((cfg.nc_within > 0) != (parent.cfg.nc_within > 0))  # whether there are class means
    if other:
        raise InputError(
            f"{arm.name}: a fork goes on with its parent's data and network, and its {other[0]} is another"
        )
    return Run(ours["name"], arm.name, cell, seed, cfg, home, parent, epoch, overridden)


def short(value: Any) -> str:
    """As a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def telling(cfg: Mapping) -> dict[str, Any]:
    """The options that decide a result and are not their default."""
    return {key: cfg[key] for key in OPTIONS if key not in INCIDENTAL and cfg[key] != OPTIONS[key].default}


def rows_of(folder: Path) -> list[dict]:
    """Of ``metrics.jsonl``; none where it is damaged: the run itself will say so."""
    try:
        return read_rows(folder / "metrics.jsonl")
    except InputError:
        return []


def _told_by(folder: Path) -> tuple[dict[str, Any], list[str]] | None:
    """:func:`telling` of a run's ``config.yaml`` and what it was forked from; None where none can be read."""
    try:
        return _read_once(folder / "config.yaml", (folder / "config.yaml").stat().st_mtime_ns)
    except (OSError, InputError):
        return None


@cache
def _read_once(path: Path, changed: int) -> tuple[dict[str, Any], list[str]]:
    cfg, _ = read_config(path)
    return telling(cfg), fork_of(cfg)


def summary_of(folder: Path) -> dict[str, Any] | None:
    """``summary.json``; None where it is not there or damaged: the run goes on for no further epoch and writes it."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in SUMMARY)
    return found if whole and all("top1" in found[key] for key in SUMMARY) else None
