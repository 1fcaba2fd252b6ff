"""The figures: what is drawn is what was given, nothing is cut off, and legends do not cover curves."""

import importlib.util
import io
import itertools
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from PIL import Image

from utils.metrics import calibration_error, groups_by_count
from utils.report import plots, style

LONG = "digits_imb005_arbloss_mixup_20261121163420"  # as long as folders' names are


def counts_of(classes):
    return np.round(1000 * 0.005 ** (np.arange(classes) / max(classes - 1, 1))).astype(int)


def predictions_of(classes):
    """(classes, confidences, targets) [N], three of four right, three images of each class."""
    draw = np.random.default_rng(0)
    targets = np.repeat(np.arange(classes), 3)
    right = draw.random(len(targets)) < 0.75
    return np.where(right, targets, draw.integers(0, classes, len(targets))), draw.random(len(targets)), targets


def simplex(classes):
    return np.eye(classes) - 1 / classes


def components_of(classes, epochs=40, row=-1):
    draw, counts = np.random.default_rng(0), counts_of(classes)
    norms = draw.random((epochs, classes)) + 0.1
    groups = {name: mask.numpy() for name, mask in groups_by_count(torch.from_numpy(counts)).items()}
    names = [f"species {i}" for i in range(classes)]
    return plots.Components(np.arange(epochs), norms, row % classes, counts, names, groups)


def tau_curve():
    values = np.linspace(-1, 2, 31)
    return {"values": values, "top1": 50 - values**2, "many": 60 - values, "few": 20 + values, "best": [0.5, 1.0]}


def collapse_of(epochs):
    keys = ("nc1", "nc2_equinorm", "nc2_equinorm_weights", "nc2_equiangle", "nc2_equiangle_weights", "nc3", "nc4")
    keys += ("simplex_means", "simplex_weights", "seli_means", "seli_weights")
    return {"epochs": np.arange(epochs)} | {key: np.linspace(1, 0.1 * n, epochs) for n, key in enumerate(keys, start=1)}


def curves_of(epochs):
    falling = np.linspace(2, 1, epochs)
    rate = np.where(np.arange(epochs) < 30, 0.1, 0.01)
    every = {"epochs": np.arange(epochs), "loss": falling, "train_top1": 100 - 10 * falling, "lr": rate}
    return every | {"test_epochs": np.arange(1, epochs, 2), "test_top1": 90 - 10 * falling[1::2]}


def draw_figure(name, classes=10, runs=2):
    """One of each kind; runs have long names."""
    labels, counts = [f"{LONG}_{n}" for n in range(runs)], counts_of(classes)
    guessed, confidences, targets = predictions_of(classes)
    names = [f"a species {i} with a long name" for i in range(classes)]
    if name == "confusion":
        return plots.confusion_figure(guessed, targets, counts, names, components_of(classes).groups, LONG)
    if name == "reliability":
        return plots.reliability_figure(confidences, guessed, targets, LONG)
    if name == "imbalance":
        return plots.imbalance_figure(over_imbalance(runs))
    if name == "runs":
        return plots.runs_figure(single_runs(runs))
    if name == "waterfall":
        return plots.waterfall_figure(*WATERFALLS["large steps"])
    weight = np.random.default_rng(0).normal(size=(classes, 16))
    draw, data = {
        "accuracy": (plots.class_accuracy_figure, (counts, np.linspace(0, 100, classes))),
        "similarity": (plots.similarity_figure, (weight - weight.mean(axis=0), counts)),
        "components": (plots.components_figure, components_of(classes)),
        "collapse": (plots.collapse_figure, collapse_of(20)),
        "learning": (plots.learning_figure, curves_of(40)),
        "tau": (plots.tau_figure, tau_curve()),
    }[name]
    return draw(dict.fromkeys(labels, data))


FIGURES = ["accuracy", "confusion", "reliability", "similarity", "components"]  # that depend on the number of classes
FIGURES += ["collapse", "learning", "tau", "imbalance", "waterfall", "runs"]


def over_imbalance(arms, half=1.0):
    """So many arms with long names over five ratios; the last ones have no interval."""
    ratios = [10.0, 20.0, 50.0, 100.0, 200.0]
    found = {}
    for number in range(arms):
        means = [90.0 - 2 * number - 3 * k for k in range(5)]
        ends = {key: [*(mean + sign * half for mean in means[:4]), None] for key, sign in (("lows", -1), ("highs", 1))}
        found[f"arm_{number}_{LONG}"] = {"ratios": ratios, "means": means, **ends}
    return found


