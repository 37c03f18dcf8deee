"""Readings over training steps: curves of some blocks and of their mean, heatmaps of M on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.plots.matrices import READINGS as MATRICES
from collapse_probe.plots.panels import STYLES
from collapse_probe.plots.select import column, spread
from collapse_probe.plots.style import (
    as_written,
    colour_scale,
    new_figure,
    paper,
    say_undefined,
    thinned_ticks,
)
from collapse_probe.readings import reading_of
from collapse_probe.result import Analysis
from collapse_probe.series import UNITS, Series, in_words

#: Column of the layers table -> title of its panel: the readings that tell whether attention collapses.
CURVES = {
    "similarity_to_previous": "M to previous block",
    "centred_to_previous": "Centred M",
    "image_independent_to_previous": "Image-independent part of M",
    "normalized_entropy": "Entropy / log K",
    "cross_head_similarity": "Similarity of heads",
    "token_similarity": "Similarity of tokens",
}

#: So many heatmaps at most stand beside each other.
MOST_HEATMAPS = 12
_COLUMNS = 4

_SIGNED = ("centred", "excess")

#: Steps get a logarithmic axis where the largest is this many times the smallest, and most of them lie far below the
#: middle: those that are evenly spaced do not, however many there are.
_DECADES, _MOSTLY_EARLY = 100, 0.2
_MOST_MARKED = 30


@paper()
def over_steps(series: Series, readings: Sequence[str] | None = None) -> tuple[Figure, NDArray[np.object_]]:
    """Readings of the main group over the steps of a series; returns a flat array of axes, one for each reading.

    The black line is the mean over blocks, the grey area reaches from the smallest block to the largest. Beside it, an
    early block, the middle one and the last have lines of their own, with bands of ±1 standard error over images or,
    where the analyses have them, 95 % intervals.

    Args:
        series: what to show.
        readings: columns of the layers table; by default those of :data:`CURVES` that the series has.

    Raises:
        UsageError: a reading is unknown, or an analysis without layers.
    """
    _check(series)
    for name in readings or ():
        if reading_of(name) is None:
            raise UsageError(f"{name!r} is no reading: collapse-probe metrics --json lists them.")
    shown = list(readings) if readings else [name for name in CURVES if np.isfinite(_values(series, name)).any()]
    columns = min(3, max(len(shown), 1))
    rows = max(-(-len(shown) // columns), 1)
    figure = new_figure(max(2.35 * columns, 3.6), 1.85 * rows + 0.45)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[max(len(shown), 1) :]:
        ax.remove()
    if not shown:
        say_undefined(axes[0], "these analyses hold none of the readings shown here")
        return figure, axes[:1]
    blocks = _blocks(series)
    for number, (name, ax) in enumerate(zip(shown, axes, strict=False)):
        _curves(ax, series, name, blocks)
        step_axis(ax, series, labelled=number + columns >= len(shown))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
    return figure, axes[: len(shown)]


@paper()
def heatmaps_over_steps(
    series: Series, reading: str = "similarity", most: int = MOST_HEATMAPS
) -> tuple[Figure, NDArray[np.object_]]:
    """One reading between every two layers of the main group, step by step, on the colour scale of the whole series.

    Args:
        series: what to show.
        reading: as for :func:`~collapse_probe.plots.layer_similarity`, of attention columns or rows.
        most: how many steps at most; of more, the first, the last, and some evenly between them are shown.

    Returns:
        The figure, and a flat array of axes, one for each step shown.

    Raises:
        UsageError: an unknown reading, `most` below 1, or an analysis without layers.
    """
    _check(series)
    scale = _scale(series, reading)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise UsageError(f"most={most!r} must be a whole number, 1 or more.")
    chosen = spaced(len(series), most)
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(1.55 * columns + 0.9, 1.75 * rows + 0.15)
    axes = figure.subplots(rows, columns, squeeze=False)
    flat = axes.ravel()
    for ax in flat[len(chosen) :]:
        ax.remove()
    for number, place in enumerate(chosen):
        ax = flat[number]
        below = number + columns >= len(chosen)
        _heatmap(ax, series, place, reading, scale, most_ticks=6)
        ax.set(xlabel="Block" if below else "", ylabel="" if number % columns else "Block")
    drawn = [ax for ax in flat[: len(chosen)] if ax.collections]
    if drawn:
        figure.colorbar(drawn[0].collections[0], ax=list(flat[: len(chosen)]), label=MATRICES[reading][1], shrink=0.8)
    return figure, flat[: len(chosen)]


@paper()
def heatmap_at(series: Series, place: int, reading: str = "similarity") -> tuple[Figure, Axes]:
    """One step of :func:`heatmaps_over_steps`, larger; figures of all steps have the same scale and layout.

    Args:
        series: what to show.
        place: which of its checkpoints, from 0.
        reading: as there.

    Raises:
        UsageError: an unknown reading, or an analysis without layers.
    """
    _check(series)
    scale = _scale(series, reading)
    figure = new_figure(4.2, 3.6)
    ax = figure.subplots()
    _heatmap(ax, series, place, reading, scale, most_ticks=16)
    ax.set(xlabel="Block", ylabel="Block")
    if ax.collections:
        figure.colorbar(ax.collections[0], ax=ax, label=MATRICES[reading][1], shrink=0.9)
    return figure, ax


def spaced(count: int, most: int) -> list[int]:
    """Places below `count`: all, or `most` of them evenly from the first to the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)} if most > 1 else {count - 1})


