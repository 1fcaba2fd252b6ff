"""The figures of runs: arrays in, a matplotlib ``Figure`` out; no pyplot, no global state.

Legend: N test images, C classes, D features, E epochs. Arrays are NumPy's, CPU tensors or lists.

Where several runs share a figure they come as a mapping from label to data. Classes are ordered by their number of
training images, the most frequent first (ties by index). A figure is meant to be shown at 100 pixels per inch.
"""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from utils.files import atomic_file
from utils.metrics import GROUPS, calibration_error

DPI = 150
WIDE, SINGLE = 11.0, 5.4  # inches: a page's width, and a little less than half of it
SMALL, TEXT, HEAD = 8, 9, 10  # points
# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GROUP_COLOURS = {"many": "#0072B2", "medium": "#E69F00", "few": "#D55E00"}
NOTHING = "#d9d9d9"  # a cell without a value
NAMED_CELLS, CELLS, BINS = 20, 200, 100  # classes that are named; that have a cell each; cells beyond
CURVES = 12  # classes that have a curve each
LEAST = 0.1  # share of ||w_i||^2 that the denominator of M_ij has at least to be for M_ij to be defined


class Components(NamedTuple):
    """The gradient components on one classifier row over the epochs."""

    epochs: ArrayLike  # [E]
    norms: ArrayLike  # [E, C], attraction at ``row``, repulsion elsewhere; summed over the batch
    row: int
    class_counts: ArrayLike  # [C]
    names: Sequence[str]
    groups: Mapping[str, ArrayLike]  # masks [C] of many, medium, few


class Similarity(NamedTuple):
    """Row similarity in units of its ideal."""

    cells: NDArray  # [K, K], mean of (C - 1) M_ij over the pairs i != j of the cell; NaN where none is defined
    undefined: int  # rows whose denominator is positive or near 0


# ---------------------------------------------------------------------------------------------------------------------
# Figures of predictions


