"""What a sweep's results say: means with intervals, paired differences, claims that were written before the runs.

``results`` is what ``results.json`` holds (see :func:`utils.sweep.runner.results_of`); everything here follows from it
alone, so a table in a README can be made again from the file beside it. Accuracies are in percent, differences in
points.

Two rows are compared by their paired difference: over the seeds (and subset seeds) that both have, on the same images.
Runs that do not say what they were trained on (those of older versions) have means, and are compared with nothing.
Where there are several subset seeds, the runs of one cut are not independent: intervals are over the cuts' means then.
Intervals are per comparison, and not widened for their number.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from utils.errors import InputError
from utils.metrics import GROUPS
from utils.sweep.intervals import Estimate, estimate, prediction_interval

MEASURES = {"last": "last epoch", "cross_fitted": "cross-fitted", "best": "best on the test set", "val": "held-out"}
BEGIN, END = "<!-- results of ", "<!-- end of results -->"
MARKS = re.compile(rf"^({BEGIN}(?P<name>[\w-]+) -->\n).*?^{END}$", re.DOTALL | re.MULTILINE)

Row = Mapping[str, Any]
Results = Mapping[str, Any]
Seeds = tuple[int, int]  # seed, subset seed


class Cell(NamedTuple):
    text: str
    bold: bool = False


class Table(NamedTuple):
    caption: str
    head: list[str]
    rows: list[list[Cell]]


class Bar(NamedTuple):
    """One step of a waterfall."""

    name: str
    change: Estimate


class Waterfall(NamedTuple):
    """From one arm's accuracy to the best arm's, on the seeds that all steps have."""

    start: Bar
    steps: list[Bar]  # the last one is the remainder
    end: Bar
    tried: int  # arms that the best one is the best of
    missing: list[str]  # steps that were not run yet, or for too few seeds

    def bars(self) -> list[Bar]:
        return [self.start, *self.steps, self.end]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def cells(results: Results) -> list[dict]:
    """The points of the grid that have runs, in the order of the axes' values; a single empty one without axes."""
    points = [{}]
    for axis, along in results["axes"].items():
        points = [point | {axis: value} for point in points for value in along]
    return [point for point in points if any(row["axes"] == point for row in results["runs"])]


def values(results: Results, arm: str, cell: Mapping, measure: str = "last", key: str = "top1") -> dict[Seeds, float]:
    """Top-1 (or what ``key`` says) in percent of an arm's runs at a point of the grid, by their seeds."""
    rows = [row for row in results["runs"] if row["arm"] == arm and row["axes"] == cell]
    return {(row["seed"], row["subset_seed"]): row[measure][key] for row in rows if key in row.get(measure, {})}


def contrast(
    results: Results, terms: Mapping[str, float], cell: Mapping, seeds: Sequence[Seeds] | None = None
) -> dict[Seeds, float]:
    """``sum of coefficient * top-1`` over the terms, for each of ``seeds``, by default those that all terms have.

    A term is an arm, or ``arm.best`` and the like for another measure than the last epoch's. Seeds whose runs were not
    trained on the same images are left out.
    """
    parts = {term: _term_values(results, term, cell) for term in terms}
    if seeds is None:
        seeds = _common_seeds(results, terms, cell)
    return {key: sum(weight * parts[term][key] for term, weight in terms.items()) for key in seeds}


def independent(by_seeds: Mapping[Seeds, float]) -> list[float]:
    """What an interval is over: the runs where they share one cut, else the cuts' means."""
    cuts: dict[int, list[float]] = {}
    for (_, cut), value in by_seeds.items():
        cuts.setdefault(cut, []).append(value)
    return list(by_seeds.values()) if len(cuts) == 1 else [_mean(found) for found in cuts.values()]


def arm_of(term: str) -> str:
    """See :func:`contrast`."""
    return term.partition(".")[0]


def _term_values(results: Results, term: str, cell: Mapping) -> dict[Seeds, float]:
    return values(results, arm_of(term), cell, term.partition(".")[2] or "last")


def _common_seeds(results: Results, terms: Collection[str], cell: Mapping) -> list[Seeds]:
    """Those that all terms have, on the same images."""
    shared = set.intersection(*(set(_term_values(results, term, cell)) for term in terms))
    arms = {arm_of(term) for term in terms}
    images: dict[Seeds, set[str]] = {key: set() for key in shared}
    for row in results["runs"]:
        key = row["seed"], row["subset_seed"]
        if row["arm"] in arms and row["axes"] == cell and key in shared:
            images[key].add(row["data"])
    return sorted(key for key, found in images.items() if len(found) == 1 and "" not in found)