def title_of(series: Series, place: int) -> str:
    """A step in words, for example ``"Step 500"``."""
    words = {"step": "Step", "epoch": "Epoch", "number": "No.", "order": "Checkpoint"}[series.unit]
    return f"{words} {in_words(series.points[place].step)}"


def _check(series: Series) -> None:
    for point in series.points:
        if not point.analysis.groups:
            raise UsageError(f"{point.label!r} holds no layers, so there is nothing to plot.")


def _values(series: Series, name: str) -> NDArray[np.float64]:
    return np.concatenate([column(_table(point.analysis), name) for point in series.points])


def _table(analysis: Analysis) -> pd.DataFrame:
    return analysis.layers.loc[analysis.main_group.layers]


def _blocks(series: Series) -> list[int]:
    """An early block, the middle one and the last; none where models of different depth are compared."""
    depths = {len(point.analysis.main_group.layers) for point in series.points}
    if len(depths) > 1:
        return []
    depth = depths.pop()
    return sorted({min(1, depth - 1), depth // 2, depth - 1})


def _curves(ax: Axes, series: Series, name: str, blocks: Sequence[int]) -> None:
    steps = np.array(series.steps, dtype=np.float64)
    tables = [_table(point.analysis) for point in series.points]
    found = [values[np.isfinite(values)] for values in (column(table, name) for table in tables)]
    marked = 3.0 if len(steps) <= _MOST_MARKED else 0.0
    low, mean, high = (np.array([reduce(item) if len(item) else np.nan for item in found]) for reduce in _REDUCTIONS)
    if any(len(item) > 1 for item in found):
        ax.fill_between(steps, low, high, color="0.5", alpha=0.18, linewidth=0, label="smallest to largest block")
    colour, marker, line = STYLES[0]
    ax.plot(
        steps,
        mean,
        line,
        color=colour,
        marker=marker,
        markersize=marked,
        linewidth=1.8,
        label="mean of blocks",
        zorder=3,
    )
    for block, (colour, marker, line) in zip(blocks if len(tables[0]) > 1 else (), STYLES[1:], strict=False):
        values = np.array([column(table, name)[block] for table in tables])
        ends = np.array([[end[block] for end in spread(table, name)[:2]] for table in tables])
        ax.fill_between(steps, ends[:, 0], ends[:, 1], color=colour, alpha=0.22, linewidth=0)
        ax.plot(
            steps, values, line, color=colour, marker=marker, markersize=0.9 * marked, linewidth=1.0,
            markerfacecolor="white", markeredgewidth=0.8, label=f"block {block}",
        )  # fmt: skip
    reading = reading_of(name)
    ax.set_title(as_written(CURVES.get(name, name if reading is None else reading.label)), fontsize=8)
    ax.grid(visible=True)
    ax.set_axisbelow(True)
    _limits(ax, name)


_REDUCTIONS = (np.min, np.mean, np.max)


def _limits(ax: Axes, name: str) -> None:
    """The whole range of a reading that has one, and more where values leave it."""
    reading = reading_of(name)
    low, high = ax.get_ylim()
    if reading is not None and reading.high is not None:
        least, most = low if reading.low is None else min(low, reading.low), max(high, reading.high)
        margin = 0.03 * (most - least)
        low, high = min(low, least - margin), max(high, most + margin)
        ax.set_ylim(low, high)
    if low < -0.05 < high:
        ax.axhline(0, color="0.4", linewidth=0.6, zorder=1)


def step_axis(ax: Axes, series: Series, labelled: bool = True) -> None:
    """The steps along x: logarithmic where they span decades and most are early, with 0 where there is one."""
    steps = np.array(series.steps, dtype=np.float64)
    ax.set_xlabel(UNITS[series.unit] if labelled else "")
    if len(steps) == 1:
        ax.set_xticks(steps)
    elif _spans_decades(steps):
        smallest, largest = steps[steps > 0][0], steps[-1]
        zero = steps[0] == 0
        ax.set_xscale("symlog" if zero else "log", **({"linthresh": smallest} if zero else {}))
        ax.set_xlim(-0.3 * smallest if zero else smallest / 1.5, 1.5 * largest)
        decades = SymmetricalLogLocator(base=10, linthresh=smallest) if zero else LogLocator(numticks=6)
        decades.set_params(numticks=6)
        ax.xaxis.set_major_locator(decades)
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        whole = bool((steps == steps.round()).all())
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(_short))  # a new scale brings its own


def _spans_decades(steps: NDArray[np.float64]) -> bool:
    positive = steps[steps > 0]
    if len(positive) < 3 or steps[0] < 0 or positive[-1] < _DECADES * positive[0]:
        return False
    return bool(np.median(positive) < _MOSTLY_EARLY * positive[-1])


def _short(value: float, _position: int | None = None) -> str:
    """2500 as 2.5k, 1000000 as 1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _scale(series: Series, reading: str) -> dict[str, object]:
    if reading not in MATRICES:
        raise UsageError(f"reading={reading!r} is unknown; choose one of {list(MATRICES)}.")
    values = np.concatenate([_matrix(point.analysis, reading).ravel() for point in series.points])
    return colour_scale(values, signed=reading in _SIGNED)


def _matrix(analysis: Analysis, reading: str) -> NDArray[np.float64]:
    return analysis.main_group.matrices.get("all", {}).get(reading, np.empty((0, 0)))


def _heatmap(ax: Axes, series: Series, place: int, reading: str, scale: dict[str, object], most_ticks: int) -> None:
    matrix = _matrix(series.points[place].analysis, reading)
    ax.set_title(title_of(series, place))
    ax.set_box_aspect(1)
    if not np.isfinite(matrix).any():
        return say_undefined(ax, "for any two layers")
    ax.patch.set(facecolor="0.97", hatch="/////", edgecolor="0.7")
    sns.heatmap(matrix, ax=ax, **scale, square=True, cbar=False, xticklabels=False, yticklabels=False)
    ticks = thinned_ticks(len(matrix), most=most_ticks)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([tick + 0.5 for tick in ticks], labels=[str(tick) for tick in ticks], rotation=0)
    return None
