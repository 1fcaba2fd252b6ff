"""The sections of the page: plain values for the template ``page.html.j2``."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from methods.neural_collapse import balance_metrics
from utils.compare.findings import RowNumbers, components_sentence, row_numbers, similarity_sentence
from utils.compare.read import Run, Runs
from utils.metrics import GROUPS, group_sizes
from utils.report import plots
from utils.report.figure_data import BINS, MAX_CELLS, MIN_DENOMINATOR, smoothing_window
from utils.report.text import NPZ_LIMIT, group_line
from utils.run.describe import describe_method, describe_schedule

BALANCE = {
    "b_a": "B_A\n(angles)",
    "b_d": "B_D\n(dot products)",
    "b_d_relative": "B_D\n/ mean ||w||²",
    "b_l": "B_L\n(lengths)",
    "b_l_relative": "B_L\n/ mean ||w||",
    "b_a_as_printed": "B_A\nas printed",
    "b_d_as_printed": "B_D\nas printed",
}
LISTED = 5  # worst and best classes


class Picture(NamedTuple):
    """A figure as the page embeds it."""

    data: str  # PNG, base64
    alt: str
    caption: str
    width: int  # CSS pixels: 100 per inch
    height: int


class Table(NamedTuple):
    """A table of plain text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)  # columns that are aligned as text


def picture(figure: Figure, alt: str, caption: str = "") -> Picture:
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return Picture(base64.b64encode(plots.png(figure)).decode(), alt, caption, width, height)


def number(value: float | None, digits: int = 2) -> str:
    """Format a number; ``-`` if it is missing or not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def descriptions(runs: Runs) -> list[tuple[str, str, str]]:
    """Return (label, how the run was trained, its folder)."""
    found = []
    for label, run in runs.items():
        done, cfg = run.rows[-1]["epoch"] + 1, run.cfg
        progress = "" if done == cfg.num_epochs else f"; {done} of {cfg.num_epochs} epochs so far"
        words = f"{describe_method(cfg)}; {cfg.backbone}; {describe_schedule(cfg)}"
        words += f"; seed {cfg.seed}, subset seed {cfg.subset_seed}{progress}"
        found.append((label, words, str(run.folder)))
    return found


def _with(runs: Runs, present: Callable[[Run], object], remark: str) -> tuple[Runs, list[str]]:
    """Return the runs that have what a section shows, and a remark for each of the others."""
    shown = {label: run for label, run in runs.items() if present(run)}
    return shown, [f"{label}: {remark}" for label in runs if label not in shown]


def _with_predictions(runs: Runs) -> tuple[Runs, list[str]]:
    remark = f"no predictions of the last evaluated epoch; they are saved for test sets of up to {NPZ_LIMIT:,} images"
    return _with(runs, lambda run: run.predictions, remark)


def results(runs: Runs) -> dict:
    """Return the table of the headline numbers, with groups by every rule, and the worst and best classes."""
    columns, rows = _group_columns(runs), []
    for label, run in runs.items():
        for choice, metrics in next(iter(run.summaries.values())).items():
            epochs = ", ".join(str(epoch) for epoch in dict.fromkeys(metrics["epochs"]))
            groups = [run.summaries.get(rule, {}).get(choice, {}).get(group) for rule, group in columns]
            rows.append([label, choice, epochs, *map(number, [metrics.get("top1"), *groups, metrics.get("ece")])])
    head = ["run", "choice", "epoch", "top-1", *columns.values(), "ECE"]
    sizes = {label: group_line(group_sizes(run.groups)) for label, run in runs.items()}
    same = len(set(sizes.values())) == 1
    lines = [*sizes.values()][:1] if same else [f"{label}: {line}" for label, line in sizes.items()]
    shown, missing = _with_predictions(runs)
    extremes = [(f"{label}, epoch {run.evaluated[-1]['epoch']}", _extremes(run)) for label, run in shown.items()]
    return {"table": Table(head, rows, (0, 1)), "sizes": lines, "missing": missing, "extremes": extremes}


def _group_columns(runs: Runs) -> dict[tuple[str, str], str]:
    """Return (rule, group) -> head of a table's column."""
    return {(rule, group): f"{group}\n({rule})" for run in runs.values() for rule in run.groups for group in GROUPS}


