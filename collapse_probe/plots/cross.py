"""What sets models apart: layers of one beside those of another, and differences of readings with their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collapse_probe.comparison import Comparison, Cross
from collapse_probe.differences import ALL_BLOCKS
from collapse_probe.errors import UsageError
from collapse_probe.plots.matrices import colour_bar, side_of
from collapse_probe.plots.panels import STYLES
from collapse_probe.plots.sizes import figure_width, fold, narrow, room, set_title
from collapse_probe.plots.style import (
    as_written,
    colour_scale,
    new_figure,
    paper,
    say_undefined,
    single_axes,
    thinned_ticks,
)
from collapse_probe.readings import READINGS

#: Reading between two models -> title and label of its colour bar.
BETWEEN = {
    "cka": ("CKA of token features", "Linear CKA"),
    "similarity": ("Similarity M of maps", "Cosine of columns"),
    "centred": ("Centred M of maps", "Correlation of columns"),
}

#: Readings that say the same as another one in other units, or nearly.
_REPEATED = ("_typical", "_pixels", "_frobenius")

#: Inches for the names of readings beside their differences: in a figure of one column, in others.
_NAMES = {True: 1.2, False: 2.0}

#: Adjusted p below which a difference is called one.
SIGNIFICANT = 0.05


@paper()
def cross_similarity(cross: Cross) -> tuple[Figure, NDArray[Any]]:
    """Every layer of one model (rows) beside every layer of another (columns); returns a flat array of axes.

    CKA of token features, and where both models' maps are over the same tokens, cosine and correlation of attention
    columns (maps as means over heads). The diagonal of relative depth is dashed: models that do the same at the same
    depth are bright along it.
    """
    shown = [name for name in BETWEEN if name in cross.matrices and np.isfinite(cross.matrices[name]).any()]
    if not shown:
        figure, ax = single_axes(None, figure_width(4.6), 2.4)
        say_undefined(ax, "layers of these models cannot be compared")
        return figure, np.array([ax], dtype=object)
    width = figure_width(2.75 * len(shown) + 0.2)
    columns = 1 if narrow(width) else len(shown)
    rows = -(-len(shown) // columns)
    each = width / columns
    figure = new_figure(width, rows * (each + 0.6 if each < 2.75 else 2.75))
    figure.set_layout_engine("compressed")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, name in zip(axes, shown, strict=True):
        values = cross.matrices[name]
        title, label = BETWEEN[name]
        ax.set_title(fold(title, room(ax), 9, "bold"))
        ax.set_box_aspect(1)
        ax.patch.set(facecolor="0.97", hatch="/////", edgecolor="0.7")
        scale = colour_scale(values, signed=name == "centred")
        first, second = (fold(f"Block of {_short(name)}", side_of(ax), 8) for name in (cross.first, cross.second))
        bar = colour_bar(ax, label, (scale["vmin"], scale["vmax"]))
        sns.heatmap(values, ax=ax, **scale, xticklabels=False, yticklabels=False, cbar_kws=bar)
        rows, columns = values.shape
        ax.plot([0, columns], [0, rows], color="0.5", linestyle="--", linewidth=0.8)
        for axis, count in ((ax.xaxis, columns), (ax.yaxis, rows)):
            ticks = thinned_ticks(count, most=8)
            axis.set_ticks([tick + 0.5 for tick in ticks], labels=[str(tick) for tick in ticks], rotation=0)
        ax.set(xlabel=second, ylabel=first)
    return figure, axes


@paper()
def differences(comparison: Comparison, ax: Axes | None = None, *, where: str = ALL_BLOCKS) -> tuple[Figure, Axes]:
    """Differences from the first model as points with 95 % intervals, a line for each reading, in units of the larger
    of the two values.

    Filled: the difference is beyond chance (p < 0.05 after Holm's adjustment for all readings and places).

    Args:
        comparison: what to show.
        ax: axes to draw on; new ones by default.
        where: the part of the depth: ``"all blocks"``, ``"first third"``, ``"middle third"`` or ``"last third"``.

    Raises:
        UsageError: no difference is known there.
    """
    tables = {label: _relative(table[table["where"] == where]) for label, table in comparison.differences.items()}
    names = [
        name
        for name in READINGS
        if not name.endswith(_REPEATED) and any(name in table.index for table in tables.values())
    ]
    if not names:
        places = sorted({place for table in comparison.differences.values() for place in table["where"]})
        raise UsageError(f"No difference is known of where={where!r}; there are {places}.")
    width = figure_width(4.8)
    lines = 0.27 if narrow(width) else 0.2  # names of readings on two lines, or on one
    figure, ax = single_axes(ax, width, 0.8 + lines * len(names) + 0.15 * len(tables))
    beside = _NAMES[narrow(width)]
    height = {name: -place for place, name in enumerate(names)}
    for number, ((label, table), (colour, marker, _)) in enumerate(zip(tables.items(), STYLES, strict=False)):
        shift = 0.2 * (number - (len(tables) - 1) / 2)
        heights = np.array([height[name] - shift for name in table.index])
        errors = np.nan_to_num([table["difference"] - table["low"], table["high"] - table["difference"]])
        ax.errorbar(table["difference"], heights, xerr=errors, fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.5)
        clear = table["p_adjusted"].to_numpy() < SIGNIFICANT
        for chosen, face in ((clear, colour), (~clear, "white")):
            ax.plot(
                table["difference"][chosen],
                heights[chosen],
                marker,
                color=colour,
                markerfacecolor=face,
                markersize=3.6,
                label=as_written(label) if face == colour else "_open",
            )
    ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    labels = [fold(READINGS[name].label, beside, 6.5) for name in names]
    ax.set_yticks(list(height.values()), labels=labels, fontsize=6.5)
    ax.set_ylim(-len(names) + 0.4, 0.6)
    ax.grid(visible=True)
    ax.set_axisbelow(True)
    words = f"Difference from {_short(comparison.reference)}\n(share of the larger of the two values)"
    ax.set_xlabel(fold(words, room(ax) - beside, 8))
    set_title(ax, f"Differences, {where}")
    if len(tables) > 1:
        ax.legend(loc="best", fontsize=7)
    return figure, ax


def _relative(table: pd.DataFrame) -> pd.DataFrame:
    """Differences and intervals over the larger of the two values, by reading; readings of 0 in both are left out."""
    table = table.set_index("reading")
    size = table[["first", "second"]].abs().max(axis=1)
    table = table[(size > 0) & ~table.index.str.endswith(_REPEATED)].copy()
    for name in ("difference", "low", "high"):
        table[name] = table[name] / size[table.index]
    return table


def _short(label: str, most: int = 28) -> str:
    label = as_written(label)
    return label if len(label) <= most else label[: most - 1] + "…"
