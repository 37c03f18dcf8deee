"""Readings by block: adjacent similarity with its parts, head diversity, entropy and relative variation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from collapse_probe.plots.select import Arrangement, arrange, column, spread, titled
from collapse_probe.plots.sizes import figure_width, fold, narrow, room, set_title
from collapse_probe.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    VERMILION,
    bracket,
    new_figure,
    paper,
    say_undefined,
    several_axes,
    single_axes,
    thinned_ticks,
    title_pad,
)
from collapse_probe.result import Analysis

#: Column of the layers table -> label, colour, marker, line style: four lines that stay apart in grey.
ADJACENT = {
    "similarity_to_previous": ("similarity M", BLACK, "o", "-"),
    "image_independent_to_previous": ("image-independent part", BLUE, "s", "--"),
    "centred_to_previous": ("centred similarity", VERMILION, "^", ":"),
    "excess_to_previous": ("image-specific excess", GREEN, "D", "-."),
}

_PREVIOUS = "Block p, compared with block p − 1"

#: Points between axes and a key below them, where the axis has its numbers and a label of one line; those of another.
_BELOW, _LINE = 25, 10
#: Inches that two columns of a key, or sixteen numbers on an axis, take.
_WIDE = 3.2


@paper()
def adjacent_similarity(analysis: Analysis, ax: Axes | None = None, *, group: str | None = None) -> tuple[Figure, Axes]:
    """Similarity of each block's attention to the block before it, with its parts; error bars are ±1 standard error.

    Where the analysis has 95 % intervals (image-independent part, excess), error bars are these, and the key says so.

    Shaded blocks are those that the analysis counts as similar to their predecessor. Several groups stand side by side
    as in :func:`layer_similarity`; the first layer of a group has no predecessor.

    Raises:
        UsageError: unknown group.
    """
    shown = arrange(analysis, group)
    table = analysis.layers.loc[shown.layers]
    width = _width(4.8, shown)
    figure, ax = single_axes(ax, width, (1.7 if narrow(width) else 1.2) + 0.44 * min(width, 4.8))
    title = "Similarity to the previous block"
    set_title(ax, title if shown.several else titled(title, analysis, shown.groups[0]), pad=title_pad(shown.several))
    ax.set_ylabel("Cosine similarity")
    drawn = [_curve(ax, table, name, *look) for name, look in ADJACENT.items()]
    _block_axis(ax, shown, f"{shown.label} and the one before it in its group" if shown.several else _PREVIOUS)
    if not any(drawn):
        say_undefined(ax, _why_nothing_precedes(shown))
        return figure, ax
    ax.axhline(0, color="0.4", linewidth=0.6, zorder=1)
    if not shown.several:
        ax.set_xlim(0.5, max(len(table) - 0.5, 1.5))
    ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.03)
    _shade_similar(ax, column(table, "similar_to_previous"))
    _legend(ax)
    return figure, ax


@paper()
def head_diversity(analysis: Analysis, ax: Axes | None = None, *, group: str | None = None) -> tuple[Figure, Axes]:
    """Head diversity by layer, ±1 standard error: 1 - mean cosine between different heads (DeepViT, fig. 3c).

    In 0..1 for probabilities; after re-attention heads can oppose each other, and it reaches beyond 1. Several groups
    stand side by side as in :func:`layer_similarity`, each with a line of its own.

    Raises:
        UsageError: unknown group.
    """
    shown = arrange(analysis, group)
    table = analysis.layers.loc[shown.layers]
    width = _width(4.6, shown)
    figure, ax = single_axes(ax, width, 0.6 + 0.5 * min(width, 4.6))
    set_title(ax, "Head diversity", pad=title_pad(shown.several))
    ax.set(ylabel="1 − cross-head similarity", ylim=(-0.03, _top(table)))
    _block_axis(ax, shown)
    if not _bands(ax, shown, table, "head_diversity", BLUE, "o"):
        only_one = column(table, "heads")
        say_undefined(ax, "each layer has a single head" if (only_one == 1).all() else "")
    return figure, ax


def _top(table: pd.DataFrame) -> float:
    values = column(table, "head_diversity")
    return max(1.03, 1.05 * float(np.nanmax(values, initial=0.0)))


@paper()
def entropy(
    analysis: Analysis, ax: Sequence[Axes] | NDArray[Any] | None = None, *, group: str | None = None
) -> tuple[Figure, NDArray[Any]]:
    """Two panels by layer: entropy of attention rows over log K (1 is uniform), relative variation r of the columns.

    Together they tell untrained, near-uniform attention from collapse, which similarity cannot. Bands are ±1 standard
    error.

    Args:
        analysis: what to show.
        ax: two axes, or None for a new figure.
        group: one group's layers only; by default all, group by group.

    Raises:
        UsageError: unknown group, or not two axes.
    """
    shown = arrange(analysis, group)
    table = analysis.layers.loc[shown.layers]
    if ax is None:
        width = _width(4.6, shown)
        figure = new_figure(width, 1.2 + 0.7 * min(width, 4.6))
        axes = figure.subplots(2, 1)
    else:
        figure, axes = several_axes(ax, count=2)
    upper, lower = axes
    upper.set_title("Attention entropy", pad=title_pad(shown.several))
    upper.set(ylabel="Entropy / log K", ylim=(-0.03, 1.03))
    lower.set_title("Relative variation of attention columns", pad=title_pad(shown.several))
    lower.set(ylabel="r (log scale)")
    for axis in axes:
        _block_axis(axis, shown)
    if not _bands(upper, shown, table, "normalized_entropy", BLUE, "o"):
        say_undefined(upper, "rows of these maps are not probabilities" if _no_probabilities(table) else "")
    if _bands(lower, shown, table, "relative_variation", VERMILION, "s"):
        variation_axis(lower, smallest=float(np.nanmin(column(table, "relative_variation"))))
    else:
        say_undefined(lower)
    return figure, axes


def _why_nothing_precedes(shown: Arrangement) -> str:
    if any(len(group.layers) > 1 for group in shown.groups):
        return ""
    return "no two layers are in one group" if shown.several else "a single layer has no previous block"


def _width(width: float, shown: Arrangement) -> float:
    """Inches; more where many layers of several groups stand side by side, unless the caller has chosen a width."""
    return figure_width(max(width, 1.2 + 0.2 * len(shown.layers)) if shown.several else width)


def _curve(ax: Axes, table: pd.DataFrame, name: str, label: str, colour: str, marker: str, dashes: str) -> bool:
    """One line with error bars; False where nothing is defined."""
    values = column(table, name)
    if not np.isfinite(values).any():
        return False
    low, high, interval = spread(table, name)
    ax.errorbar(
        np.arange(len(values)),
        values,
        # An interval of replicates may leave out the value itself by a rounding error.
        yerr=np.nan_to_num([values - low, high - values]).clip(min=0),
        label=f"{label} (95 %)" if interval else label,
        color=colour,
        marker=marker,
        linestyle=dashes,
        capsize=2,
        elinewidth=0.8,
    )
    return True


def _bands(ax: Axes, shown: Arrangement, table: pd.DataFrame, name: str, colour: str, marker: str) -> bool:
    """A line with a band of ±1 standard error for each group; False where nothing is defined."""
    values, (low, high, _) = column(table, name), spread(table, name)
    if not np.isfinite(values).any():
        return False
    for start, stop in shown.spans:
        at, own = np.arange(start, stop), slice(start, stop)
        ax.fill_between(at, low[own], high[own], color=colour, alpha=0.25, linewidth=0)
        ax.plot(at, values[own], color=colour, marker=marker)
    return True


def _shade_similar(ax: Axes, similar: NDArray[np.float64]) -> None:
    for number, block in enumerate(np.flatnonzero(similar == 1)):
        label = "_nolegend_" if number else "counted as similar"
        ax.axvspan(block - 0.5, block + 0.5, color="0.9", linewidth=0, zorder=0, label=label)


def _legend(ax: Axes) -> None:
    """Below the axes, lines before the shading."""
    handles, labels = ax.get_legend_handles_labels()
    lines_first = sorted(zip(handles, labels, strict=True), key=lambda pair: pair[1] == "counted as similar")
    gap = _BELOW + _LINE * ax.get_xlabel().count("\n")
    below = ax.transAxes + ScaledTranslation(0, -gap / 72, ax.figure.dpi_scale_trans)
    ax.legend(
        *zip(*lines_first, strict=True), loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below,
        ncols=2 if _wide(ax) else 1,
    )  # fmt: skip


def variation_axis(ax: Axes, smallest: float) -> None:
    """A logarithmic axis that can still show r = 0, the constant column."""
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_ylim(1e-3 if smallest > 1e-3 else 0, 1.2)
    ax.yaxis.set_major_locator(FixedLocator([0, 0.001, 0.01, 0.1, 1]))
    ax.yaxis.set_minor_locator(FixedLocator([]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _wide(ax: Axes) -> bool:
    return room(ax) > _WIDE


def _block_axis(ax: Axes, shown: Arrangement, label: str = "") -> None:
    count = len(shown.layers)
    ticks = thinned_ticks(count, 16 if _wide(ax) else 9)
    ax.set_xlabel(fold(label or shown.label, room(ax), 8))
    ax.set_xticks(ticks, labels=[str(shown.numbers[tick]) for tick in ticks])
    ax.set_xlim(-0.5, count - 0.5)
    ax.grid(visible=True)
    ax.set_axisbelow(True)
    if shown.several:
        spans = [(start - 0.5, stop - 0.5) for start, stop in shown.spans]
        bracket(ax, spans, [group.name for group in shown.groups])
        for _, stop in spans[:-1]:
            ax.axvline(stop, color="0.8", linewidth=0.6, zorder=0)


def _no_probabilities(table: pd.DataFrame) -> bool:
    return bool((column(table, "is_probability") == 0).all())