def single_runs(arms):
    """So many arms with long names; the last one has a single run, and the first a published figure."""
    found = {}
    for number in range(arms):
        mean, one = 80.0 + number, number == arms - 1
        interval = {"low": None, "high": None} if one else {"low": mean - 2, "high": mean + 2}
        runs = {"runs": [mean] if one else [mean - 1, mean, mean + 1], "published": [83.3] if number == 0 else []}
        found[f"arm_{number}_{LONG}"] = {"mean": mean, **interval, **runs}
    return found


def falls(start, changes, half):
    """A waterfall's bars, the steps' names long."""
    steps = [(f"step {n} of the way there", change, change - half, change + half) for n, change in enumerate(changes)]
    end = start + sum(changes)
    return [("none", start, start - half, start + half), *steps, (f"{LONG[:28]}, best", end, end - half, end + half)]


WATERFALLS = {
    "large steps": (falls(70.4, [8.1, 2.7, -1.5, 0.4, 1.2, 0.3], 0.9), 83.3),
    "small steps": (falls(80.0, [0.05, -0.03, 0.1, 0.0, -0.06, 0.02], 0.02), None),
    "wide intervals": (falls(70.0, [3.0, -5.0, 8.0, -2.0, 4.0, -1.0], 12.0), 83.3),
    "steps down": (falls(30.0, [-25.0, 10.0, -8.0, 40.0, -3.0, 1.0], 1.0), 10.0),
    "many steps": (falls(70.0, [1.0] * 12, 0.5), 83.3),
}


def check_apart(boxes, pixels):
    """No two of them share so many pixels."""
    for box, other in itertools.combinations(boxes, 2):
        across = min(box.x1, other.x1) - max(box.x0, other.x0)
        along = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(across, along) < pixels, (box, other)


def check_layout(figure):
    """Everything lies within the figure, axes lie beside one another, and legends beside axes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = figure.bbox.size
    boxes = [axis.get_tightbbox(renderer) for axis in figure.axes if axis.axison]
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    for box in [*boxes, *legends]:
        assert box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2, (box, width, height)
    check_apart([*boxes, *legends], 3)
    smallest = min(text.get_fontsize() for axis in figure.axes for text in axis.get_xticklabels())
    assert smallest >= style.SMALL


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(name):
    check_layout(draw_figure(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes", "runs"),
    [
        *((name, 8142, 2) for name in FIGURES[:5]),
        *(("confusion", classes, 2) for classes in (2, 20, 100)),
        *(("collapse", 10, 3), ("learning", 10, 3), ("tau", 10, 1), ("similarity", 10, 4), ("components", 100, 1)),
    ],
)
def test_nothing_is_cut_off_at_other_sizes(name, classes, runs):
    check_layout(draw_figure(name, classes, runs))


@pytest.mark.slow
@pytest.mark.parametrize("arms", [1, 7, 12])
def test_curves_over_imbalance_fit_with_one_arm_and_with_many(arms):
    figure = plots.imbalance_figure(over_imbalance(arms))
    check_layout(figure)
    check_text(figure)


@pytest.mark.slow
@pytest.mark.parametrize("name", WATERFALLS)
def test_waterfalls_fit_and_nothing_lies_on_a_number(name):
    figure = plots.waterfall_figure(*WATERFALLS[name])
    check_layout(figure)
    check_text(figure)
    low, high = figure.axes[0].get_ylim()
    drawn = [y for line in figure.axes[0].get_lines() for y in line.get_ydata()]
    assert low <= min(drawn) and max(drawn) <= high
    assert high - low < 1.6 * np.ptp(drawn)


def check_text(figure):
    """Numbers, ticks and the title lie beside one another, and numbers within the axes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, (axis,) = canvas.get_renderer(), figure.axes
    inside, boxes = axis.get_window_extent(renderer), [axis.title.get_window_extent(renderer)]
    for text in axis.texts:
        box = text.get_window_extent(renderer)
        boxes.append(box)
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1 + 1 and inside.x0 <= box.x0 and box.x1 <= inside.x1
    for ticks, limits, side in ((axis.xaxis, axis.get_xlim(), 0), (axis.yaxis, axis.get_ylim(), 1)):
        shown = [t for t in ticks.get_ticklabels() if t.get_text() and limits[0] <= t.get_position()[side] <= limits[1]]
        boxes += [text.get_window_extent(renderer) for text in shown]  # those beyond the limits are not drawn
    check_apart(boxes, 1)


