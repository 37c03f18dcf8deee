"""Readings by block: adjacent similarity with its parts, head diversity, entropy and relative variation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from numpy.typing import NDArray

from collapse_probe.plots.select import choose_group, column, titled
from collapse_probe.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    VERMILION,
    new_figure,
    paper,
    say_undefined,
    several_axes,
    single_axes,
    thinned_ticks,
)
from collapse_probe.result import Analysis

#: Column of the layers table -> label, colour, marker, line style: four lines that stay apart in grey.
ADJACENT = {
    "similarity_to_previous": ("similarity M", BLACK, "o", "-"),
    "image_independent_to_previous": ("image-independent part", BLUE, "s", "--"),
    "centred_to_previous": ("centred similarity", VERMILION, "^", ":"),
    "excess_to_previous": ("image-specific excess", GREEN, "D", "-."),
}


@paper()
def adjacent_similarity(analysis: Analysis, ax: Axes | None = None, *, group: str | None = None) -> tuple[Figure, Axes]:
    """Similarity of each block's attention to the block before it, with its parts; error bars are ±1 standard error.

    Shaded blocks are those that the analysis counts as similar to their predecessor.

    Raises:
        UsageError: unknown group.
    """
    chosen = choose_group(analysis, group)
    table = analysis.layers.loc[chosen.layers]
    figure, ax = single_axes(ax, 4.8, 3.3)
    ax.set(title=titled("Similarity to the previous block", analysis, chosen), ylabel="Cosine similarity")
    drawn = [_curve(ax, table, name, *look) for name, look in ADJACENT.items()]
    _block_axis(ax, len(table), "Block p, compared with block p − 1")
    if not any(drawn):
        say_undefined(ax, "a single layer has no previous block" if len(table) == 1 else "")
        return figure, ax
    ax.axhline(0, color="0.4", linewidth=0.6, zorder=1)
    ax.set_xlim(0.5, max(len(table) - 0.5, 1.5))
    ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.03)
    _shade_similar(ax, column(table, "similar_to_previous"))
    _legend(ax)
    return figure, ax


@paper()
def head_diversity(analysis: Analysis, ax: Axes | None = None, *, group: str | None = None) -> tuple[Figure, Axes]:
    """Head diversity by layer, ±1 standard error: 1 - mean cosine between different heads (DeepViT, fig. 3c).

    In 0..1 for probabilities; after re-attention heads can oppose each other, and it reaches beyond 1.

    A layer's own heads are compared, so all layers are shown in execution order unless ``group`` names one group.

    Raises:
        UsageError: unknown group.
    """
    table, axis_label = _layers_of(analysis, group)
    figure, ax = single_axes(ax, 4.6, 2.9)
    ax.set(title="Head diversity", ylabel="1 − cross-head similarity", ylim=(-0.03, _top(table)))
    _block_axis(ax, len(table), axis_label)
    if not _band(ax, table, "head_diversity", BLUE, "o"):
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
        group: one group's layers only; by default all layers, in execution order.

    Raises:
        UsageError: unknown group, or not two axes.
    """
    table, axis_label = _layers_of(analysis, group)
    if ax is None:
        figure = new_figure(4.6, 4.4)
        axes = figure.subplots(2, 1)
    else:
        figure, axes = several_axes(ax, count=2)
    upper, lower = axes
    upper.set(title="Attention entropy", ylabel="Entropy / log K", ylim=(-0.03, 1.03))
    lower.set(title="Relative variation of attention columns", ylabel="r (log scale)")
    for axis in axes:
        _block_axis(axis, len(table), axis_label)
    if not _band(upper, table, "normalized_entropy", BLUE, "o"):
        say_undefined(upper, "rows of these maps are not probabilities" if _no_probabilities(table) else "")
    if _band(lower, table, "relative_variation", VERMILION, "s"):
        _variation_axis(lower, smallest=float(np.nanmin(column(table, "relative_variation"))))
    else:
        say_undefined(lower)
    return figure, axes


def _layers_of(analysis: Analysis, group: str | None) -> tuple[pd.DataFrame, str]:
    """The rows to draw and the name of their axis: one group's blocks, or every layer."""
    chosen = choose_group(analysis, group)
    if group is None and len(analysis.groups) > 1:
        return analysis.layers, "Layer, in execution order"
    return analysis.layers.loc[chosen.layers], "Block"


def _curve(ax: Axes, table: pd.DataFrame, name: str, label: str, colour: str, marker: str, dashes: str) -> bool:
    """One line with error bars; False where nothing is defined."""
    values, error = column(table, name), column(table, f"{name}_se")
    if not np.isfinite(values).any():
        return False
    ax.errorbar(
        np.arange(len(values)),
        values,
        yerr=np.nan_to_num(error),
        label=label,
        color=colour,
        marker=marker,
        linestyle=dashes,
        capsize=2,
        elinewidth=0.8,
    )
    return True


def _band(ax: Axes, table: pd.DataFrame, name: str, colour: str, marker: str) -> bool:
    """One line with a band of ±1 standard error; False where nothing is defined."""
    values, error = column(table, name), np.nan_to_num(column(table, f"{name}_se"))
    if not np.isfinite(values).any():
        return False
    at = np.arange(len(values))
    ax.fill_between(at, values - error, values + error, color=colour, alpha=0.25, linewidth=0)
    ax.plot(at, values, color=colour, marker=marker)
    return True


def _shade_similar(ax: Axes, similar: NDArray[np.float64]) -> None:
    for number, block in enumerate(np.flatnonzero(similar == 1)):
        label = "_nolegend_" if number else "counted as similar"
        ax.axvspan(block - 0.5, block + 0.5, color="0.9", linewidth=0, zorder=0, label=label)


def _legend(ax: Axes) -> None:
    """Below the axes, lines before the shading."""
    handles, labels = ax.get_legend_handles_labels()
    lines_first = sorted(zip(handles, labels, strict=True), key=lambda pair: pair[1] == "counted as similar")
    ax.legend(*zip(*lines_first, strict=True), loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def _variation_axis(ax: Axes, smallest: float) -> None:
    """A logarithmic axis that can still show r = 0, the constant column."""
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_ylim(1e-3 if smallest > 1e-3 else 0, 1.2)
    ax.yaxis.set_major_locator(FixedLocator([0, 0.001, 0.01, 0.1, 1]))
    ax.yaxis.set_minor_locator(FixedLocator([]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _block_axis(ax: Axes, count: int, label: str) -> None:
    ax.set_xlabel(label)
    ax.set_xticks(thinned_ticks(count))
    ax.set_xlim(-0.5, count - 0.5)
    ax.grid(visible=True)
    ax.set_axisbelow(True)


def _no_probabilities(table: pd.DataFrame) -> bool:
    return bool((column(table, "is_probability") == 0).all())
