"""Adjacent similarity taken apart: by head, and by key token on the patch grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collapse_probe.plots.select import choose_group, titled
from collapse_probe.plots.sizes import figure_width, fold, narrow, room, set_heading, set_title
from collapse_probe.plots.style import (
    BLUE,
    SEQUENTIAL,
    colour_scale,
    narrow_scale,
    new_figure,
    paper,
    say_undefined,
    several_axes,
    single_axes,
    thinned_ticks,
)
from collapse_probe.result import Analysis, Group

_MOST_PANELS = 6


@paper()
def similarity_by_head(analysis: Analysis, ax: Axes | None = None, *, group: str | None = None) -> tuple[Figure, Axes]:
    """Heatmap heads x blocks: M between each head and the same head of the block before (0..1).

    Raises:
        UsageError: unknown group.
    """
    chosen = choose_group(analysis, group)
    values = _adjacent(chosen, "similarity_by_head").T
    figure, ax = single_axes(ax, figure_width(4.8), float(np.clip(1.3 + 0.19 * chosen.heads, 1.9, 4.6)))
    set_title(ax, titled("Similarity to the previous block, by head", analysis, chosen))
    if not np.isfinite(values).any():
        say_undefined(ax, "a single layer has no previous block" if len(chosen.layers) == 1 else "")
        return figure, ax
    ax.patch.set(facecolor="0.97", hatch="/////", edgecolor="0.7")
    scale = colour_scale(values, signed=False)
    sns.heatmap(values, ax=ax, **scale, xticklabels=False, yticklabels=False, cbar_kws={"label": "M", "pad": 0.02})
    ax.set(xlabel="Block p, compared with block p − 1", ylabel="Head")  # after seaborn, which clears them
    blocks, heads = thinned_ticks(values.shape[1]), thinned_ticks(values.shape[0])
    ax.set_xticks([tick + 0.5 for tick in blocks], labels=[str(tick + 1) for tick in blocks])
    ax.set_yticks([tick + 0.5 for tick in heads], labels=[str(tick) for tick in heads], rotation=0)
    return figure, ax


@paper()
def similarity_by_token(
    analysis: Analysis, ax: Axes | Sequence[Axes] | NDArray[Any] | None = None, *, group: str | None = None
) -> tuple[Figure, NDArray[Any]]:
    """M to the previous block by key token, on the patch grid, for evenly spaced neighbours; returns an array of axes.

    Prefix tokens (class token, registers) stand as numbers above each grid. Without a grid the tokens form a line. Keys
    of several windows are shown by their place in the window, as means over windows. All panels share one colour scale,
    fitted to the values shown and never narrower than 0.1.

    Args:
        analysis: what to show.
        ax: as many axes as neighbours are wanted (one: the last pair); by default up to six.
        group: name of the group; by default the one with most layers.

    Raises:
        UsageError: unknown group.
    """
    chosen = choose_group(analysis, group)
    values = over_windows(chosen, _adjacent(chosen, "similarity_by_token"))
    figure, axes = _panels(len(values)) if ax is None else several_axes(ax)
    if ax is None:
        set_heading(figure, titled("Similarity to the previous block, by key token", analysis, chosen))
    if not np.isfinite(values).any():
        for panel in axes:
            say_undefined(panel, "a single layer has no previous block" if len(chosen.layers) == 1 else "")
        return figure, axes
    shown = evenly_spaced(len(values), len(axes))
    norm = narrow_scale(values[shown])
    for panel, index in zip(axes, shown, strict=False):
        _draw_tokens(panel, chosen, values[index], norm)
        prefix = _prefix_words(values[index][: chosen.prefix_tokens])
        panel.set_title(f"Blocks {index}–{index + 1}{prefix}", fontweight="normal", fontsize=7.5)
    for panel in axes[len(shown) :]:
        panel.set_axis_off()
    if patch_grid(chosen) is not None:
        bar = figure.colorbar(ScalarMappable(norm, SEQUENTIAL), ax=list(axes), label="M", shrink=0.8)
        bar.outline.set_visible(False)
    return figure, axes


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """Up to ``wanted`` indices below ``available``, spread evenly, always with the last.

    >>> evenly_spaced(11, 6), evenly_spaced(11, 1)
    ([0, 2, 4, 6, 8, 10], [10])
    """
    picked = np.linspace(available - 1, 0, min(wanted, available)).round().astype(int)
    return [int(index) for index in np.unique(picked)]


def _adjacent(group: Group, name: str) -> NDArray[np.float64]:
    """``[L - 1, ...]``: entries (p - 1, p) of a stored ``[L, L, ...]`` array; one NaN row where there are none."""
    stored = group.arrays.get(name)
    if stored is None or len(group.layers) < 2:
        return np.full((1, 1), np.nan)
    later = np.arange(1, len(group.layers))
    return np.asarray(stored, dtype=np.float64)[later - 1, later]


def over_windows(group: Group, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[..., W K]`` -> ``[..., K]``: means over the windows in which a token is attended to."""
    if group.windows == 1 or values.shape[-1] != group.windows * group.keys:
        return values
    by_window = values.reshape(*values.shape[:-1], group.windows, group.keys)
    count = np.isfinite(by_window).sum(-2)
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, np.nansum(by_window, axis=-2) / count, np.nan)


def _panels(available: int) -> tuple[Figure, NDArray[Any]]:
    count = min(available, _MOST_PANELS)
    columns = min(count, 2 if narrow(figure_width(4.4)) else 3)
    rows = -(-count // columns)
    width = figure_width(max(1.45 * columns + 0.7, 4.4) if columns > 1 else 3.6)
    figure = new_figure(width, (min((width - 0.7) / columns, 2.2) + 0.3) * rows + 0.4)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def patch_grid(group: Group) -> tuple[int, int] | None:
    """The patch grid, where prefix and grid account for every key token."""
    if group.grid is None or group.prefix_tokens + group.grid[0] * group.grid[1] != group.keys:
        return None
    return group.grid


def _draw_tokens(ax: Axes, group: Group, values: NDArray[np.float64], norm: Normalize) -> None:
    grid = patch_grid(group)
    if grid is None:
        ax.plot(values, color=BLUE, linewidth=0.8)
        place = "Key token of a window" if group.windows > 1 else "Key token"
        ax.set(xlabel=fold(place, room(ax), 8), ylabel="M", ylim=(norm.vmin, norm.vmax))
        return
    ax.patch.set(facecolor="0.97", hatch="/////", edgecolor="0.7")
    ax.imshow(values[group.prefix_tokens :].reshape(grid), norm=norm, cmap=SEQUENTIAL, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _prefix_words(values: NDArray[np.float64]) -> str:
    """What the title says of tokens that have no place on the grid."""
    if not np.isfinite(values).any():
        return ""
    if len(values) == 1:
        return f"\nprefix token: {values[0]:.2f}"
    return f"\n{len(values)} prefix: {np.nanmin(values):.2f}–{np.nanmax(values):.2f}"