def _extremes(run: Run) -> Table:
    accuracy, counts = run.accuracy(), run.class_counts.numpy()
    tested = np.flatnonzero(~np.isnan(accuracy))
    worst = tested[np.lexsort((counts[tested], accuracy[tested]))]  # among equals, the rarest first
    shown = min(LISTED, -(-len(worst) // 2))
    rows = [
        [run.class_names[i], kind, f"{counts[i]:,}", number(accuracy[i])]
        for kind, chosen in (("worst", worst[:shown]), ("best", worst[::-1][:shown]))
        for i in chosen
    ]
    return Table(["class", "", "training images", "top-1 (%)"], rows, (0, 1))


def classes(runs: Runs) -> dict:
    """Return accuracy over class counts, all runs in one figure."""
    shown, missing = _with_predictions(runs)
    if not shown:
        return {"missing": missing}
    caption = "Last evaluated epoch; the number of training images is on a logarithmic axis."
    if max(len(run.class_counts) for run in shown.values()) > 30:
        caption += " Lines: means over classes of similar counts."
    figure = plots.class_accuracy_figure({label: (run.class_counts, run.accuracy()) for label, run in shown.items()})
    return {"missing": missing, "pictures": [picture(figure, f"Top-1 per class: {', '.join(shown)}", caption)]}


def confusion(runs: Runs) -> dict:
    """Return a confusion matrix for every run."""
    shown, missing = _with_predictions(runs)
    pictures = []
    for label, run in shown.items():
        predicted, (rule, masks) = run.predictions, next(iter(run.groups.items()))
        caption = f"Rows: true classes, most frequent first. Borders, if any: many, medium, few by {rule}."
        if len(run.class_counts) > MAX_CELLS:
            caption += (
                f" {BINS} groups of {len(run.class_counts):,} classes with neighbouring ranks; a cell is the share of "
                "the row group's images that are predicted in the column group."
            )
        arrays = (predicted["classes"], predicted["targets"], run.class_counts, run.class_names)
        pictures.append(picture(plots.confusion_figure(*arrays, masks, label), f"Confusion matrix of {label}", caption))
    return {"missing": missing, "pictures": pictures}


def calibration(runs: Runs) -> dict:
    """Return reliability diagrams, and ECE overall and per group."""
    columns, rows = _group_columns(runs), []
    for label, run in runs.items():
        groups = run.ece_groups()
        cells = [groups.get(rule, {}).get(group) for rule, group in columns]
        rows.append([label, *map(number, [run.evaluated[-1]["test"].get("ece"), *cells])])
    shown, missing = _with_predictions(runs)
    pictures = []
    for label, run in shown.items():
        arrays = (run.predictions[key] for key in ("confidences", "classes", "targets"))
        figure, caption = plots.reliability_figure(*arrays, label), "15 bins; below, the share of images per bin."
        pictures.append(picture(figure, f"Reliability diagram of {label}", caption))
    head = ["ECE (%)\nof the last evaluated epoch", "all", *columns.values()]
    return {"table": Table(head, rows), "missing": missing, "pictures": pictures}


def similarity(runs: Runs) -> dict:
    """Return Fig. 4, its balance metrics, and what they show."""
    figure = plots.similarity_figure({label: (run.weight, run.class_counts) for label, run in runs.items()})
    caption = (
        "M_ij = w_i·w_j / sum over k ≠ i of w_i·w_k, times C - 1, so that the ideal is 1 everywhere off the diagonal; "
        "all runs share one colour scale. The definition assumes negative dot products: a row whose sum is positive "
        f"or within {MIN_DENOMINATOR:g} ||w_i||² of 0 is grey, because its signs are flipped or its size is arbitrary."
    )
    if max(len(run.class_counts) for run in runs.values()) > MAX_CELLS:
        caption += f" Above {MAX_CELLS} classes, a cell is a mean over {BINS} groups of classes of similar frequency."
    balance = {label: balance_metrics(run.weight) for label, run in runs.items()}
    rows = [[label, *(number(metrics[key], 4) for key in BALANCE)] for label, metrics in balance.items()]
    return {
        "pictures": [picture(figure, f"Similarity of classifier rows: {', '.join(runs)}", caption)],
        "table": Table(["balance metric (ideal 0)", *BALANCE.values()], rows),
        "finding": similarity_sentence(runs, balance),
    }


def components(runs: Runs) -> dict:
    """Return Fig. 5 on the rarest diagnosed row, what it shows, and smaller figures of the other rows."""
    remark = "no row in diagnostics.npz; train with `diagnostics: N` to record some every N steps"
    shown, missing = _with(runs, lambda run: run.diagnostics, remark)
    if not shown:
        return {"missing": missing}
    diagnosed = {label: run.diagnosed() for label, run in shown.items()}
    rarest = {label: rows[0] for label, rows in diagnosed.items()}
    numbers = {label: row_numbers(run.diagnostics, rarest[label]) for label, run in shown.items()}
    rest = dict.fromkeys(row for rows in diagnosed.values() for row in rows if row not in rarest.values())
    others = [{label: row for label, rows in diagnosed.items() if row in rows} for row in rest]
    return {
        "missing": missing,
        "pictures": [_components_picture(shown, rarest, 4.6, _components_caption(shown))],
        "table": _components_table(numbers),
        "finding": components_sentence(shown, rarest, numbers),
        "others": [_components_picture(shown, rows, 3.4) for rows in others],
    }


def _components_picture(runs: Runs, rows: Mapping[str, int], height: float, caption: str = "") -> Picture:
    """``rows``: the row that is drawn, by label."""
    data = {}
    for label, row in rows.items():
        run = runs[label]
        norms = run.diagnostics["row_norms"][:, run.diagnostics["rows"].tolist().index(row)]
        masks = next(iter(run.groups.values()))
        counts, epochs = run.class_counts.numpy(), run.diagnostics["epochs"]
        data[label] = plots.Components(epochs, norms, row, counts, run.class_names, masks)
    classes = "; ".join(f"{label}, class {runs[label].class_names[row]}" for label, row in rows.items())
    alt = f"Gradient components on a classifier row: {classes}"
    return picture(plots.components_figure(data, height), alt, caption)


def _components_caption(runs: Runs) -> str:
    windows = sorted({smoothing_window(len(run.diagnostics["epochs"])) for run in runs.values()})
    if windows == [1]:
        smoothing = "not smoothed, as there are few epochs"
    else:
        smoothing = f"curves are centred means over {' or '.join(map(str, windows))} epochs, raw values are faint"
    return (
        "Contribution of each class's samples to the row's gradient in a batch, mean over the epoch's diagnosed "
        f"batches; {smoothing}. Attraction (dashed) comes from the row's own class, repulsion from the others."
    )


def _components_table(numbers: Mapping[str, RowNumbers]) -> Table:
    head = ["last quarter of the epochs,\nrow of the figure above", "attraction\n(norm)", "repulsion\n(sum of norms)"]
    head += ["largest / smallest\nrepulsion", "share of the\nfrequent half (%)", "attraction\nmass", "repulsion\nmass"]
    head += ["cosine between\nrepulsions"]
    digits = (3, 3, 1, 1, 3, 3, 3)
    percent = [now._replace(frequent=100 * now.frequent) for now in numbers.values()]
    return Table(head, [[label, *map(number, now, digits)] for label, now in zip(numbers, percent, strict=True)])


def collapse(runs: Runs) -> dict:
    """Return neural-collapse metrics over the epochs."""
    remark = "no neural-collapse metrics; train with `nc_every: N` to measure them"
    shown, missing = _with(runs, lambda run: any(row.get("nc") for row in run.rows), remark)
    data = {}
    for label, run in shown.items():
        rows = [row for row in run.rows if row.get("nc")]
        keys = dict.fromkeys(key for row in rows for key in row["nc"])
        data[label] = {key: np.array([row["nc"].get(key) for row in rows], dtype=float) for key in keys}
        data[label]["epochs"] = np.array([row["epoch"] for row in rows])
    if not data:
        return {"missing": missing}
    caption = (
        "On training images without augmentation; NC1 on a logarithmic axis. 0 is collapse. With unequal counts, "
        "nothing is at distance 0 from both the simplex and SELI, which is then the optimum of cross-entropy."
    )
    alt = f"Neural collapse over the epochs: {', '.join(data)}"
    return {"missing": missing, "pictures": [picture(plots.collapse_figure(data), alt, caption)]}


def learning(runs: Runs) -> dict:
    """Return loss and accuracy over the epochs."""
    data = {
        label: {
            "epochs": [row["epoch"] for row in run.rows],
            "loss": [row["train"]["loss"] for row in run.rows],
            "train_top1": [row["train"]["top1"] for row in run.rows],
            "lr": [row["lr"] for row in run.rows],
            "test_epochs": [row["epoch"] for row in run.evaluated],
            "test_top1": [row["test"]["top1"] for row in run.evaluated],
        }
        for label, run in runs.items()
    }
    caption = "Different methods have different loss functions. Under mixup, training top-1 uses the unmixed labels."
    return {"pictures": [picture(plots.learning_figure(data), f"Loss and top-1: {', '.join(runs)}", caption)]}


def decomposition(runs: Runs) -> dict:
    """Return what eval.py measured with other classifiers on the same features."""
    remark = "no decomposition; run `eval.py ... decompose True` to write it"
    shown, missing = _with(runs, lambda run: run.decompositions, remark)
    rows, notes, curves = [], [], {}
    for label, run in shown.items():
        for checkpoint, found in run.decompositions.items():
            name = f"{label}, {checkpoint}" if len(run.decompositions) > 1 else label
            curves[name] = found["tau"]
            notes += [f"{name}: {line}" for line in found.get("notes", [])]
            for classifier, values in found["rows"].items():
                rows.append([name, classifier, *(number(values.get(key)) for key in ("top1", *GROUPS))])
    if not curves:
        return {"missing": missing}
    caption = "Post-hoc logit adjustment: tau times the log training counts is subtracted from the logits."
    return {
        "missing": missing,
        "notes": notes,
        "table": Table(["run", "classifier", "top-1", *GROUPS], rows, (0, 1)),
        "pictures": [picture(plots.tau_figure(curves), f"Top-1 over tau: {', '.join(curves)}", caption)],
    }
