"""Several analyses beside each other: heatmaps on one colour scale, readings by depth on common axes.

Analyses of one depth share their block numbers; where depths differ, the axis is relative, 0 the first block and 1 the
last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.plots.matrices import READINGS
from collapse_probe.plots.panels import STYLES
from collapse_probe.plots.select import column, spread
from collapse_probe.plots.sizes import figure_width, fold, narrow, room
from collapse_probe.plots.style import (
    as_written,
    colour_scale,
    new_figure,
    paper,
    say_undefined,
    several_axes,
    single_axes,
    thinned_ticks,
)
from collapse_probe.result import Analysis

#: Column of the layers table -> title of its panel. All are cosines or shares.
CURVES = {
    "similarity_to_previous": "M to previous block",
    "image_independent_to_previous": "Image-independent part of M",
    "centred_to_previous": "Centred M",
    "normalized_entropy": "Entropy / log K",
    "cross_head_similarity": "Similarity of heads",
    "feature_similarity_to_last": "Features to last block",
}

#: More lines than this are not told apart in black and white.
MOST = len(STYLES)


@paper()
def heatmaps_compared(
    analyses: Mapping[str, Analysis],
    reading: str = "similarity",
    ax: Axes | Sequence[Axes] | NDArray[np.object_] | None = None,
) -> tuple[Figure, NDArray[np.object_]]:
    """One reading between every two layers of each analysis' main group, side by side; returns a flat array of axes.

    Args:
        analyses: what to show, by label; at most four.
        reading: as for :func:`~collapse_probe.plots.layer_similarity`, of attention columns or rows.
        ax: as many axes, or None for a new figure.

    Raises:
        UsageError: no analysis or too many, an analysis without layers, an unknown reading, or not as many axes.
    """
    _check(analyses)
    if reading not in READINGS:
        raise UsageError(f"reading={reading!r} is unknown; choose one of {list(READINGS)}.")
    matrices = [item.main_group.matrices.get("all", {}).get(reading, np.empty((0, 0))) for item in analyses.values()]
    scale = colour_scale(np.concatenate([matrix.ravel() for matrix in matrices]), reading in ("centred", "excess"))
    figure, axes = _side_by_side(len(analyses)) if ax is None else several_axes(ax, count=len(analyses))
    drawn = []
    for panel, label, matrix in zip(axes, analyses, matrices, strict=True):
        title = "\n".join(as_written(label).split(", ", 1))
        panel.set_title(fold(title, room(panel), 9, "bold"))
        panel.set_box_aspect(1)
        if not np.isfinite(matrix).any():
            say_undefined(panel, "for any two layers")
            continue
        panel.patch.set(facecolor="0.97", hatch="/////", edgecolor="0.7")
        sns.heatmap(matrix, ax=panel, **scale, square=True, cbar=False, xticklabels=False, yticklabels=False)
        ticks = thinned_ticks(len(matrix), most=8)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_ticks([tick + 0.5 for tick in ticks], labels=[str(tick) for tick in ticks], rotation=0)
        panel.set(xlabel="Block", ylabel="Block" if panel is axes[0] else "")
        drawn.append(panel)
    if drawn:
        figure.colorbar(drawn[0].collections[0], ax=list(axes), label=READINGS[reading][1], shrink=0.75)
    return figure, axes


@paper()
def curves_compared(analyses: Mapping[str, Analysis]) -> tuple[Figure, NDArray[np.object_]]:
    """Six readings by depth, a line for each analysis' main group; returns a flat array of axes.

    Bands are ±1 standard error over images, or 95 % intervals where the analysis has them. Readings that no analysis
    has are left out.

    Raises:
        UsageError: no analysis or too many, or an analysis without layers.
    """
    _check(analyses)
    tables = {label: item.layers.loc[item.main_group.layers] for label, item in analyses.items()}
    shown = [name for name in CURVES if any(np.isfinite(column(table, name)).any() for table in tables.values())]
    if not shown:
        figure, ax = single_axes(None)
        say_undefined(ax, "these analyses hold none of the readings shown here")
        return figure, np.array([ax], dtype=object)
    width = figure_width(7.0)
    columns = min(2 if narrow(width) else 3, len(shown))
    rows = -(-len(shown) // columns)
    relative = len({len(table) for table in tables.values()}) > 1
    figure = new_figure(width, 1.75 * rows + 0.35 + (0.12 * len(analyses) if narrow(width) else 0))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(shown) :]:
        ax.remove()
    for name, ax in zip(shown, axes, strict=False):
        size = 8 if narrow(width) else 9
        ax.set_title(fold(CURVES[name], room(ax), size, "bold"), fontsize=size)
        ax.set(xlabel="Relative depth" if relative else "Block")
        ax.grid(visible=True)
        for (label, table), (colour, marker, line) in zip(tables.items(), STYLES, strict=False):
            depth = np.linspace(0, 1, len(table)) if relative else np.arange(len(table))
            values = column(table, name)
            low, high, _ = spread(table, name)
            ax.fill_between(depth, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.plot(
                depth, values, line, color=colour, marker=marker, markersize=2.6, linewidth=1.1, label=as_written(label)
            )
        _limits(ax)
        if not relative:
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    keys = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        keys.values(), keys.keys(), loc="outside lower center", ncols=1 if narrow(width) else min(len(keys), 3)
    )
    return figure, axes[: len(shown)]


def _side_by_side(count: int) -> tuple[Figure, NDArray[np.object_]]:
    """A figure for so many heatmaps with one colour bar, two in a row on one column, and its axes, flat."""
    width = figure_width(2.25 * count + 0.7)
    columns = min(count, 2) if narrow(width) else count
    rows = -(-count // columns)
    figure = new_figure(width, rows * ((width - 0.7) / columns + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _check(analyses: Mapping[str, Analysis]) -> None:
    if not 1 <= len(analyses) <= MOST:
        raise UsageError(f"Between 1 and {MOST} analyses can be shown side by side, not {len(analyses)}.")
    for label, analysis in analyses.items():
        if not analysis.groups:
            raise UsageError(f"{label!r} holds no layers, so there is nothing to plot.")


def _limits(ax: Axes) -> None:
    """Cosines and shares: up to 1 and down to 0, further where there is something below."""
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.03), max(high, 1.03))
    if low < -0.05:
        ax.axhline(0, color="0.4", linewidth=0.6, zorder=1)