def test_the_style_neither_depends_on_the_processs_own_nor_changes_it():
    with matplotlib.rc_context({"font.size": 30, "axes.labelsize": 30, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        drawn = draw_figure("confusion"), draw_figure("learning")
        assert dict(matplotlib.rcParams) == before
        for axis in (each.axes[0] for each in drawn):
            assert axis.xaxis.label.get_fontsize() == 9
            assert {text.get_fontsize() for text in axis.get_xticklabels()} == {style.SMALL}
        grids = [each.axes[0].get_xgridlines()[0].get_visible() for each in drawn]
        assert grids == [False, True]


def test_pyplot_is_never_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    spec = importlib.util.spec_from_file_location("fresh_plots", plots.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_plots", fresh)
    spec.loader.exec_module(fresh)
    fresh.png(fresh.similarity_figure({"run": (simplex(3), [3, 2, 1])}))
    assert "matplotlib.pyplot" not in sys.modules


def test_a_png_file_has_the_figures_size_and_appears_at_once(tmp_path):
    figure = plots.tau_figure({"run": tau_curve()})
    plots.save_png(figure, tmp_path / "tau.png")
    with Image.open(tmp_path / "tau.png") as image:
        assert image.size == tuple(int(style.DPI * inches) for inches in figure.get_size_inches())
        assert len(image.convert("RGB").getcolors(10**6)) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["tau.png"]


@pytest.mark.parametrize("name", ["$x_1$ and $\\frac", "_hidden", "two\nlines 名前 <b>&"])
def test_names_are_drawn_as_they_are(name):
    names = [name, "b", "c"]
    figure = plots.confusion_figure([0, 1, 2], [0, 1, 2], [3, 2, 1], names, title=name)
    labels = plots.components_figure({name: components_of(3, 4)._replace(names=names)}).legends[0].get_texts()
    assert len(labels) == 3
    assert Image.open(io.BytesIO(plots.png(figure))).size[0] > 100


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_accuracy_is_drawn_over_counts_without_untested_classes():
    figure = plots.class_accuracy_figure({"one": ([10, 100, 0, 5], [50.0, np.nan, 20.0, 80.0])})
    (line,) = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [0.5, 5, 10]  # a class without training images stands left of all
    assert line.get_ydata().tolist() == [20.0, 80.0, 50.0]
    assert figure.axes[0].get_xscale() == "log"
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert "10" in ticks and "0" in ticks and not any("10^" in tick for tick in ticks)


@pytest.mark.parametrize(("classes", "lines"), [(30, 1), (31, 2), (1001, 1)])
def test_many_classes_are_drawn_as_means_over_similar_counts(classes, lines):
    counts, accuracy = counts_of(classes), np.linspace(100, 0, classes)
    figure = plots.class_accuracy_figure({"run": (counts, accuracy)})
    drawn = figure.axes[0].get_lines()
    assert len(drawn) == lines
    assert len(figure.axes[0].collections) == (classes > 1000)  # the band
    if classes > 30:
        x, y = drawn[-1].get_data()
        assert len(x) <= 14 and (np.diff(x) > 0).all() and (np.diff(y) > 0).all()
        lowest = accuracy[counts < counts.min() * (counts.max() / counts.min()) ** (1 / 14)]
        assert y[0] == pytest.approx(lowest.mean())


def test_small_confusion_matrices_have_names_and_numbers_and_borders():
    groups = {"many": [False, True, False], "medium": [False, False, True], "few": [True, False, False]}
    figure = plots.confusion_figure([1, 1, 2, 0, 2], [1, 1, 1, 1, 2], [5, 50, 20], ["a", "b", "c"], groups)
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["b (50)", "c (20)", "a (5)"]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["b", "c", "a"]
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["50", "25", "25", "100", "many", "medium", "few"]
    assert sorted({line.get_xdata()[0] for line in axis.get_lines()}) == [0, 1, 2]  # the horizontal ones begin at 0
    groups = {
        "many": [True, False, True],
        "medium": [False, True, False],
        "few": [False] * 3,
    }  # not by count: no borders
    figure = plots.confusion_figure([0, 1, 2], [0, 1, 2], [50, 20, 5], ["a", "b", "c"], groups)
    assert not figure.axes[0].get_lines()


def test_reliability_draws_the_bins_of_the_calibration_error():
    guessed, confidences, targets = predictions_of(100)
    expected = calibration_error(*map(torch.from_numpy, (confidences, guessed, targets)))
    figure = plots.reliability_figure(confidences, guessed, targets, "run")
    top, bottom = figure.axes
    assert f"ECE {100 * expected['ece']:.2f} %" in top.get_title()
    bars, gaps = top.containers
    assert [bar.get_height() for bar in bars] == pytest.approx(expected["bin_accuracy"].tolist())
    assert [bar.get_x() for bar in bars] == pytest.approx([n / 15 for n in range(15)])
    ends = [{gap.get_y(), gap.get_y() + gap.get_height()} for gap in gaps]
    for end, accuracy, confidence in zip(ends, expected["bin_accuracy"], expected["bin_confidence"], strict=True):
        assert sorted(end) == pytest.approx(sorted([float(accuracy), float(confidence)]))
    assert sum(bar.get_height() for bar in bottom.containers[0]) == pytest.approx(100)


def test_similarities_of_several_runs_share_a_scale_around_the_ideal():
    wild = simplex(10) * np.linspace(1, 4, 10)[:, None]
    wild -= wild.mean(axis=0)
    figure = plots.similarity_figure({"tame": (simplex(10), counts_of(10)), "wild": (wild, counts_of(10))})
    first, second = (axis.images[0] for axis in figure.axes[:2])
    assert first.get_clim() == second.get_clim()
    assert sum(first.get_clim()) == pytest.approx(2)


def test_undefined_similarities_are_grey_and_counted():
    weight = simplex(6)
    weight[0] = 0.5 * weight[1]
    axis = plots.similarity_figure({"run": (weight, np.arange(6, 0, -1))}).axes[0]
    assert "undefined rows (grey): 1" in axis.get_title()
    image = axis.images[0]
    assert image.to_rgba(image.get_array())[0, 1] == pytest.approx(to_rgba(style.UNDEFINED), abs=0.01)


def test_components_have_a_curve_for_every_class():
    data = components_of(10, 12)
    figure = plots.components_figure({"ce": data, "arb": data._replace(norms=2 * data.norms)})
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[1] >= 2 * data.norms.max()
    drawn = {line.get_label(): line for line in left.get_lines()}
    own = drawn.pop("attraction by species 9 (5)")
    assert own.get_linestyle() == "--" and own.get_color() == "black"
    assert own.get_ydata() == pytest.approx(data.norms[:, 9])
    assert len(drawn) == 9
    assert drawn["repulsion by species 0 (1,000)"].get_ydata() == pytest.approx(data.norms[:, 0])
    assert len({str(line.get_color()) for line in drawn.values()}) == 9


def test_components_of_many_classes_are_medians_of_groups():
    data = components_of(100, 12)
    figure = plots.components_figure({"run": data})
    (axis,) = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert axis.get_yscale() == "log"
    few = np.flatnonzero(data.groups["few"])
    few = few[few != data.row]
    label = f"repulsion by few-shot classes (median of {len(few)})"
    assert drawn[label] == pytest.approx(np.median(data.norms[:, few], axis=1))
    assert drawn["attraction"] == pytest.approx(data.norms[:, 99])
    assert len(axis.collections) == 3


def test_collapse_has_a_curve_for_every_metric_and_run():
    values = collapse_of(5)
    figure = plots.collapse_figure({"one": values, "two": values})
    assert [len(axis.get_lines()) for axis in figure.axes] == [2, 4, 4, 2, 2, 4, 4, 0]
    assert figure.axes[0].get_yscale() == "log"
    assert all(axis.get_ylabel() and axis.get_xlabel() == "epoch" for axis in figure.axes[:7])
    assert figure.axes[4].get_lines()[0].get_ydata() == pytest.approx(100 * values["nc4"])
    assert figure.axes[6].get_lines()[1].get_linestyle() == "--"


def test_learning_curves_mark_where_the_rate_falls():
    figure = plots.learning_figure({"run": curves_of(40)})
    left, right = figure.axes
    assert [line.get_xdata()[0] for line in left.get_lines() if line.get_linestyle() == ":"] == [30]
    test = right.get_lines()[1]
    assert test.get_xdata().tolist() == curves_of(40)["test_epochs"].tolist()
    assert test.get_ydata() == pytest.approx(curves_of(40)["test_top1"])


def test_tau_is_drawn_for_the_groups_there_are():
    figure = plots.tau_figure({"run": tau_curve()})
    assert len(figure.axes[0].get_lines()) == 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "many", "few", "cross-fitted tau"]


def test_accuracy_over_imbalance_is_drawn_with_its_intervals():
    arms = over_imbalance(3, half=2.5)
    (axis,) = plots.imbalance_figure(arms).axes
    assert axis.get_xscale() == "log"
    curves = [line for line in axis.get_lines() if line.get_marker() != "None"]
    intervals = [line for line in axis.get_lines() if line.get_marker() == "None"]
    assert len(intervals) == 3 * 4  # the last ratio has none
    for curve, (label, data) in zip(curves, arms.items(), strict=True):
        assert curve.get_label() == label and curve.get_ydata().tolist() == data["means"]
        assert curve.get_xdata() == pytest.approx(data["ratios"], rel=0.02)
        own = [line for line in intervals if line.get_color() == curve.get_color()]
        assert [list(line.get_ydata()) for line in own] == [[m - 2.5, m + 2.5] for m in data["means"][:4]]
        assert [line.get_xdata()[0] for line in own] == curve.get_xdata()[:4].tolist()
    assert len({curve.get_xdata()[0] for curve in curves}) == 3  # intervals beside one another
    assert [text.get_text() for text in axis.get_xticklabels()] == ["10", "20", "50", "100", "200"]


def test_ratios_that_are_nearly_the_same_share_a_tick():
    data = {"ratios": [100 / 3, 100.0, 100.5, 1000.0], "means": [4, 3, 2, 1], "lows": [None] * 4, "highs": [None] * 4}
    figure = plots.imbalance_figure({"a": data})
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["33.3", "100", "1,000"]


def test_arms_beyond_the_colours_look_otherwise():
    lines = plots.imbalance_figure(over_imbalance(12)).axes[0].get_lines()
    curves = [line for line in lines if line.get_marker() != "None"]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in curves}) == 12


