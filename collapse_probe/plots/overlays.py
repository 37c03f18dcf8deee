"""Maps on the patch grid, laid over the picture that a model saw: how they are painted.

The picture lies in grey under the colours, weakly, so that colours can be read off the bar; it stands beside them once
as it is. Values are those at the centres of patches, with bilinear interpolation between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.plots.sizes import figure_width, heading_height, narrow, set_heading, small_print
from collapse_probe.plots.style import DIVERGING, SEQUENTIAL, key_below, new_figure

#: How maps are coloured: each up to its own largest value, or all on one scale.
SCALES = ("panel", "shared")

#: Opacity of the colours, and the greys from black to white that lie under them.
_OPACITY, _UNDERLAY = 0.7, (0.25, 0.75)

#: Luminance of red, green and blue (Rec. 601), as Pillow's conversion to grey weighs them.
_LUMINANCE = (0.299, 0.587, 0.114)

#: Panels of a strip side by side: on one column of a page, on two.
_IN_A_ROW = {True: 4, False: 7}

#: Heights in inches: of the heading above a panel and the note below it, and of the colour bar; the note's font size.
_HEADING, _NOTE, _BAR, _NOTE_SIZE = 0.15, 0.28, 0.58, 6.5

#: Inches between panels side by side.
_GAP = 0.1

#: How what stands above a panel looks.
HEADING: dict[str, Any] = {"fontsize": 7.5, "fontweight": "normal", "loc": "center", "pad": 2}

#: Top, left, height and width of a patch, in shares of the picture.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Overlay:
    """One map on the patch grid.

    Attributes:
        values: ``[h, w]``.
        heading: what stands above it.
        note: what stands below it.
        mark: a patch to be outlined.
    """

    values: NDArray[np.floating]
    heading: str
    note: str = ""
    mark: Box | None = None


def strip(
    picture: NDArray[np.floating], overlays: Sequence[Overlay], title: str, words: Sequence[str], scale: str
) -> tuple[Figure, NDArray[Any]]:
    """The picture and then the maps, from left to right and row by row; returns all axes, flat.

    Args:
        picture: in 0..1, ``[h, w, 3]`` or ``[h, w]``.
        overlays: one or more.
        title: of the figure.
        words: the small print below it.
        scale: one of :data:`SCALES`.

    Raises:
        UsageError: no such scale.
    """
    width = figure_width(7.0)
    count = len(overlays) + 1
    columns = min(count, _IN_A_ROW[narrow(width)])
    rows = -(-count // columns)
    figure, axes = panels(picture, rows, columns, width, words, scale, headed=True)
    axes = axes.ravel()
    for ax in axes[count:]:
        ax.remove()
    show(axes[0], picture, overlays[0].mark)
    paint(figure, axes[1:count], picture, overlays, scale)
    set_heading(figure, title)
    return figure, axes[:count]


def panels(
    picture: NDArray[np.floating],
    rows: int,
    columns: int,
    width: float,
    words: Sequence[str],
    scale: str,
    headed: bool,
) -> tuple[Figure, NDArray[Any]]:
    """A figure of so many panels of the picture's proportions, and its axes.

    Args:
        picture: in 0..1, ``[h, w, 3]`` or ``[h, w]``.
        rows, columns: how many panels.
        width: of the figure, in inches.
        words: its small print, before what it says of colours.
        scale: one of :data:`SCALES`.
        headed: whether every row has headings, or the first alone.
    """
    check_scale(scale)
    coloured = {
        "panel": "max: largest value on a patch; each panel is coloured up to its own.",
        "shared": "max: largest value on a patch. All panels are coloured on one scale.",
    }
    small = small_print([*words, coloured[scale]], width)
    each = (width / columns - _GAP) * picture.shape[0] / picture.shape[1]
    headings = _HEADING * (rows if headed else 1)
    figure = new_figure(width, rows * (each + _NOTE) + headings + _BAR + heading_height() + 0.12 * len(small))
    figure.set_layout_engine("compressed")  # made for panels of fixed proportions
    axes = figure.subplots(rows, columns, squeeze=False)
    key_below(figure, small)
    return figure, axes


def check_scale(scale: str) -> None:
    """Raises UsageError for a scale that is not one of :data:`SCALES`."""
    if scale not in SCALES:
        raise UsageError(f"scale={scale!r} is unknown; choose one of {list(SCALES)}.")


def show(ax: Axes, picture: NDArray[np.floating], mark: Box | None) -> None:
    """The picture as it is."""
    height, width = picture.shape[:2]
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if picture.ndim == 2 else {}
    ax.imshow(picture, extent=(0, width, height, 0), **grey)  # type: ignore[arg-type]
    _finish(ax, picture, mark)
    ax.set_title("image", **HEADING)


def paint(
    figure: Figure, axes: Sequence[Axes] | NDArray[Any], picture: NDArray[np.floating], overlays: Sequence[Overlay],
    scale: str,
) -> None:  # fmt: skip
    """The maps over the greyed picture, and one colour bar for all. Maps with negative values get a scale around 0."""
    signed = any(float(item.values.min()) < 0 for item in overlays)
    limits = [float(np.abs(item.values).max()) or 1.0 for item in overlays]
    if scale == "shared":
        limits = [max(limits)] * len(limits)
    colours = DIVERGING if signed else SEQUENTIAL
    grey = picture if picture.ndim == 2 else picture @ np.array(_LUMINANCE)
    height, width = grey.shape
    low, high = _UNDERLAY
    for ax, item, limit in zip(axes, overlays, limits, strict=True):
        ax.imshow(low + (high - low) * grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        ax.imshow(
            item.values, cmap=colours, vmin=-limit if signed else 0, vmax=limit, alpha=_OPACITY,
            interpolation="bilinear", extent=(0, width, height, 0),
        )  # fmt: skip
        _finish(ax, picture, item.mark)
        ax.set_title(item.heading, **HEADING)
        ax.set_xlabel(item.note, fontsize=_NOTE_SIZE, labelpad=2, linespacing=1.05)
    top = 1.0 if scale == "panel" else limits[0]
    bar = figure.colorbar(
        ScalarMappable(Normalize(-top if signed else 0, top), colours), ax=figure.axes, location="bottom",
        label="Attention, as a share of the panel's largest" if scale == "panel" else "Attention",
        alpha=_OPACITY, aspect=35, pad=0.02, shrink=0.9 if narrow(figure.get_figwidth()) else 0.45,
    )  # fmt: skip
    bar.ax.patch.set(facecolor=str(sum(_UNDERLAY) / 2), alpha=1.0)  # as under the maps, so that colours are the same
    bar.outline.set_visible(False)


def _finish(ax: Axes, picture: NDArray[np.floating], mark: Box | None) -> None:
    """Neither ticks nor frame; a patch in white with a black edge, visible on any ground."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if mark is None:
        return
    height, width = picture.shape[:2]
    top, left, high, wide = mark
    for colour, line in (("black", 2.0), ("white", 1.0)):
        ax.add_patch(
            Rectangle(
                (left * width, top * height), wide * width, high * height, fill=False, edgecolor=colour, linewidth=line
            )
        )