def class_accuracy_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Top-1 per class over its number of training images.

    ``runs``: (class counts [C], accuracy [C] in percent, NaN for a class without test images). Up to 30 classes have a
    point and lines between them, up to 1,000 a faint point; from 31 on means over classes of similar counts are drawn,
    beyond 1,000 with a band of 1.96 standard errors over the classes.
    """
    figure, (axis,) = _panels(1, 4.4, WIDE)
    everything = np.concatenate([np.asarray(counts, float) for counts, _ in runs.values()])
    for number, (label, (counts, accuracy)) in enumerate(runs.items()):
        counts, accuracy = np.asarray(counts, float), np.asarray(accuracy, float)
        order = _by_frequency(counts)[::-1]
        order = order[~np.isnan(accuracy[order])]
        x, y = np.maximum(counts[order], 0.5), accuracy[order]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        if len(counts) <= 30:
            axis.plot(x, y, **style, markersize=6, linewidth=1, alpha=0.85, label=_plain(label))
            continue
        if len(counts) <= 1000:
            axis.plot(x, y, **style, markersize=3, linestyle="", alpha=0.25)
        parts = [part for part in _count_bins(x) if part.any()]
        middle = [np.exp(np.log(x[part]).mean()) for part in parts]
        label = f"{_plain(label)}, mean over classes of similar counts"
        axis.plot(middle, [y[part].mean() for part in parts], **style, markersize=6, linewidth=2, label=label)
        if len(counts) > 1000:
            mean, error = np.transpose([(y[part].mean(), 1.96 * y[part].std() / part.sum() ** 0.5) for part in parts])
            axis.fill_between(middle, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
    _count_axis(axis, everything)
    axis.set_ylim(-4, 104)
    _dress(axis, "Accuracy per class", "training images of the class", "top-1 on the test set (%)")
    _legend(figure, axis.get_legend_handles_labels()[0])
    return figure


def confusion_figure(
    classes: ArrayLike,
    targets: ArrayLike,
    class_counts: ArrayLike,
    names: Sequence[str],
    groups: Mapping[str, ArrayLike] | None = None,
    title: str = "",
) -> Figure:
    """Confusion matrix, rows (true classes) in percent of their images, sorted by frequency.

    ``classes``, ``targets``: [N], predicted and true. Up to 20 classes are named and numbered, up to 200 have a cell
    each; beyond, a cell is the share of a row group's images that are predicted in the column group, for 100 groups of
    neighbours in frequency. ``groups``: masks [C] whose borders are marked, where they follow the order.
    """
    class_counts = np.asarray(class_counts)
    order = _by_frequency(class_counts)
    cells = confusion_cells(classes, targets, class_counts)
    named = len(order) <= NAMED_CELLS
    size = SINGLE if len(order) <= 10 or not named else 8.5
    figure, (axis,) = _panels(1, size * 0.88, size, layout="compressed")
    shades = PowerNorm(0.5, 0, 100)  # the root, so that small shares can be seen
    image = axis.imshow(cells, cmap=_map("cividis"), norm=shades, extent=(0, len(order), len(order), 0))
    bar = figure.colorbar(image, ax=axis, shrink=0.8, ticks=[0, 1, 5, 10, 25, 50, 75, 100], pad=0.02)
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label("% of the row's images", fontsize=TEXT)
    if named:
        _numbers(axis, cells)
        labels = [_shortened(names[i], 16) for i in order]
        axis.set_xticks(np.arange(len(order)) + 0.5, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
        axis.set_yticks(
            np.arange(len(order)) + 0.5, [f"{a} ({class_counts[i]:,})" for a, i in zip(labels, order, strict=True)]
        )
        x, y = "predicted class", "true class (training images)"
    else:
        x, y = "predicted class", "true class"
        note = "rank by training images, most frequent first"
        x, y = f"{x} ({note})", f"{y} (rank)"
        _rank_ticks(axis, len(order))
    what = "" if len(order) <= CELLS else f", {BINS} groups of {len(order):,} classes"
    _dress(axis, _wrapped(title or f"Confusion matrix{what}", 36), x, y)
    _borders(axis, order, groups or {})
    return figure


def reliability_figure(confidences: ArrayLike, classes: ArrayLike, targets: ArrayLike, title: str = "") -> Figure:
    """Reliability diagram with gaps, over a histogram of confidence; 15 equal bins (Guo et al., ICML 2017). All [N]."""
    found = calibration_error(*(torch.as_tensor(np.asarray(a)) for a in (confidences, classes, targets)))
    accuracy, confidence, count = (found[key].numpy() for key in ("bin_accuracy", "bin_confidence", "bin_count"))
    edges = np.linspace(0, 1, len(count) + 1)[:-1]
    filled, width = count > 0, 1 / len(count)
    figure = _new(SINGLE, 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bars = {"width": width, "align": "edge", "linewidth": 0.8}
    top.bar(edges[filled], accuracy[filled], color=COLOURS[0], edgecolor="white", label="accuracy", **bars)
    # Every bin's gap lies between its accuracy and its mean confidence: that is what the error sums.
    low, gap = np.minimum(accuracy, confidence)[filled], np.abs(accuracy - confidence)[filled]
    top.bar(
        edges[filled],
        gap,
        bottom=low,
        color="#f6cdb0",
        edgecolor=COLOURS[1],
        hatch="///",
        label="gap to confidence",
        **bars,
    )
    top.hlines(accuracy[filled], edges[filled], edges[filled] + width, color="#003b66", linewidth=2.2)
    top.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect calibration")
    top.set(xlim=(0, 1), ylim=(0, 1))
    bottom.bar(edges, 100 * count / max(count.sum(), 1), color="#888888", edgecolor="white", **bars)
    _dress(top, _wrapped(f"{title or 'Reliability'}: ECE {100 * found['ece']:.2f} %", 48), "", "accuracy")
    _dress(bottom, "", "confidence", "images (%)")
    _legend(figure, top.get_legend_handles_labels()[0])
    return figure


def confusion_cells(classes: ArrayLike, targets: ArrayLike, class_counts: ArrayLike) -> NDArray:
    """[K, K] in percent of each row's images, see :func:`confusion_figure`; NaN in rows without images."""
    bins, size = _rank_bins(np.asarray(class_counts))
    pairs = bins[np.asarray(targets, np.int64)] * size + bins[np.asarray(classes, np.int64)]
    counted = np.bincount(pairs, minlength=size * size).reshape(size, size).astype(float)
    totals = counted.sum(axis=1, keepdims=True)
    return 100 * np.divide(counted, totals, out=np.full_like(counted, np.nan), where=totals > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Figures of attraction, repulsion and geometry


def similarity_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Similarity of classifier rows (the paper's Fig. 4): a panel per run, one colour scale around the ideal.

    ``runs``: (weight [C, D], class counts [C]). Beyond 200 classes a cell is the mean over 100 groups of neighbours in
    frequency. Rows whose denominator is positive or near 0 have no similarity and stay grey, as the diagonal does.
    """
    found = {label: row_similarity(*data) for label, data in runs.items()}
    offsets = np.abs(np.concatenate([similarity.cells.ravel() for similarity in found.values()]) - 1)
    offsets = offsets[~np.isnan(offsets)]
    limit = max(float(np.percentile(offsets, 95)), 0.1) if len(offsets) else 1.0
    shades = Normalize(1 - limit, 1 + limit)
    figure, axes = _panels(len(runs), 5.2, layout="compressed")
    for axis, (label, similarity) in zip(axes, found.items(), strict=True):
        classes = len(runs[label][1])
        axis.imshow(similarity.cells, cmap=_map("PuOr_r"), norm=shades, extent=(0, classes, classes, 0))
        _rank_ticks(axis, classes)
        head = f"{_wrapped(label, _room(len(runs)))}\nideal M: 1/(C-1) = {1 / max(classes - 1, 1):.3g}"
        if similarity.undefined:
            head += f"; rows not drawn (grey): {similarity.undefined:,}"
        _dress(axis, head, "class j (rank by training images)", "class i (rank)")
    bar = figure.colorbar(ScalarMappable(shades, _map("PuOr_r")), ax=axes, shrink=0.75, extend="both", pad=0.02)
    bar.set_label("M_ij x (C - 1); 1 is the ideal", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def row_similarity(weight: ArrayLike, class_counts: ArrayLike) -> Similarity:
    """M_ij = w_i . w_j / sum_{k != i} w_i . w_k (the paper's Fig. 4), times C - 1, in cells sorted by frequency.

    ``weight``: [C, D]. The definition means dot products that are negative. A row is left out where the sum of its dot
    products is above -``LEAST`` ||w_i||^2: its signs are turned round there, or its size says nothing. (Rows that sum
    to 0, as softmax losses with weight decay tend to, have the sum -||w_i||^2.) No [C, C] matrix is formed.
    """
    weight = np.asarray(weight, float)
    bins, size = _rank_bins(np.asarray(class_counts))
    squares = (weight**2).sum(axis=1)
    denominators = weight @ weight.sum(axis=0) - squares
    defined = (denominators < -LEAST * squares) & (squares > 0)
    scale = np.where(defined, 1 / np.where(defined, denominators, 1), 0)
    members = np.equal.outer(np.arange(size), bins).astype(float)  # [K, C], which class is in which cell
    sums = ((members * scale) @ weight) @ (members @ weight).T - np.diag(members @ (squares * scale))
    own, others = members @ defined, members.sum(axis=1)
    pairs = np.outer(own, others) - np.diag(own)
    cells = np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)
    return Similarity(cells * (len(bins) - 1), int((~defined).sum()))


def components_figure(runs: Mapping[str, Components], height: float = 4.6) -> Figure:
    """Gradient components on one classifier row over the epochs (the paper's Fig. 5): a panel per run, one y axis.

    Up to 12 classes have a curve each, coloured by frequency; beyond, medians and the middle half of the repulsion by
    group, on a logarithmic axis. Curves are centred means over :func:`smoothing_window` epochs; faint: the values.
    """
    figure, axes = _panels(len(runs), height, sharey=True)
    handles: dict[str, Line2D] = {}
    for axis, (label, data) in zip(axes, runs.items(), strict=True):
        draw = _class_curves if len(data.class_counts) <= CURVES else _group_curves
        drawn = draw(axis, data._replace(epochs=np.asarray(data.epochs), norms=np.asarray(data.norms, float)))
        handles |= {line.get_label(): line for line in drawn}
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        name = f"row of class {_shortened(data.names[data.row])} ({data.class_counts[data.row]:,} images)"
        head = "\n".join(_wrapped(line, _room(len(runs))) for line in (label, name))
        _dress(axis, head, "epoch", "norm of the component,\nsummed over the batch")
    if all(len(data.class_counts) <= CURVES for data in runs.values()):
        axes[0].set_ylim(bottom=0)  # of all panels, once all are drawn
    else:
        axes[0].set_yscale("log")
    _legend(figure, list(handles.values()))
    return figure


def smoothing_window(epochs: int) -> int:
    """Over how many of so many epochs curves of components are averaged: an odd number, about a twentieth."""
    return 1 + 2 * round(epochs / 40)


def smoothed(values: NDArray, window: int) -> NDArray:
    """Centred means over ``window`` epochs of [E, ...]; at the ends over those there are."""
    half = window // 2
    return np.stack([values[max(0, e - half) : e + half + 1].mean(axis=0) for e in range(len(values))])


def _class_curves(axis: Axes, data: Components) -> list[Line2D]:
    window = smoothing_window(len(data.epochs))
    soft = smoothed(data.norms, window)
    order, lines = _by_frequency(np.asarray(data.class_counts)), []
    colours = _map("cividis")(np.linspace(0, 0.92, len(order)))
    for k, colour in zip(order, colours, strict=True):
        own = k == data.row
        style = {"color": "black", "linestyle": "--", "zorder": 3} if own else {"color": colour}
        if window > 1:
            axis.plot(data.epochs, data.norms[:, k], linewidth=0.6, alpha=0.35, **style)
        what = "attraction" if own else "repulsion by"
        label = f"{what} {_shortened(data.names[k], 16)} ({data.class_counts[k]:,})"
        lines += axis.plot(
            data.epochs, soft[:, k], linewidth=2.6 if own else 1.6, label=label, **_dotted(soft), **style
        )
    return lines


def _group_curves(axis: Axes, data: Components) -> list[Line2D]:
    window = smoothing_window(len(data.epochs))
    soft, lines = smoothed(data.norms, window), []
    for group, mask in data.groups.items():
        members = np.flatnonzero(np.asarray(mask))
        members = members[members != data.row]
        if not len(members):
            continue
        colour = GROUP_COLOURS[group]
        low, middle, high = np.percentile(soft[:, members], [25, 50, 75], axis=1)
        label = f"repulsion by a {group} class (median of {len(members):,}, middle half)"
        lines += axis.plot(data.epochs, middle, color=colour, linewidth=1.8, label=label, **_dotted(soft))
        axis.fill_between(data.epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        if window > 1:
            axis.plot(data.epochs, np.median(data.norms[:, members], axis=1), color=colour, linewidth=0.6, alpha=0.4)
    style = {"color": "black", "linestyle": "--"}
    if window > 1:
        axis.plot(data.epochs, data.norms[:, data.row], linewidth=0.6, alpha=0.35, **style)
    own = axis.plot(data.epochs, soft[:, data.row], linewidth=2.6, label="attraction", **_dotted(soft), **style)
    return [*own, *lines]


def collapse_figure(runs: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Neural-collapse metrics over the epochs.

    ``runs``: "epochs" [E] and the metrics of :func:`methods.neural_collapse.nc_metrics`, each [E] with NaN where there
    is none. NC4 is drawn in percent. Class means have full lines, classifier rows dashed ones.
    """
    panels = {
        "NC1: within / between classes": (("nc1", "-"),),
        "NC2: lengths unequal (std / mean)": (("nc2_equinorm", "-"), ("nc2_equinorm_weights", "--")),
        "NC2: angles off -1/(C-1)": (("nc2_equiangle", "-"), ("nc2_equiangle_weights", "--")),
        "NC3: rows against class means": (("nc3", "-"),),
        "NC4: not the nearest mean (%)": (("nc4", "-"),),
        "distance to the simplex": (("simplex_means", "-"), ("simplex_weights", "--")),
        "distance to SELI": (("seli_means", "-"), ("seli_weights", "--")),
    }
    figure = _new(WIDE, 5.6)
    axes = figure.subplots(2, 4).ravel()
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for number, values in enumerate(runs.values()):
            for key, line in curves:
                if key in values:
                    y = np.asarray(values[key], float) * (100 if key == "nc4" else 1)
                    style = {"color": COLOURS[number % len(COLOURS)], "linestyle": line, "linewidth": 1.5}
                    axis.plot(values["epochs"], y, **style, **_dotted(y))
        if title.startswith("NC1"):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        _dress(axis, title, "epoch", "", SMALL)
    axes[-1].set_axis_off()
    lines = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], label=_wrapped(label, 30))
        for number, label in enumerate(runs)
    ]
    kinds = [
        Line2D([], [], color="grey", linestyle=s, label=t) for s, t in (("-", "class means"), ("--", "classifier rows"))
    ]
    axes[-1].legend(handles=[*lines, *kinds], loc="center", fontsize=SMALL, frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Figures of training and of post-hoc adjustment


def learning_figure(runs: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Training loss and top-1 over the epochs; dotted lines where a learning rate falls to less than half.

    ``runs``: "epochs", "loss", "train_top1", "lr" [E] and "test_epochs", "test_top1" [E'], in percent.
    """
    figure, (left, right) = _panels(2, 4.2)
    falls = set()
    for number, (label, values) in enumerate(runs.items()):
        colour, epochs = COLOURS[number % len(COLOURS)], np.asarray(values["epochs"])
        rate = np.asarray(values["lr"], float)
        falls |= set(epochs[1:][rate[1:] < 0.5 * rate[:-1]].tolist())
        left.plot(epochs, values["loss"], color=colour, linewidth=1.6, label=_plain(label), **_dotted(epochs))
        right.plot(epochs, values["train_top1"], color=colour, linewidth=1.2, linestyle="--", **_dotted(epochs))
        right.plot(values["test_epochs"], values["test_top1"], color=colour, linewidth=1.6, **_dotted(epochs))
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for epoch in falls:
            axis.axvline(epoch, color="grey", linestyle=":", linewidth=1)
    _dress(left, "Training loss", "epoch", "mean loss (nats)")
    _dress(right, "Top-1", "epoch", "top-1 (%)")
    right.set_ylim(-2, 102)
    kinds = [("-", "test"), ("--", "training")] + [(":", "learning rate falls")] * bool(falls)
    handles = [*left.get_lines()[: len(runs)], *(Line2D([], [], color="grey", linestyle=s, label=t) for s, t in kinds)]
    _legend(figure, handles)
    return figure


def tau_figure(curves: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Top-1 after post-hoc logit adjustment over its strength tau: a panel per run.

    ``curves``: "values" [T] of tau, "top1", "many", "medium", "few" [T] in percent where there are any, and "best", the
    two cross-fitted choices.
    """
    figure, axes = _panels(len(curves), 4.2, sharey=True)
    styles = {"top1": ("black", 2.4), **{group: (GROUP_COLOURS[group], 1.5) for group in GROUPS}}
    for axis, (label, values) in zip(axes, curves.items(), strict=True):
        for key, (colour, width) in styles.items():
            if key in values:
                y = np.asarray(values[key], float)
                axis.plot(values["values"], y, color=colour, linewidth=width, label={"top1": "all"}.get(key, key))
        for best in set(values["best"]):
            axis.axvline(best, color="grey", linestyle=":", linewidth=1.2, label="cross-fitted tau")
        axis.set_ylim(-2, 102)
        _dress(axis, _wrapped(label, _room(len(curves))), "tau (0: the model as it is)", "top-1 (%)")
    handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    _legend(figure, list(handles.values()))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Figures of sweeps


def imbalance_figure(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Figure:
    """Accuracy over the imbalance ratio, one curve per arm, with 95 % intervals where there are any.

    ``arms``: "ratios", "means", "lows" and "highs" [K] in percent; an interval that is None is not drawn.
    """
    figure, (axis,) = _panels(1, 4.4, 8.0)
    ratios = sorted({ratio for data in arms.values() for ratio in data["ratios"]})
    for number, (label, data) in enumerate(arms.items()):
        shift = 1 + 0.016 * (number - (len(arms) - 1) / 2)  # so that intervals do not lie on one another
        x, means = np.asarray(data["ratios"], float) * shift, np.asarray(data["means"], float)
        again = number // len(COLOURS)  # how often the colours were used up
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[(number + again) % len(MARKERS)]}
        line = ("-", "--", ":")[again % 3]
        axis.plot(x, means, **style, markersize=5, linewidth=1.2, linestyle=line, label=_plain(label))
        for at, low, high in zip(x, data["lows"], data["highs"], strict=True):
            if low is not None:
                axis.plot([at, at], [low, high], color=style["color"], linewidth=1.6, alpha=0.8)
    axis.set_xscale("log")
    axis.set_xlim(ratios[0] / 1.3, ratios[-1] * 1.3)
    axis.xaxis.set_minor_formatter(NullFormatter())
    told = [ratio for before, ratio in zip([0, *ratios], ratios, strict=False) if ratio > 1.1 * before]
    axis.set_xticks(told, [f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}" for ratio in told])
    _dress(axis, "Accuracy over imbalance", "imbalance ratio: largest class / smallest", "top-1, last epoch (%)")
    _legend(figure, axis.get_legend_handles_labels()[0])
    return figure


def waterfall_figure(
    bars: Sequence[tuple[str, float, float | None, float | None]], published: float | None = None
) -> Figure:
    """From one accuracy to another, step by step.

    ``bars``: (name, value, low, high); the first and the last are accuracies in percent, those between are changes in
    points. Low and high are of the value; None: not known. ``published``: drawn as a line.
    """
    figure, (axis,) = _panels(1, 4.8, WIDE)
    level, ends = 0.0, [] if published is None else [published]  # everything that has to be seen
    for number, (_, value, low, high) in enumerate(bars):
        whole = number in (0, len(bars) - 1)
        base = 0.0 if whole else level
        colour = "#7f7f7f" if whole else GROUP_COLOURS["many"] if value >= 0 else GROUP_COLOURS["few"]
        axis.bar(number, value, bottom=base, width=0.6, color=colour, edgecolor=colour)  # an edge: a step may be of 0
        interval = [] if low is None or high is None else [base + low, base + high]
        axis.plot([number] * len(interval), interval, color="black", linewidth=1.4)
        level = base + value
        ends += [level, *interval]
        text, top = f"{value:.2f}" if whole else f"{value:+.2f}", max(base, level, *interval)
        style = {"ha": "center", "va": "bottom", "fontsize": SMALL, "zorder": 4}
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axis.annotate(text, (number, top), (0, 3), textcoords="offset points", bbox=behind, **style)
        if number + 1 < len(bars):
            axis.plot([number + 0.3, number + 0.7], [level, level], color="grey", linewidth=0.8)
    room = max(0.02, 0.12 * (max(ends) - min(ends)))
    axis.set_ylim(max(0.0, min(ends) - room), max(ends) + room)
    width = int(140 / len(bars))  # characters below a bar
    axis.set_xticks(range(len(bars)), [_wrapped(name, max(width, 8)) for name, *_ in bars])
    _dress(axis, "Where the accuracy comes from", "", "top-1 (%)")
    if published is not None:
        style = {"color": "black", "linestyle": ":", "linewidth": 1.2}
        _legend(figure, [axis.axhline(published, **style, label=f"published: {published:g}")])
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Files


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class name in a script that the font lacks
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """:func:`png` in a file that is whole or not there."""
    content = png(figure)
    with atomic_file(path) as file:
        file.write(content)


# ---------------------------------------------------------------------------------------------------------------------
# Order and cells


def _by_frequency(class_counts: NDArray) -> NDArray:
    """Classes, the most frequent first."""
    return np.argsort(-class_counts, kind="stable")


def _rank_bins(class_counts: NDArray) -> tuple[NDArray, int]:
    """(cell of every class [C] in the order of frequency, number of cells)."""
    classes = len(class_counts)
    rank = np.empty(classes, np.int64)
    rank[_by_frequency(class_counts)] = np.arange(classes)
    return (rank, classes) if classes <= CELLS else (rank * BINS // classes, BINS)


def _count_bins(counts: NDArray, most: int = 14) -> list[NDArray]:
    """Masks of classes with similar counts, evenly in the logarithm."""
    edges = np.geomspace(counts.min(), counts.max(), most + 1)[1:-1]
    found = np.searchsorted(edges, counts, side="right")
    return [found == number for number in range(most)]


def _borders(axis: Axes, order: NDArray, groups: Mapping[str, ArrayLike]) -> None:
    """Lines between many, medium and few on a matrix, with their names above it."""
    ranks = {name: np.flatnonzero(np.asarray(mask)[order]) for name, mask in groups.items()}
    ranks = {name: found for name, found in ranks.items() if len(found)}
    if any(np.ptp(found) + 1 != len(found) for found in ranks.values()):
        return  # ranges of indices that do not follow the counts
    axis.set_title(axis.get_title(), fontsize=HEAD, pad=16)
    for name, found in ranks.items():
        if found[0] > 0:
            for line in (axis.axhline, axis.axvline):
                line(found[0], color="white", linewidth=2.2)
                line(found[0], color="#D55E00", linewidth=1.1)
        middle = (found[0] + found[-1] + 1) / 2
        axis.text(middle, 1.005, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# Looks


def _new(width: float, height: float, layout: str = "constrained") -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def _panels(
    number: int, height: float, width: float | None = None, sharey: bool = False, layout: str = "constrained"
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, two or three in a row; ``height`` in inches of one row of two.

    ``layout``: "compressed" where panels are square.
    """
    columns = number if number <= 3 else 2 if number == 4 else 3
    rows = -(-number // columns)
    tall = height * (0.8 if columns == 3 else 1)
    figure = _new(width or (WIDE if number > 1 else 7.0), rows * tall, layout)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for axis in axes[number:]:
        axis.remove()
    return figure, list(axes[:number])


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Below the axes, in as many columns as the longest entry leaves room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = int(figure.get_figwidth() / (0.55 + 0.062 * longest))
    columns = min(max(columns, 1), len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False)


def _dress(axis: Axes, title: str, x: str, y: str, size: int = TEXT) -> None:
    axis.set_title(title, fontsize=min(size + 1, HEAD))
    axis.set_xlabel(x, fontsize=size)
    axis.set_ylabel(y, fontsize=size)
    axis.tick_params(labelsize=SMALL)
    if not axis.images:
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)


def _map(name: str) -> Colormap:
    """A colour map in which a missing value is grey."""
    return colormaps[name].with_extremes(bad=NOTHING)


def _count_axis(axis: Axes, counts: NDArray) -> None:
    """Logarithmic, ticks as plain numbers; classes without training images stand at a half, which is called 0."""
    low, high = max(counts.min(), 0.5), max(counts.max(), 0.5)
    axis.set_xscale("log")
    axis.set_xlim(low / 1.3, high * 1.3)
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value < 1 else f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _rank_ticks(axis: Axes, classes: int) -> None:
    """Ranks from 1; where every class has its cell, ticks lie in its middle."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10**9) if classes / s <= 10)
    ranks = np.array([1, *range(step, classes + 1, step)]) if step > 1 else np.arange(1, classes + 1)
    for one in (axis.xaxis, axis.yaxis):
        one.set_ticks(ranks - 0.5, [f"{rank:,}" for rank in ranks])


def _numbers(axis: Axes, cells: NDArray) -> None:
    """Every cell's value in it, but for zeros."""
    for (row, column), value in np.ndenumerate(cells):
        if value > 0:
            colour = "black" if value > 35 else "white"
            text = f"{value:.0f}" if value >= 1 else "<1"
            size = 9 if len(cells) <= 10 else 7.5
            axis.text(column + 0.5, row + 0.5, text, color=colour, fontsize=size, ha="center", va="center")


def _dotted(values: NDArray) -> dict:
    """Points on curves so short that a line alone would not be seen."""
    return {"marker": "o", "markersize": 3} if len(values) <= 15 else {}


def _plain(text: str) -> str:
    """Text as it is: a dollar sign begins no formula, a first underscore hides no legend entry."""
    text = " ".join(str(text).split()).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _shortened(text: str, width: int = 24) -> str:
    text = " ".join(str(text).split())
    return _plain(text if len(text) <= width else f"{text[: width - 1]}…")


def _room(panels: int) -> int:
    """Characters that a title over one of so many panels has, see :func:`_panels`."""
    return 28 if panels == 3 or panels > 4 else 44


def _wrapped(text: str, width: int) -> str:
    return "\n".join(_plain(line) for line in textwrap.wrap(str(text), width))