def test_single_runs_are_drawn_with_mean_interval_and_published_figure():
    arms = single_runs(3)
    figure = plots.runs_figure(arms)
    (axis,) = figure.axes
    points, lines = axis.collections[::2], axis.collections[1::2]
    for row, (data, own, published) in enumerate(zip(arms.values(), points, lines, strict=True)):
        assert own.get_offsets()[:, 0].tolist() == data["runs"] and set(own.get_offsets()[:, 1]) == {row - 0.15}
        assert [segment[:, 0].tolist() for segment in published.get_segments()] == [[x, x] for x in data["published"]]
    drawn = [line.get_xdata() for line in axis.get_lines()]
    assert [list(x) for x in drawn] == [[80.0], [78.0, 82.0], [81.0], [79.0, 83.0], [82.0]]
    assert [len(axis.get_yticklabels()), axis.yaxis_inverted()] == [3, True]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a run", "mean, 95 % interval", "published"]
    unpublished = plots.runs_figure({"a": {**data, "published": []}})
    assert len(unpublished.legends[0].get_texts()) == 2


def test_a_waterfall_s_bars_stand_on_what_came_before():
    bars = [("start", 70.0, 69.0, 71.0), ("up", 8.0, 7.0, 9.0), ("down", -3.0, None, None), ("none", 0.0, -1.0, 1.0)]
    figure = plots.waterfall_figure([*bars, ("end", 75.0, 74.0, 76.0)], published=83.3)
    (axis,) = figure.axes
    drawn = [(bar.get_y(), bar.get_height()) for bar in axis.patches]
    assert drawn == [(0, 70), (70, 8), (78, -3), (75, 0), (0, 75)]
    assert [text.get_text() for text in axis.texts] == ["70.00", "+8.00", "-3.00", "+0.00", "75.00"]
    drawn = {"black": [], "grey": []}
    for line in axis.get_lines():
        drawn[line.get_color()] += [list(line.get_ydata())] if len(line.get_ydata()) else []
    # Intervals are of the level that a step leads to.
    assert drawn["black"] == [[69, 71], [77, 79], [74, 76], [74, 76], [83.3, 83.3]]
    assert drawn["grey"] == [[70, 70], [78, 78], [75, 75], [75, 75]]
    colours = [bar.get_facecolor() for bar in axis.patches]
    assert colours[0] == colours[4] and colours[1] == colours[3] and len(set(colours)) == 3
    assert [text.get_text() for text in axis.get_xticklabels()] == ["start", "up", "down", "none", "end"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["published: 83.3"]
    assert not plots.waterfall_figure(bars).legends