def pairs(results: Results) -> list[tuple[str, str]]:
    """What is compared: every arm with the one that the sweep names, if it does, and the pairs that it asks for."""
    against = results["against"]
    usual = [(arm, against) for arm in results["arms"] if arm != against] if against else []
    return list(dict.fromkeys([*usual, *map(tuple, results["pairs"])]))


def waterfall(results: Results, cell: Mapping) -> Waterfall | None:
    """The steps that the sweep's ``waterfall`` names, over the seeds that all of them have; None where none was run.

    A step that would leave fewer than two seeds of several is missing. The end is the arm with the highest mean at the
    last epoch, of all arms that have these seeds, measured as ``end`` says; the remainder is what the steps, added up,
    leave of the way to it.
    """
    plan, end = results["waterfall"], f".{results['waterfall']['end']}"
    start = {plan["start"]: 1.0}
    terms, have = {*start, plan["start"] + end}, {}
    seeds = _common_seeds(results, terms, cell)
    for name, step in plan["steps"].items():
        left = _common_seeds(results, [*terms, *step], cell)
        if len(left) >= max(1, min(2, len(seeds))):
            terms, seeds, have[name] = {*terms, *step}, left, step
    if not have:
        return None
    tried = [
        arm for arm in results["arms"] if len(_shared(results, [*terms, arm, arm + end], cell, seeds)) == len(seeds)
    ]
    best = max(tried, key=lambda arm: _mean(contrast(results, {arm: 1.0}, cell, seeds).values()))
    rest = {best + end: 1.0}
    for step in (start, *have.values()):
        for term, weight in step.items():
            rest[term] = rest.get(term, 0.0) - weight

    def bar(name: str, terms: Mapping[str, float]) -> Bar:
        return Bar(name, estimate(independent(contrast(results, terms, cell, seeds))))

    steps = [*(bar(name, step) for name, step in have.items()), bar("remainder", rest)]
    final = bar(f"{best}, {MEASURES[plan['end']]}", {best + end: 1.0})
    missing = [name for name in plan["steps"] if name not in have]
    return Waterfall(bar(plan["start"], start), steps, final, len(tried), missing)


def _shared(results: Results, terms: Collection[str], cell: Mapping, seeds: Sequence[Seeds]) -> set[Seeds]:
    return set(_common_seeds(results, terms, cell)) & set(seeds)


