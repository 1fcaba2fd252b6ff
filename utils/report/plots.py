"""Figures of runs: arrays in, a matplotlib ``Figure`` out; pyplot is never used.

Several runs in one figure are a mapping from label to data. Figures are designed for 100 dpi. What is drawn is computed
in :mod:`utils.report.figure_data`.

Legend: N test images, C classes, D features, E epochs. Arrays are NumPy's, CPU tensors or lists.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from utils.files import atomic_file
from utils.metrics import GROUPS, calibration_error
from utils.report import figure_data, style

NAMED_CLASSES = 20  # up to this many classes a confusion matrix shows names and numbers
CURVES = 12  # up to this many classes each has a curve of its own
ATTRACTION = {"color": "black", "linestyle": "--", "linewidth": 2.6, "zorder": 3}


class Components(NamedTuple):
    """Gradient components on one classifier row over the epochs."""

    epochs: ArrayLike  # [E]
    norms: ArrayLike  # [E, C], attraction at ``row``, repulsion elsewhere; summed over the batch
    row: int
    class_counts: ArrayLike  # [C]
    names: Sequence[str]
    groups: Mapping[str, ArrayLike]  # masks [C] of many, medium, few


@style.styled()
def class_accuracy_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Plot top-1 per class against the number of training images.

    ``runs``: (class counts [C], accuracy [C] in percent, NaN for a class without test images). Up to 30 classes are
    points joined by lines, up to 1,000 faint points; above 30, means over classes of similar counts are drawn, above
    1,000 with a band of 1.96 standard errors over the classes.
    """
    figure, (axis,) = style.panels(1, 4.4, style.WIDE)
    for number, (label, (counts, accuracy)) in enumerate(runs.items()):
        counts, accuracy = np.asarray(counts, float), np.asarray(accuracy, float)
        order = figure_data.by_frequency(counts)[::-1]
        order = order[~np.isnan(accuracy[order])]
        x, y = np.maximum(counts[order], 0.5), accuracy[order]
        look = {"color": style.run_colour(number), "marker": style.MARKERS[number % len(style.MARKERS)]}
        name = style.plain(label)
        if len(counts) <= 30:
            axis.plot(x, y, **look, linewidth=1, alpha=0.85, label=name)
            continue
        if len(counts) <= 1000:
            axis.plot(x, y, **look, markersize=3, linestyle="", alpha=0.25)
        parts = [part for part in figure_data.count_bins(x) if part.any()]
        middle = [np.exp(np.log(x[part]).mean()) for part in parts]
        means = np.array([y[part].mean() for part in parts])
        axis.plot(middle, means, **look, linewidth=2, label=f"{name}, mean over classes of similar counts")
        if len(counts) > 1000:
            error = np.array([1.96 * y[part].std() / part.sum() ** 0.5 for part in parts])
            axis.fill_between(middle, means - error, means + error, color=look["color"], alpha=0.2, linewidth=0)
    style.count_axis(axis, np.concatenate([np.asarray(counts, float) for counts, _ in runs.values()]))
    axis.set(title="Accuracy per class", xlabel="training images per class", ylabel="test top-1 (%)", ylim=(-4, 104))
    style.legend(figure, axis.get_legend_handles_labels()[0])
    return figure


