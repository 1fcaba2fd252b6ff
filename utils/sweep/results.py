"""Results of a sweep's runs: ``results.json``, tables and figures in its folder, and what is published of them."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import InputError
from utils.files import write_text
from utils.report import plots
from utils.run.folder import read_rows
from utils.run.summary import AVERAGED
from utils.sweep.contrasts import Results, cells, independent, values, waterfall
from utils.sweep.intervals import estimate
from utils.sweep.plan import DEFAULTS, SUMMARY, Run, non_defaults, rows_of, short, summary_of
from utils.sweep.spec import Sweep
from utils.sweep.tables import BEGIN, END, PAGE, fill_page, latex, markdown, places

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = Path("config/sweeps")  # under ROOT
PUBLISHED = SWEEPS / "results"
ENGINE = "engine_"  # and a sweep's name: what utils.bench.engine publishes
RESULTS = {  # the keys of results.json
    *("sweep", "images", "overridden", "arms", "seeds", "subset_seeds", "axes", "against", "pairs", "claims"),
    *("waterfall", "choose", "planned", "failed", "defaults", "runs"),
}
# What a run's row takes from starts.jsonl, with the values of a run that has none.
ORIGIN = {"commit": "", "device": "", "cpu": "", "threads": None, "processes": None, "versions": {}, "data": ""}


def results_of(
    sweep: Sweep, runs: Sequence[Run], failed: Mapping[str, str] | None = None, images: str | None = None
) -> dict[str, Any]:
    """The content of ``results.json``: what is compared, and one row for every finished run.

    ``images``: what they are, in words. It and ``failed`` default to those of an earlier ``results.json``.
    """
    before = {"images": "", "failed": {}}
    with contextlib.suppress(OSError, ValueError, TypeError):  # a damaged file is replaced
        before |= json.loads((runs[0].home / "results.json").read_text(encoding="utf-8"))
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
        "defaults": DEFAULTS,  # of the options that a run does not list
        "runs": rows,
    }


def _row(run: Run) -> dict[str, Any]:
    """One run: what it was, where it ran, and its numbers (top-1, groups and ECE in percent)."""
    folder = run.folder()
    rows, starts, summary = rows_of(folder), read_rows(folder / "starts.jsonl"), summary_of(folder)
    origin = ORIGIN | (starts[-1] if starts else {})
    if any(start["data"] != origin["data"] for start in starts):
        origin["data"] = ""  # of no single set of images, and so compared with nothing
    held_out = {"val": {"top1": rows[-1]["val"]["top1"]}} if "val" in rows[-1] else {}
    return {
        "run": run.name,
        "arm": run.arm,
        "axes": run.cell,
        "seed": run.seed,
        "subset_seed": run.cfg.subset_seed,
        "hash": run.hash,
        "options": non_defaults(run.cfg),
        "forked": {"run": run.parent.name, "epoch": run.forked_after} if run.parent else None,
        **{key: origin[key] for key in ORIGIN},
        "starts": [{key: start[key] for key in ("epoch", "step", "commit", "date")} for start in starts],
        "epochs": rows[-1]["epoch"] + 1,
        "seconds": round(run.seconds(), 1),
        **{ours: summary[theirs] for theirs, ours in SUMMARY.items()},
        **held_out,
        **({"ema": summary[AVERAGED]} if AVERAGED in summary else {}),
    }


def write_results(sweep: Sweep, runs: Sequence[Run], failed: Mapping[str, str], images: str | None) -> dict[str, Any]:
    """Write ``results.json``, the tables and the figures into the sweep's folder; return the results."""
    results, home = results_of(sweep, runs, failed, images), runs[0].home
    write_text(home / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(home / "table.md", markdown(results))
    write_text(home / "table.tex", latex(results))
    for name, figure in figures(results):
        plots.save_png(figure, home / f"{name}.png")
    return results


def figures(results: Results) -> Iterator[tuple[str, plots.Figure]]:
    """(name, figure): the arms, over the imbalance ratio if that is an axis, and the waterfall if there is one."""
    points = cells(results)
    for point in [] if "imb_factor" in results["axes"] else points:
        yield _named("runs", point), plots.runs_figure(_single_runs(results, point))
    rest = [{key: value for key, value in point.items() if key != "imb_factor"} for point in points]
    if "imb_factor" in results["axes"]:
        for number, point in enumerate(rest):
            curves = _over_imbalance(results, point) if point not in rest[:number] else {}
            if curves:
                yield _named("imbalance", point), plots.imbalance_figure(curves)
    for point in points if results["waterfall"] else []:
        if found := waterfall(results, point):
            bars = [(bar.name, bar.change.mean, bar.change.low, bar.change.high) for bar in found.bars()]
            yield _named("waterfall", point), plots.waterfall_figure(bars, results["waterfall"].get("published"))


def _over_imbalance(results: Results, point: Mapping[str, Any]) -> dict[str, dict[str, list]]:
    """Arm -> its curve, for :func:`utils.report.plots.imbalance_figure`."""
    factors = [factor for factor in results["axes"]["imb_factor"] if factor]  # None: the data as they are
    curves = {}
    for arm in results["arms"]:
        top1 = {factor: values(results, arm, {**point, "imb_factor": factor}) for factor in factors}
        found = {1 / factor: estimate(independent(by_seeds)) for factor, by_seeds in top1.items() if by_seeds}
        if found:
            means, lows, highs = ([getattr(e, key) for e in found.values()] for key in ("mean", "low", "high"))
            curves[arm] = {"ratios": list(found), "means": means, "lows": lows, "highs": highs}
    return curves


def _single_runs(results: Results, point: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arm -> its runs, for :func:`utils.report.plots.runs_figure`."""
    arms, claims = {}, [claim for claim in results["claims"].values() if claim.get("at", {}).items() <= point.items()]
    for arm in results["arms"]:
        if found := values(results, arm, point):
            top1 = estimate(independent(found))
            published = [np.atleast_1d(claim["published"]) for claim in claims if claim.get("arm") == arm]
            interval = {"mean": top1.mean, "low": top1.low, "high": top1.high}
            arms[arm] = {"runs": list(found.values()), **interval, "published": np.concatenate([[], *published])}
    return arms


def _named(kind: str, point: Mapping[str, Any]) -> str:
    return "_".join([kind, *(f"{key}{short(value)}" for key, value in point.items())])


def publish(sweep: Sweep, runs: Sequence[Run], path: Path, images: str | None, root: Path = ROOT) -> int:
    """Copy the results of finished runs beside the sweep's file, and all published tables into the sweeps' page.

    Runs that were published before and lie elsewhere stay, as long as the sweep still has them unchanged.
    """
    if path.resolve().parent != (root / SWEEPS).resolve():
        raise InputError(f"{path}: only sweeps in {SWEEPS} are published")
    results, before = results_of(sweep, runs, images=images), published(sweep.name, root)
    if before:
        _add_earlier(results, before, runs)
    if not results["runs"]:
        raise InputError(f"{runs[0].home}: has no finished run of {sweep.name}; there is nothing to publish")
    return write_published(results, root)


def write_published(results: Results, root: Path = ROOT) -> int:
    """Write results and their figures beside the sweeps, and all published tables into the page."""
    _check_places(results["sweep"], root)
    target = root / PUBLISHED / f"{results['sweep']}.json"
    target.parent.mkdir(exist_ok=True)
    write_text(target, json.dumps(results, indent=1) + "\n")
    for name, figure in figures(results):
        plots.save_png(figure, target.with_name(f"{target.stem}_{name}.png"))
    write_text(root / PAGE, filled_page(root))
    print(f"{target}: {len(results['runs'])} of {results['planned']} runs; {PAGE} is up to date")
    return 0


def _add_earlier(results: dict[str, Any], before: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Add published runs that are not here; with other defaults they were other runs."""
    here, planned = {row["run"] for row in results["runs"]}, {run.name: run.hash for run in runs}
    order = list(planned)
    same = all(before["defaults"][key] == DEFAULTS[key] for key in before["defaults"].keys() & DEFAULTS.keys())
    rows = before["runs"] if same else []
    earlier = [row for row in rows if row["run"] not in here and planned.get(row["run"]) == row["hash"]]
    results["images"] = results["images"] or before["images"]
    results["runs"] = sorted([*results["runs"], *earlier], key=lambda row: order.index(row["run"]))
    failed, ended = before["failed"] | results["failed"], {row["run"] for row in results["runs"]}
    results["failed"] = {name: why for name, why in failed.items() if name in planned and name not in ended}


def _check_places(name: str, root: Path) -> None:
    """The page has a place for the sweep's tables, and for no tables of a sweep that does not exist."""
    found = places((root / PAGE).read_text(encoding="utf-8"))
    for place in found:
        if not (root / SWEEPS / f"{place.removeprefix(ENGINE)}.yaml").is_file():
            raise InputError(f"{PAGE}: has a place for results of {place}, which is no sweep in {SWEEPS}")
    if name not in found:
        raise InputError(
            f"{PAGE}: has no place for the tables; put the lines {BEGIN}{name} --> and {END} where they belong"
        )


def filled_page(root: Path = ROOT) -> str:
    """The sweeps' page with the tables and figures of everything that is published. Raises :class:`InputError`."""

    def pictures(name: str) -> list[str]:
        return sorted(str(file.relative_to(root / SWEEPS)) for file in (root / PUBLISHED).glob(f"{name}_*.png"))

    return fill_page((root / PAGE).read_text(encoding="utf-8"), lambda name: published(name, root), pictures)


def published(name: str, root: Path = ROOT) -> dict[str, Any] | None:
    """The published results of a sweep, None if there are none. Raises :class:`InputError`."""
    path = root / PUBLISHED / f"{name}.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read; publish that sweep, or take the file out of git ({error})") from None
    if not isinstance(found, dict) or not found.keys() >= RESULTS:
        raise InputError(f"{path}: does not hold a sweep's results; take the file out of git")
    return found
