"""The look of figures: style, panels, legends, axes, and text that matplotlib does not interpret."""

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

DPI = 150
WIDE, SINGLE = 11.0, 5.4  # inches: the width of a page, and a little less than half of it
SMALL = 8  # points
STYLE = {
    "figure.dpi": DPI,
    "font.size": SMALL,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
MATRIX = {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}
TICKS = {"labelsize": SMALL, "grid_color": "#e5e5e5", "grid_linewidth": 0.6}
# Okabe and Ito's palette, safe for colour-blind readers, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GROUP_COLOURS = {"many": "#0072B2", "medium": "#E69F00", "few": "#D55E00"}
UNDEFINED = "#d9d9d9"  # colour of a cell without a value


def styled(**rc: object) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Draw a figure in :data:`STYLE`, changed by ``rc``, whatever the process's own rcParams are."""

    def decorate(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(draw)
        def in_style(*args, **kwargs) -> Figure:
            with matplotlib.rc_context(STYLE | rc):
                figure = draw(*args, **kwargs)
            for axis in figure.axes:  # ticks are created when the figure is rendered, outside this context
                axis.tick_params(**TICKS)
            return figure

        return in_style

    return decorate


def panels(
    number: int, height: float, width: float | None = None, sharey: bool = False, layout: str = "constrained"
) -> tuple[Figure, list[Axes]]:
    """Create ``number`` panels, two or three in a row of ``height`` inches (less if there are three).

    ``layout``: "compressed" for square panels.
    """
    columns = number if number <= 3 else 2 if number == 4 else 3
    rows = -(-number // columns)
    tall = height * (0.8 if columns == 3 else 1)
    figure = Figure(figsize=(width or (WIDE if number > 1 else 7.0), rows * tall), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for axis in axes[number:]:
        axis.remove()
    return figure, list(axes[:number])


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Place the legend below the axes, in as many columns as the longest entry allows."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = int(figure.get_figwidth() / (0.55 + 0.062 * longest))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(max(columns, 1), len(handles)))


def grey_lines(kinds: Mapping[str, str]) -> list[Line2D]:
    """Legend entries by line style."""
    return [Line2D([], [], color="grey", linestyle=style, label=label) for style, label in kinds.items()]


def run_colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def colour_map(name: str) -> Colormap:
    return colormaps[name].with_extremes(bad=UNDEFINED)


def markers(values: ArrayLike) -> dict:
    """Mark the points of curves too short to be seen as lines."""
    return {"marker": "o", "markersize": 3} if len(values) <= 15 else {}


def plain_log_ticks(axis: Axis, steps: Sequence[int], text: Callable[[float], str]) -> None:
    """Label a logarithmic axis with plain numbers instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def count_axis(axis: Axes, counts: NDArray) -> None:
    """Make x logarithmic; classes without training images are at 0.5, which is labelled 0."""
    low, high = max(counts.min(), 0.5), max(counts.max(), 0.5)
    axis.set(xscale="log", xlim=(low / 1.3, high * 1.3))
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    plain_log_ticks(axis.xaxis, steps, lambda value: "0" if value < 1 else f"{value:,.0f}")


def rank_ticks(axis: Axes, classes: int) -> None:
    """Label both axes with ranks from 1, in the middle of their cells."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10**9) if classes / s <= 10)
    ranks = np.array([1, *range(step, classes + 1, step)]) if step > 1 else np.arange(1, classes + 1)
    for one in (axis.xaxis, axis.yaxis):
        one.set_ticks(ranks - 0.5, [f"{rank:,}" for rank in ranks])


def cell_values(axis: Axes, cells: NDArray) -> None:
    """Write every non-zero value into its cell."""
    for (row, column), value in np.ndenumerate(cells):
        if value > 0:
            style = {"color": "black" if value > 35 else "white", "fontsize": 9 if len(cells) <= 10 else 7.5}
            text = f"{value:.0f}" if value >= 1 else "<1"
            axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", **style)


def borders(axis: Axes, order: NDArray, groups: Mapping[str, ArrayLike]) -> None:
    """Draw and name the borders between many, medium and few on a matrix, unless a group is not contiguous."""
    ranks = {name: np.flatnonzero(np.asarray(mask)[order]) for name, mask in groups.items()}
    ranks = {name: members for name, members in ranks.items() if len(members)}
    if any(np.ptp(members) + 1 != len(members) for members in ranks.values()):
        return  # index ranges that do not follow the counts
    axis.set_title(axis.get_title(), pad=16)
    for name, members in ranks.items():
        if members[0] > 0:
            for line in (axis.axhline, axis.axvline):
                line(members[0], color="white", linewidth=2.2)
                line(members[0], color="#D55E00", linewidth=1.1)
        middle = (members[0] + members[-1] + 1) / 2
        axis.text(middle, 1.005, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom")


def plain(text: str) -> str:
    """Escape what matplotlib would interpret: dollar signs (mathtext) and a leading underscore (no legend entry)."""
    text = " ".join(str(text).split()).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def shortened(text: str, width: int = 24) -> str:
    text = " ".join(str(text).split())
    return plain(text if len(text) <= width else f"{text[: width - 1]}…")


def wrapped(text: str, width: int) -> str:
    return "\n".join(plain(line) for line in textwrap.wrap(str(text), width))


def title_width(panels: int) -> int:
    """Characters that fit above one of so many panels, see :func:`panels`."""
    return 28 if panels == 3 or panels > 4 else 44