@style.styled(**style.MATRIX)
def confusion_figure(
    classes: ArrayLike,
    targets: ArrayLike,
    class_counts: ArrayLike,
    names: Sequence[str],
    groups: Mapping[str, ArrayLike] | None = None,
    title: str = "",
) -> Figure:
    """Draw the confusion matrix; rows are true classes in percent of their images, sorted by frequency.

    ``classes``, ``targets``: [N], predicted and true. Up to 20 classes have names and numbers, up to 200 a cell each;
    above, cells are 100 groups of classes of similar frequency. ``groups``: masks [C] whose borders are marked if they
    follow the order.
    """
    class_counts = np.asarray(class_counts)
    order = figure_data.by_frequency(class_counts)
    cells = figure_data.confusion_cells(classes, targets, class_counts)
    named = len(order) <= NAMED_CLASSES
    size = style.SINGLE if len(order) <= 10 or not named else 8.5
    figure, (axis,) = style.panels(1, size * 0.88, size, layout="compressed")
    shades = PowerNorm(0.5, 0, 100)  # the square root keeps small shares visible
    image = axis.imshow(cells, cmap=style.colour_map("cividis"), norm=shades, extent=(0, len(order), len(order), 0))
    ticks = [0, 1, 5, 10, 25, 50, 75, 100]
    figure.colorbar(image, ax=axis, shrink=0.8, ticks=ticks, pad=0.02, label="share of the true class's images (%)")
    groupings = "" if len(order) <= figure_data.MAX_CELLS else f", {figure_data.BINS} groups of {len(order):,} classes"
    axis.set_title(style.wrapped(title or f"Confusion matrix{groupings}", 36))
    if named:
        style.cell_values(axis, cells)
        labels = [style.shortened(names[i], 16) for i in order]
        middles = np.arange(len(order)) + 0.5
        axis.set_xticks(middles, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
        axis.set_yticks(middles, [f"{a} ({class_counts[i]:,})" for a, i in zip(labels, order, strict=True)])
        axis.set(xlabel="predicted class", ylabel="true class (training images)")
    else:
        style.rank_ticks(axis, len(order))
        axis.set(xlabel="predicted class (rank by training images, most frequent first)", ylabel="true class (rank)")
    style.borders(axis, order, groups or {})
    return figure


@style.styled()
def reliability_figure(confidences: ArrayLike, classes: ArrayLike, targets: ArrayLike, title: str = "") -> Figure:
    """Draw a reliability diagram with 15 equal bins (Guo et al., ICML 2017) above a confidence histogram. All [N]."""
    measured = calibration_error(*(torch.as_tensor(np.asarray(a)) for a in (confidences, classes, targets)))
    accuracy, confidence, count = (measured[key].numpy() for key in ("bin_accuracy", "bin_confidence", "bin_count"))
    edges = np.linspace(0, 1, len(count) + 1)[:-1]
    filled, width = count > 0, 1 / len(count)
    left, low, gap = edges[filled], np.minimum(accuracy, confidence)[filled], np.abs(accuracy - confidence)[filled]
    figure = Figure(figsize=(style.SINGLE, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bars = {"width": width, "align": "edge", "linewidth": 0.8}
    top.bar(left, accuracy[filled], color=style.COLOURS[0], edgecolor="white", label="accuracy", **bars)
    # Each bar spans from the bin's accuracy to its mean confidence: the gaps that the error sums.
    hatched = {"color": "#f6cdb0", "edgecolor": style.COLOURS[1], "hatch": "///"}
    top.bar(left, gap, bottom=low, label="gap to confidence", **hatched, **bars)
    top.hlines(accuracy[filled], left, left + width, color="#003b66", linewidth=2.2)
    top.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect calibration")
    head = style.wrapped(f"{title or 'Reliability'}: ECE {100 * measured['ece']:.2f} %", 48)
    top.set(xlim=(0, 1), ylim=(0, 1), title=head, ylabel="accuracy")
    bottom.bar(edges, 100 * count / max(count.sum(), 1), color="#888888", edgecolor="white", **bars)
    bottom.set(xlabel="confidence", ylabel="images (%)")
    style.legend(figure, top.get_legend_handles_labels()[0])
    return figure


@style.styled(**style.MATRIX)
def similarity_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Draw the similarity of classifier rows (the paper's Fig. 4): one panel per run, one colour scale.

    ``runs``: (weight [C, D], class counts [C]). The scale is centred on the ideal. Above 200 classes cells are means
    over 100 groups of classes of similar frequency. The diagonal and undefined rows are grey, see
    :func:`utils.report.figure_data.row_similarity`.
    """
    similarities = {label: figure_data.row_similarity(*data) for label, data in runs.items()}
    offsets = np.abs(np.concatenate([similarity.cells.ravel() for similarity in similarities.values()]) - 1)
    offsets = offsets[~np.isnan(offsets)]
    limit = max(float(np.percentile(offsets, 95)), 0.1) if len(offsets) else 1.0
    shades = Normalize(1 - limit, 1 + limit)
    figure, axes = style.panels(len(runs), 5.2, layout="compressed")
    for axis, (label, similarity) in zip(axes, similarities.items(), strict=True):
        classes = len(runs[label][1])
        axis.imshow(similarity.cells, cmap=style.colour_map("PuOr_r"), norm=shades, extent=(0, classes, classes, 0))
        style.rank_ticks(axis, classes)
        head = f"{style.wrapped(label, style.title_width(len(runs)))}\nideal M: 1/(C-1) = {1 / max(classes - 1, 1):.3g}"
        if similarity.undefined:
            head += f"; undefined rows (grey): {similarity.undefined:,}"
        axis.set(title=head, xlabel="class j (rank by training images)", ylabel="class i (rank)")
    mappable = ScalarMappable(shades, style.colour_map("PuOr_r"))
    figure.colorbar(mappable, ax=axes, shrink=0.75, extend="both", pad=0.02, label="M_ij × (C - 1); ideal: 1")
    return figure


@style.styled()
def components_figure(runs: Mapping[str, Components], height: float = 4.6) -> Figure:
    """Plot the gradient components on one classifier row (the paper's Fig. 5): one panel per run, a shared y axis.

    Up to 12 classes have a curve each, coloured by frequency; above, the repulsion is drawn by group, as median and
    interquartile range on a logarithmic axis. Curves are smoothed, the raw values faint.
    """
    figure, axes = style.panels(len(runs), height, sharey=True)
    handles: dict[str, Line2D] = {}
    for axis, (label, data) in zip(axes, runs.items(), strict=True):
        draw = _class_curves if len(data.class_counts) <= CURVES else _group_curves
        curves = draw(axis, data._replace(epochs=np.asarray(data.epochs), norms=np.asarray(data.norms, float)))
        handles |= {line.get_label(): line for line in curves}
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        name = f"row of class {style.shortened(data.names[data.row])} ({data.class_counts[data.row]:,} images)"
        head = "\n".join(style.wrapped(line, style.title_width(len(runs))) for line in (label, name))
        axis.set(title=head, xlabel="epoch", ylabel="component norm,\nsummed over the batch")
    if all(len(data.class_counts) <= CURVES for data in runs.values()):
        axes[0].set_ylim(bottom=0)  # of all panels, which share the axis
    else:
        axes[0].set_yscale("log")
    style.legend(figure, list(handles.values()))
    return figure


def _class_curves(axis: Axes, data: Components) -> list[Line2D]:
    order, lines = figure_data.by_frequency(data.class_counts), []
    colours = colormaps["cividis"](np.linspace(0, 0.92, len(order)))
    for k, colour in zip(order, colours, strict=True):
        own = k == data.row
        kind, look = ("attraction", ATTRACTION) if own else ("repulsion", {"color": colour})
        label = f"{kind} by {style.shortened(data.names[k], 16)} ({data.class_counts[k]:,})"
        lines.append(_smooth_curve(axis, data.epochs, data.norms[:, k], label, look))
    return lines


def _group_curves(axis: Axes, data: Components) -> list[Line2D]:
    lines = [_smooth_curve(axis, data.epochs, data.norms[:, data.row], "attraction", ATTRACTION)]
    soft = figure_data.smoothed(data.norms, figure_data.smoothing_window(len(data.epochs)))
    for group, mask in data.groups.items():
        members = np.flatnonzero(np.asarray(mask))
        members = members[members != data.row]
        if not len(members):
            continue
        label = f"repulsion by {group}-shot classes (median of {len(members):,})"
        look = {"color": style.GROUP_COLOURS[group]}
        raw = np.median(data.norms[:, members], axis=1)
        low, middle, high = np.percentile(soft[:, members], [25, 50, 75], axis=1)
        lines.append(_smooth_curve(axis, data.epochs, raw, label, look, middle))
        axis.fill_between(data.epochs, low, high, **look, alpha=0.15, linewidth=0)
    return lines


def _smooth_curve(
    axis: Axes, epochs: NDArray, raw: NDArray, label: str, look: Mapping, soft: NDArray | None = None
) -> Line2D:
    """Plot ``raw`` [E] faintly, if it is smoothed at all, and over it ``soft`` [E] (default: ``raw`` smoothed)."""
    window = figure_data.smoothing_window(len(epochs))
    if window > 1:
        axis.plot(epochs, raw, **{**look, "linewidth": 0.6}, alpha=0.35)
    soft = figure_data.smoothed(raw, window) if soft is None else soft
    return axis.plot(epochs, soft, label=label, **style.markers(epochs), **look)[0]


# Title, y label, curves ((key, line style), ...) of the panels of collapse_figure.
COLLAPSE = (
    ("NC1: within-class variability", "tr(S_W pinv(S_B)) / C", (("nc1", "-"),)),
    ("NC2: equal norms", "std / mean of norms", (("nc2_equinorm", "-"), ("nc2_equinorm_weights", "--"))),
    ("NC2: equal angles", "mean |cos + 1/(C-1)|", (("nc2_equiangle", "-"), ("nc2_equiangle_weights", "--"))),
    ("NC3: rows vs. class means", "squared distance", (("nc3", "-"),)),
    ("NC4: vs. nearest class mean", "disagreement (%)", (("nc4", "-"),)),
    ("Distance to the simplex", "Frobenius distance", (("simplex_means", "-"), ("simplex_weights", "--"))),
    ("Distance to SELI", "Frobenius distance", (("seli_means", "-"), ("seli_weights", "--"))),
)


@style.styled(**{"axes.titlesize": 9, "axes.labelsize": style.SMALL, "lines.linewidth": 1.5})
def collapse_figure(runs: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Plot neural-collapse metrics over the epochs.

    ``runs``: "epochs" [E] and the metrics of :func:`methods.neural_collapse.nc_metrics`, each [E], NaN if not measured.
    NC4 is drawn in percent. Class means have solid lines, classifier rows dashed ones.
    """
    figure = Figure(figsize=(style.WIDE, 5.6), layout="constrained")
    *axes, corner = figure.subplots(2, 4).ravel()
    for axis, (title, unit, curves) in zip(axes, COLLAPSE, strict=True):
        for number, values in enumerate(runs.values()):
            for key, line in curves:
                if key in values:
                    y = np.asarray(values[key], float) * (100 if key == "nc4" else 1)
                    axis.plot(values["epochs"], y, color=style.run_colour(number), linestyle=line, **style.markers(y))
        if title.startswith("NC1"):
            axis.set_yscale("log")
            style.plain_log_ticks(axis.yaxis, (1, 2, 5), lambda value: f"{value:g}")
        else:
            axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.set(title=title, xlabel="epoch", ylabel=unit)
    corner.set_axis_off()
    labels = [style.wrapped(label, 30) for label in runs]
    lines = [Line2D([], [], color=style.run_colour(number), label=label) for number, label in enumerate(labels)]
    corner.legend(handles=[*lines, *style.grey_lines({"-": "class means", "--": "classifier rows"})], loc="center")
    return figure


@style.styled()
def learning_figure(runs: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Plot training loss and top-1 over the epochs; dotted lines mark learning rates that drop below half.

    ``runs``: "epochs", "loss", "train_top1", "lr" [E] and "test_epochs", "test_top1" [E'], in percent.
    """
    figure, (left, right) = style.panels(2, 4.2)
    drops = set()
    for number, (label, values) in enumerate(runs.items()):
        epochs, rate = np.asarray(values["epochs"]), np.asarray(values["lr"], float)
        look = {"color": style.run_colour(number), **style.markers(epochs)}
        drops |= set(epochs[1:][rate[1:] < 0.5 * rate[:-1]].tolist())
        left.plot(epochs, values["loss"], label=style.plain(label), **look)
        right.plot(epochs, values["train_top1"], linewidth=1.2, linestyle="--", **look)
        right.plot(values["test_epochs"], values["test_top1"], **look)
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for epoch in drops:
            axis.axvline(epoch, color="grey", linestyle=":", linewidth=1)
    left.set(title="Training loss", xlabel="epoch", ylabel="mean loss (nats)")
    right.set(title="Top-1", xlabel="epoch", ylabel="top-1 (%)", ylim=(-2, 102))
    kinds = {"-": "test", "--": "training"} | ({":": "learning-rate drop"} if drops else {})
    style.legend(figure, [*left.get_lines()[: len(runs)], *style.grey_lines(kinds)])
    return figure


@style.styled()
def tau_figure(curves: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Plot top-1 after post-hoc logit adjustment against its strength tau: one panel per run.

    ``curves``: "values" [T] of tau; "top1" and those of "many", "medium", "few" that exist, [T] in percent; "best", the
    two cross-fitted choices.
    """
    figure, axes = style.panels(len(curves), 4.2, sharey=True)
    styles = {"top1": ("black", 2.4), **{group: (style.GROUP_COLOURS[group], 1.5) for group in GROUPS}}
    for axis, (label, values) in zip(axes, curves.items(), strict=True):
        for key, (colour, width) in styles.items():
            if key in values:
                name = "all" if key == "top1" else key
                axis.plot(values["values"], np.asarray(values[key], float), color=colour, linewidth=width, label=name)
        for best in set(values["best"]):
            axis.axvline(best, color="grey", linestyle=":", linewidth=1.2, label="cross-fitted tau")
        title = style.wrapped(label, style.title_width(len(curves)))
        axis.set(title=title, xlabel="tau (0: no adjustment)", ylabel="top-1 (%)", ylim=(-2, 102))
    handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    style.legend(figure, list(handles.values()))
    return figure


@style.styled()
def imbalance_figure(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Figure:
    """Plot accuracy against the imbalance ratio: one curve per arm, with 95 % intervals where given.

    ``arms``: "ratios", "means", "lows" and "highs" [K], the latter three in percent; None omits an interval.
    """
    figure, (axis,) = style.panels(1, 4.4, 8.0)
    ratios = sorted({ratio for data in arms.values() for ratio in data["ratios"]})
    for number, (label, data) in enumerate(arms.items()):
        shift = 1 + 0.016 * (number - (len(arms) - 1) / 2)  # keeps intervals from covering one another
        x, means = np.asarray(data["ratios"], float) * shift, np.asarray(data["means"], float)
        cycle = number // len(style.COLOURS)  # beyond the colours, markers and lines change
        colour, marker = style.run_colour(number), style.MARKERS[(number + cycle) % len(style.MARKERS)]
        look = {"color": colour, "marker": marker, "markersize": 5, "linestyle": ("-", "--", ":")[cycle % 3]}
        axis.plot(x, means, linewidth=1.2, label=style.plain(label), **look)
        for at, low, high in zip(x, data["lows"], data["highs"], strict=True):
            if low is not None:
                axis.plot([at, at], [low, high], color=colour, alpha=0.8)
    axis.set(xscale="log", xlim=(ratios[0] / 1.3, ratios[-1] * 1.3), title="Accuracy vs. imbalance")
    axis.set(xlabel="imbalance ratio (largest class / smallest class)", ylabel="last-epoch top-1 (%)")
    axis.xaxis.set_minor_formatter(NullFormatter())
    ticks = [ratio for before, ratio in zip([0, *ratios], ratios, strict=False) if ratio > 1.1 * before]
    axis.set_xticks(ticks, [f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}" for ratio in ticks])
    style.legend(figure, axis.get_legend_handles_labels()[0])
    return figure


@style.styled()
def runs_figure(arms: Mapping[str, Mapping[str, ArrayLike | float | None]]) -> Figure:
    """Plot the accuracy of every run, one row per arm, with the arm's mean and 95 % interval and published figures.

    ``arms``: "runs" [N], "mean", "low", "high" and "published" [K], in percent; a low of None omits the interval.
    """
    figure, (axis,) = style.panels(1, 1.5 + 0.4 * len(arms), 8.0)
    mean, published = {"color": style.COLOURS[0], "marker": "D", "markersize": 5}, {"color": style.COLOURS[1]}
    for row, data in enumerate(arms.values()):
        axis.scatter(data["runs"], [row - 0.15] * len(data["runs"]), s=16, color="grey")
        axis.plot([data["mean"]], [row + 0.15], **mean)
        if data["low"] is not None:
            axis.plot([data["low"], data["high"]], [row + 0.15] * 2, color=mean["color"])
        axis.vlines(data["published"], row - 0.4, row + 0.4, linestyles="--", **published)
    axis.set_yticks(range(len(arms)), [style.shortened(arm, 40) for arm in arms])
    axis.set(ylim=(len(arms) - 0.5, -0.5), title="Single runs", xlabel="last-epoch top-1 (%)")
    handles = [
        Line2D([], [], color="grey", marker="o", markersize=4, linestyle="none", label="a run"),
        Line2D([], [], **mean, label="mean, 95 % interval"),
    ]
    if any(len(data["published"]) for data in arms.values()):
        handles.append(Line2D([], [], **published, linestyle="--", label="published"))
    style.legend(figure, handles)
    return figure


@style.styled()
def waterfall_figure(
    bars: Sequence[tuple[str, float, float | None, float | None]], published: float | None = None
) -> Figure:
    """Draw the steps from one accuracy to another as a waterfall chart.

    ``bars``: (name, value, low, high); the first and the last are accuracies in percent, the others changes in points.
    ``low`` and ``high`` bound the value; None: unknown. ``published``: an accuracy drawn as a line.
    """
    figure, (axis,) = style.panels(1, 4.8, style.WIDE)
    level, extent = 0.0, [] if published is None else [published]
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for number, (_, value, low, high) in enumerate(bars):
        total = number in (0, len(bars) - 1)
        base = 0.0 if total else level
        colour = "#7f7f7f" if total else style.GROUP_COLOURS["many"] if value >= 0 else style.GROUP_COLOURS["few"]
        axis.bar(number, value, bottom=base, width=0.6, color=colour, edgecolor=colour)  # the edge shows a step of 0
        interval = [] if low is None or high is None else [base + low, base + high]
        axis.plot([number] * len(interval), interval, color="black", linewidth=1.4)
        level = base + value
        extent += [level, *interval]
        text, top = f"{value:.2f}" if total else f"{value:+.2f}", max(base, level, *interval)
        place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axis.annotate(text, (number, top), bbox=behind, zorder=4, **place)
        if number + 1 < len(bars):
            axis.plot([number + 0.3, number + 0.7], [level, level], color="grey", linewidth=0.8)
    margin = max(0.02, 0.12 * (max(extent) - min(extent)))
    axis.set(title="Contributions to accuracy", ylabel="top-1 (%)")
    axis.set_ylim(max(0.0, min(extent) - margin), max(extent) + margin)
    width = max(int(140 / len(bars)), 8)  # characters that fit below a bar
    axis.set_xticks(range(len(bars)), [style.wrapped(name, width) for name, *_ in bars])
    if published is not None:
        look = {"color": "black", "linestyle": ":", "linewidth": 1.2}
        style.legend(figure, [axis.axhline(published, **look, label=f"published: {published:g}")])
    return figure


def png(figure: Figure) -> bytes:
    """Render the figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # class names in scripts that the font lacks
        figure.savefig(buffer, format="png", dpi=style.DPI)
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Write :func:`png` atomically."""
    content = png(figure)
    with atomic_file(path) as file:
        file.write(content)