def _mean(numbers: Collection[float]) -> float:
    return sum(numbers) / len(numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def tables(results: Results) -> list[Table]:
    """One table of arms and one of paired differences for every point of the grid, then the waterfall's."""
    found = []
    for cell in cells(results):
        found.append(arm_table(results, cell))
        found += [table for table in (pair_table(results, cell), waterfall_table(results, cell)) if table]
    return found


def arm_table(results: Results, cell: Mapping) -> Table:
    """One row per arm that has runs; top-1 of the last epoch first, with its interval."""
    measures = [m for m in MEASURES if any(m in row for row in results["runs"]) and m != "last"]
    head = ["arm", "n", "top-1, last epoch", "95 % interval", *(MEASURES[m] for m in measures), *GROUPS, "ECE"]
    rows = []
    for arm in results["arms"]:
        if not values(results, arm, cell):
            continue
        found = estimate(independent(values(results, arm, cell)))
        others = [independent(values(results, arm, cell, measure)) for measure in measures]
        parts = [independent(values(results, arm, cell, "last", key)) for key in (*GROUPS, "ece")]
        shown = [arm, str(found.count), _spread(found), _interval(found)]
        shown += [_spread(estimate(part)) if part else "-" for part in (*others, *parts)]
        rows.append([Cell(text) for text in shown])
    over = "runs" if len(results["subset_seeds"]) == 1 else "cuts"
    return Table(f"Arms{_at(cell)}: mean ± deviation over n {over}, in percent", head, rows)


def pair_table(results: Results, cell: Mapping) -> Table | None:
    """Paired differences of the last epoch's top-1, bold where the interval excludes 0; None where nothing pairs."""
    rows = []
    for first, second in pairs(results):
        found = contrast(results, {first: 1.0, second: -1.0}, cell)
        if found:
            change = estimate(independent(found))
            bold = change.excludes_zero
            shown = (_signed(change.mean), _interval(change, signed=True))
            name, count = Cell(f"{first} - {second}", bold), Cell(str(change.count))
            rows.append([name, count, *(Cell(text, bold) for text in shown)])
    caption = f"Paired differences{_at(cell)}, top-1 of the last epoch, in points; bold: the interval excludes 0"
    return Table(caption, ["difference", "n", "mean", "95 % interval"], rows) if rows else None


def waterfall_table(results: Results, cell: Mapping) -> Table | None:
    """None where the sweep has no waterfall, or none yet."""
    found = waterfall(results, cell) if results["waterfall"] else None
    if found is None:
        return None
    rows = [[bar.name, _signed(bar.change.mean), _interval(bar.change, signed=True)] for bar in found.bars()]
    for number, whole in ((0, found.start), (-1, found.end)):
        rows[number] = [whole.name, f"{whole.change.mean:.2f}", _interval(whole.change)]
    rows += [[name, "too few runs", "-"] for name in found.missing]
    published = results["waterfall"].get("published")
    rows += [["published", f"{published:g}", "-"]] if published is not None else []
    caption = (
        f"From {found.start.name} to the best of {found.tried} arms{_at(cell)}, over the "
        f"{found.start.change.count} seeds that all steps have (paired differences and claims use all that a pair has)"
    )
    return Table(caption, ["step", "top-1", "95 % interval"], [[Cell(text) for text in row] for row in rows])


def claims(results: Results) -> list[str]:
    """The sweep's claims, each with its verdict, its numbers, and its rule as it was written before the runs."""
    lines = []
    for cell in cells(results):
        for name, claim in results["claims"].items():
            if any(cell.get(axis) != value for axis, value in claim.get("at", {}).items()):
                continue
            verdict, why = _reproduced(results, claim, cell) if "arm" in claim else _matters(results, claim, cell)
            lines.append(f"{name}{_at(cell)}: {verdict} ({why})")
    return lines


def _reproduced(results: Results, claim: Mapping, cell: Mapping) -> tuple[str, str]:
    found = list(values(results, claim["arm"], cell).values())
    interval = prediction_interval(found) if found else None
    least, most = published_range(claim["published"])
    figure = f"{least:g} lies" if least == most else f"one of {least:g} to {most:g} lies"
    rule = f"rule: {figure} in the 95 % prediction interval of one run of {claim['arm']}"
    if interval is None:
        return "not decided", f"{_counted(len(found), 'run')}; {rule}"
    low, high = interval
    count = _of(len(found), len(results["seeds"][claim["arm"]]), results, "run")
    return _word(low <= most and least <= high), f"[{low:.2f}, {high:.2f}], {count}; {rule}"


def published_range(figure: float | Sequence[float]) -> tuple[float, float]:
    """A published figure is a number, or [lowest, highest] of several. Raises ``ValueError`` and ``TypeError``."""
    least, most = figure if isinstance(figure, list) else (figure, figure)
    return float(least), float(most)


def _matters(results: Results, claim: Mapping, cell: Mapping) -> tuple[str, str]:
    first, second = claim["pair"]
    found = contrast(results, {first: 1.0, second: -1.0}, cell)
    at_least = f"the mean is at least {claim['at_least']:g} points"
    rule = f"rule: the 95 % interval of {first} - {second} excludes 0 and {at_least}"
    if len(found) < 2:
        return "not decided", f"{_counted(len(found), 'pair')}; {rule}"
    change = estimate(independent(found))
    verdict = change.excludes_zero and change.mean >= claim["at_least"]
    seeds = set.intersection(*(set(results["seeds"][arm_of(term)]) for term in claim["pair"]))
    count = _of(len(found), len(seeds), results, "pair")
    return _word(verdict), f"{_signed(change.mean)} {_interval(change, signed=True)}, {count}; {rule}"


def _of(count: int, seeds: int, results: Results, what: str) -> str:
    """How many there are; with how many were planned, where that is more: a verdict on less is not the last word."""
    planned = seeds * len(results["subset_seeds"])
    return _counted(count, what) if count >= planned else f"only {count} of {_counted(planned, what)} so far"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def choice(results: Results) -> list[str]:
    """Which arm the held-out images choose, where the sweep asks for it; on how many candidates."""
    lines = []
    for cell in cells(results) if results["choose"] else []:
        candidates = results["arms"]
        seeds = _common_seeds(results, [f"{arm}.val" for arm in candidates], cell)
        planned = min(len(results["seeds"][arm]) for arm in candidates) * len(results["subset_seeds"])
        if len(seeds) < planned:
            have = f"{len(seeds)} of {planned} seeds of all {len(candidates)} candidates"
            lines.append(f"chosen{_at(cell)} by held-out training images: not decided ({have})")
            continue
        means = {arm: estimate(independent(contrast(results, {f"{arm}.val": 1.0}, cell, seeds))) for arm in candidates}
        best = max(means, key=lambda arm: means[arm].mean)
        lines.append(
            f"chosen{_at(cell)} by the last epoch's top-1 on held-out training images: {best} "
            f"({_spread(means[best])}, {len(seeds)} seeds), out of {len(means)} candidates"
        )
    return lines


def _word(verdict: bool) -> str:
    return "yes" if verdict else "no"


def _spread(found: Estimate) -> str:
    return f"{found.mean:.2f}" + ("" if found.deviation is None else f" ± {found.deviation:.2f}")


def _interval(found: Estimate, signed: bool = False) -> str:
    if found.low is None:
        return "-"
    return f"[{_signed(found.low)}, {_signed(found.high)}]" if signed else f"[{found.low:.2f}, {found.high:.2f}]"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _at(cell: Mapping) -> str:
    return "".join(f", {axis} {value}" for axis, value in cell.items())


# ---------------------------------------------------------------------------------------------------------------------
# On paper


def markdown(results: Results) -> str:
    """Everything above as Markdown, with what the numbers come from."""
    blocks = [_provenance(results)]
    for caption, head, rows in tables(results):
        lines = [head, ["---"] * len(head), *([_marked(cell) for cell in row] for row in rows)]
        blocks.append(f"{caption}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    said = [*claims(results), *choice(results), *unrecorded(results)]
    said += [f"failed: {name}: {why}" for name, why in results["failed"].items()]
    blocks += ["\n".join(f"* {line}" for line in said)] * bool(said)
    return "\n\n".join(blocks) + "\n"


def _marked(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|")
    return f"**{text}**" if cell.bold else text


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
    """Runs of whose first epochs nothing says by which commit and on which machine they were trained."""
    lines = []
    for row in results["runs"]:
        first = row["starts"][0]["epoch"] if row["starts"] else row["epochs"]
        begun = row["forked"]["epoch"] if row["forked"] else 0
        if first > begun:
            epochs = f"epochs {begun} to {first - 1}"
            lines.append(f"{row['run']}: commit and machine of {epochs} are not known; starts were not recorded then")
    return lines


def latex(results: Results) -> str:
    """The tables for a paper: needs ``\\usepackage{booktabs}``."""
    return "\n".join(_latex_table(table) for table in tables(results))


def _latex_table(table: Table) -> str:
    def line(texts: Iterable[str]) -> str:
        text = " & ".join(texts) + r" \\"
        return "{}" + text if text[0] in "[*" else text  # or they would be options of the line above

    body = [
        line([rf"\textbf{{{_escaped(cell.text)}}}" if cell.bold else _escaped(cell.text) for cell in row])
        for row in table.rows
    ]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(table.caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
            r"\toprule",
            line(map(_escaped, table.head)),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


SIGNS = {
    **{sign: f"\\{sign}" for sign in "%_&#${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$"},
}


def _escaped(text: str) -> str:
    """As LaTeX prints it; a minus sign is no hyphen."""
    text = re.sub(r"(?<!\w)-(?=\d)|(?<= )-(?= )", "−", text)
    return "".join(SIGNS.get(sign, sign) for sign in text)


def fill_readme(text: str, read: Callable[[str], Results | None]) -> str:
    """``text`` with every part between ``<!-- results of NAME -->`` and ``<!-- end of results -->`` made anew.

    ``read`` gives the results of a name; None: nothing of it is published yet, and nothing stands there. Raises
    :class:`InputError`.
    """
    whole, lines = len(MARKS.findall(text)), text.splitlines()
    if any(sum(line.startswith(mark) for line in lines) != whole for mark in (BEGIN, END)):
        raise InputError(f"README: tables stand between lines {BEGIN}NAME --> and {END}; one of these lines is missing")

    def made(found: re.Match) -> str:
        results = read(found["name"])
        return found[1] + (f"\n{markdown(results)}\n" if results else "") + END

    return MARKS.sub(made, text)
