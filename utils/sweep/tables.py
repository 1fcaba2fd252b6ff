"""Tables, verdicts on claims, and the page that shows them, all from the content of ``results.json`` alone.

So a published table can be made again from the file beside it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from utils import table
from utils.errors import InputError
from utils.metrics import GROUPS
from utils.sweep import contrasts
from utils.sweep.contrasts import MEASURES, Results, Row
from utils.sweep.intervals import EQUIVALENCE_LEVEL, POWER, Estimate, detectable, estimate, prediction_interval
from utils.table import Table

PAGE = Path("config/sweeps/README.md")  # of the project: where the published tables stand
PAIRS = (3, 5, 10)  # whose power the tables show
BEGIN, END = "<!-- results of ", "<!-- end of results -->"
MARKS = re.compile(rf"^({BEGIN}(?P<name>[\w-]+) -->\n).*?^{END}$", re.DOTALL | re.MULTILINE)


def tables(results: Results) -> list[Table]:
    """For every point of the grid: the arms, their paired differences, the waterfall."""
    makers = (arm_table, pair_table, waterfall_table)
    return [made for cell in contrasts.cells(results) for make in makers if (made := make(results, cell))]


def arm_table(results: Results, cell: Mapping) -> Table:
    """One row per arm that has runs: top-1 of the last epoch first, with its interval."""
    measures = [m for m in MEASURES if any(m in row for row in results["runs"]) and m != "last"]
    columns = [*((measure, "top1") for measure in measures), *(("last", key) for key in (*GROUPS, "ece"))]
    rows = []
    for arm in results["arms"]:
        if found := contrasts.values(results, arm, cell):
            top1 = estimate(contrasts.independent(found))
            others = [contrasts.values(results, arm, cell, *column) for column in columns]
            spreads = [_spread(estimate(contrasts.independent(other))) if other else "-" for other in others]
            rows.append([arm, str(top1.count), _spread(top1), _interval(top1), *spreads])
    head = ["arm", "n", "top-1, last epoch", "95 % interval", *(MEASURES[m] for m in measures), *GROUPS, "ECE"]
    over = "runs" if len(results["subset_seeds"]) == 1 else "cuts"
    return Table(head, rows, f"Arms{_at(cell)}: mean ± deviation over n {over}, in percent")


def pair_table(results: Results, cell: Mapping) -> Table | None:
    """Paired differences of the last epoch's top-1, bold where the interval excludes 0; None where nothing pairs.

    Beside them their deviation, and the smallest difference that ``PAIRS`` pairs would show.
    """
    rows, bold = [], set()
    for first, second in contrasts.pairs(results):
        if change := contrasts.estimated(results, {first: 1.0, second: -1.0}, cell):
            bold |= {(len(rows), column) for column in (0, 2, 3)} if change.excludes_zero else set()
            interval = _interval(change, signed=True)
            shown = [change.deviation, *(change.deviation and detectable(change.deviation, pairs) for pairs in PAIRS)]
            cells = [f"{value:.2f}" if value else "-" for value in shown]
            rows.append([f"{first} - {second}", str(change.count), f"{change.mean:+.2f}", interval, *cells])
    head = ["difference", "n", "mean", "95 % interval", "deviation", *(f"{pairs} pairs" for pairs in PAIRS)]
    caption = (
        f"Paired differences{_at(cell)}, top-1 of the last epoch, in points; bold: the interval excludes 0; last "
        f"columns: the smallest difference that so many pairs show with power {POWER:g}"
    )
    return Table(head, rows, caption, bold) if rows else None


def waterfall_table(results: Results, cell: Mapping) -> Table | None:
    """None for a sweep without a waterfall, or before its first step was run."""
    found = contrasts.waterfall(results, cell) if results["waterfall"] else None
    if found is None:
        return None
    rows = [[bar.name, f"{bar.change.mean:+.2f}", _interval(bar.change, signed=True)] for bar in found.bars()]
    for number, end in ((0, found.start), (-1, found.end)):
        rows[number] = [end.name, f"{end.change.mean:.2f}", _interval(end.change)]
    rows += [[name, "too few runs", "-"] for name in found.missing]
    published = results["waterfall"].get("published")
    rows += [["published", f"{published:g}", "-"]] if published is not None else []
    caption = (
        f"From {found.start.name} to the best of {found.tried} arms{_at(cell)}, over the "
        f"{found.start.change.count} seeds that all steps have (paired differences and claims use all that a pair has)"
    )
    return Table(["step", "top-1", "95 % interval"], rows, caption)


def claims(results: Results) -> list[str]:
    """The sweep's claims, each with its verdict, its numbers, and its rule as it was written before the runs."""
    lines = []
    for cell in contrasts.cells(results):
        for name, claim in results["claims"].items():
            if all(cell.get(axis) == value for axis, value in claim.get("at", {}).items()):
                judge = _reproduced if "arm" in claim else _equivalent if "within" in claim else _matters
                verdict, why = judge(results, claim, cell)
                lines.append(f"{name}{_at(cell)}: {verdict} ({why})")
    return lines


def _reproduced(results: Results, claim: Mapping, cell: Mapping) -> tuple[str, str]:
    arm, published = claim["arm"], claim["published"]
    found = list(contrasts.values(results, arm, cell).values())
    least, most = published if isinstance(published, list) else (published, published)
    figure = f"{least:g} lies" if least == most else f"one of {least:g} to {most:g} lies"
    rule = f"rule: {figure} in the 95 % prediction interval of one run of {arm}"
    if len(found) < 2:
        return "not decided", f"{_counted(len(found), 'run')}; {rule}"
    low, high = prediction_interval(found)
    count = _of(len(found), len(results["seeds"][arm]), results, "run")
    verdict = "yes" if low <= most and least <= high else "no"
    return verdict, f"[{low:.2f}, {high:.2f}], {count}; {rule}"


def _matters(results: Results, claim: Mapping, cell: Mapping) -> tuple[str, str]:
    (first, second), least = claim["pair"], claim["at_least"]
    found, count = _paired(results, claim, cell)
    rule = f"rule: the 95 % interval of {first} - {second} excludes 0 and the mean is at least {least:g} points"
    if len(found) < 2:
        return "not decided", f"{count}; {rule}"
    change = estimate(found)
    verdict = "yes" if change.excludes_zero and change.mean >= least else "no"
    return verdict, f"{change.mean:+.2f} {_interval(change, signed=True)}, {count}; {rule}"


def _equivalent(results: Results, claim: Mapping, cell: Mapping) -> tuple[str, str]:
    (first, second), margin = claim["pair"], claim["within"]
    found, count = _paired(results, claim, cell)
    rule = f"rule: the 90 % interval of {first} - {second} lies between -{margin:g} and +{margin:g}"
    if len(found) < 2:
        return "not decided", f"{count}; {rule}"
    change = estimate(found, EQUIVALENCE_LEVEL)
    verdict = "yes" if change.deviation and max(-change.low, change.high) < margin else "not shown"
    return verdict, f"{change.mean:+.2f} {_interval(change, signed=True)}, {count}; {rule}"


def _paired(results: Results, claim: Mapping, cell: Mapping) -> tuple[list[float], str]:
    """The differences that an interval is over, and how many pairs they are, in words."""
    first, second = claim["pair"]
    found = contrasts.contrast(results, {first: 1.0, second: -1.0}, cell)
    if len(found) < 2:
        return list(found.values()), _counted(len(found), "pair")
    seeds = set.intersection(*(set(results["seeds"][contrasts.arm_of(term)]) for term in claim["pair"]))
    return contrasts.independent(found), _of(len(found), len(seeds), results, "pair")


def _of(count: int, seeds: int, results: Results, what: str) -> str:
    """The count, and how many were planned if that is more: a verdict on less is not the last word."""
    planned = seeds * len(results["subset_seeds"])
    return _counted(count, what) if count >= planned else f"only {count} of {_counted(planned, what)} so far"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def choice(results: Results) -> list[str]:
    """The arm that held-out images choose, and out of how many, if the sweep has ``choose``."""
    lines = []
    for cell in contrasts.cells(results) if results["choose"] else []:
        arms = results["arms"]
        seeds = contrasts.common_seeds(results, [f"{arm}.val" for arm in arms], cell)
        planned = min(len(results["seeds"][arm]) for arm in arms) * len(results["subset_seeds"])
        if len(seeds) < planned:
            have = f"{len(seeds)} of {planned} seeds of all {len(arms)} candidates"
            lines.append(f"chosen{_at(cell)} by held-out training images: not decided ({have})")
            continue
        means = {arm: contrasts.estimated(results, {f"{arm}.val": 1.0}, cell, seeds) for arm in arms}
        best = max(means, key=lambda arm: means[arm].mean)
        lines.append(
            f"chosen{_at(cell)} by the last epoch's top-1 on held-out training images: {best} "
            f"({_spread(means[best])}, {len(seeds)} seeds), out of {len(means)} candidates"
        )
    return lines


def _spread(found: Estimate) -> str:
    return f"{found.mean:.2f}" + ("" if found.deviation is None else f" ± {found.deviation:.2f}")


def _interval(found: Estimate, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return "-" if found.low is None else f"[{found.low:{sign}.2f}, {found.high:{sign}.2f}]"


def _at(cell: Mapping) -> str:
    return "".join(f", {axis} {value}" for axis, value in cell.items())


def markdown(results: Results) -> str:
    """Where the numbers come from, then all tables and verdicts."""
    lines = [*claims(results), *choice(results), *unrecorded(results)]
    lines += [f"failed: {name}: {why}" for name, why in results["failed"].items()]
    blocks = [_provenance(results), *map(table.markdown, tables(results)), "\n".join(f"* {line}" for line in lines)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def latex(results: Results) -> str:
    """The tables for a paper: needs ``\\usepackage{booktabs}``."""
    return "\n".join(map(table.latex, tables(results)))


def _provenance(results: Results) -> str:
    rows = results["runs"]

    def several(of: Callable[[Row], str]) -> str:
        return ", ".join(sorted({of(row) for row in rows if of(row)})) or "-"

    hours = sum(row["seconds"] for row in rows) / 3600
    return (
        f"Sweep `{results['sweep']}`: {len(rows)} of {results['planned']} runs"
        + (f", on {results['images']}" if results["images"] else "")
        + "".join(f", {key} {value}" for key, value in results["overridden"].items())
        + f". Device: {several(lambda row: row['cpu'] if row['device'] == 'cpu' else row['device'])}; "
        f"torch {several(lambda row: row['versions'].get('torch', ''))}; "
        f"commit {', '.join(sorted({_short(start['commit']) for row in rows for start in row['starts']})) or '-'}; "
        f"{hours:.1f} hours of training."
    )


def _short(commit: str) -> str:
    """With a mark where the source was not as committed."""
    name, _, dirty = commit.partition("-")
    return (name[:10] or "unknown") + f"-{dirty}" * bool(dirty)


def unrecorded(results: Results) -> list[str]:
    """Runs whose first epochs have no record of commit and machine."""
    lines = []
    for row in results["runs"]:
        first = row["starts"][0]["epoch"] if row["starts"] else row["epochs"]
        begun = row["forked"]["epoch"] if row["forked"] else 0
        if first > begun:
            epochs = f"epochs {begun} to {first - 1}"
            lines.append(f"{row['run']}: commit and machine of {epochs} are not known; starts were not recorded then")
    return lines


def fill_page(
    text: str, read: Callable[[str], Results | None], pictures: Callable[[str], Iterable[str]] = lambda name: ()
) -> str:
    """``text`` with everything between ``<!-- results of NAME -->`` and ``<!-- end of results -->`` made again.

    ``read`` returns the results of a name, or None if nothing of it is published; ``pictures`` the files, relative to
    the page, that are shown with them. Raises :class:`InputError`.
    """
    places, lines = len(MARKS.findall(text)), text.splitlines()
    if any(sum(line.startswith(mark) for line in lines) != places for mark in (BEGIN, END)):
        raise InputError(f"{PAGE}: tables stand between lines {BEGIN}NAME --> and {END}; one of these lines is missing")

    def made(found: re.Match) -> str:
        results = read(found["name"])
        shown = "".join(f"![{Path(file).stem}]({file})\n\n" for file in pictures(found["name"])) if results else ""
        return found[1] + (f"\n{shown}{markdown(results)}\n" if results else "") + END

    return MARKS.sub(made, text)


def places(text: str) -> list[str]:
    """The names of the sweeps whose tables a page has a place for."""
    return [found["name"] for found in MARKS.finditer(text)]
