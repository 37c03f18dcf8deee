"""Layer-by-layer heatmaps: DeepViT's cross-layer similarity (arXiv 2103.11886, eq. 2) and its three companions.

Deviation: the paper shows M alone. M is near 1 in untrained networks too, so the same picture exists for what is left
after uniform attention is removed (centred), for what another image's map shares (image-independent), and for the rest
(excess).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.plots.select import choose_group, titled
from collapse_probe.plots.style import (
    colour_scale,
    legible_on,
    new_figure,
    paper,
    say_undefined,
    single_axes,
    thinned_ticks,
)
from collapse_probe.result import PARTS, Analysis, Group

#: What each reading is called in titles and on colour bars.
READINGS = {
    "similarity": ("Similarity M", "Cosine similarity M"),
    "centred": ("Centred similarity", "Centred similarity C"),
    "image_independent": ("Image-independent part", "M against other images"),
    "excess": ("Image-specific excess", "M minus image-independent part"),
}
_SIGNED = ("centred", "excess")
_PART_WORDS = {"all": "", "prefix": ", prefix tokens", "patch": ", patch tokens"}
_MOST_ANNOTATED = 16


@paper()
def layer_similarity(
    analysis: Analysis,
    ax: Axes | None = None,
    *,
    group: str | None = None,
    part: str = "all",
    reading: str = "similarity",
) -> tuple[Figure, Axes]:
    """Heatmap of one reading between every two layers of a group, block 0 in the upper left corner.

    Args:
        analysis: what to show.
        ax: axes to draw on; new ones by default.
        group: name of the group; by default the one with most layers.
        part: the key tokens that count: ``"all"``, ``"prefix"`` or ``"patch"``.
        reading: ``"similarity"`` (M) or ``"image_independent"``, both 0..1; ``"centred"`` or ``"excess"``, both -1..1.

    Raises:
        UsageError: unknown group, part or reading, or a part that this group does not report apart.
    """
    if reading not in READINGS:
        raise UsageError(f"reading={reading!r} is unknown; choose one of {list(READINGS)}.")
    if part not in PARTS:
        raise UsageError(f"part={part!r} is unknown; choose one of {list(PARTS)}.")
    chosen = choose_group(analysis, group)
    if part not in chosen.matrices and part != "all":
        raise UsageError(f"group {chosen.name} has no part {part!r}; it has {list(chosen.matrices)}.")
    figure, ax = single_axes(ax, 4.6, 4.0)
    _draw(ax, chosen, part, reading, annotate=len(chosen.layers) <= _MOST_ANNOTATED)
    ax.set_title(titled(READINGS[reading][0] + _PART_WORDS[part], analysis, chosen))
    return figure, ax


@paper()
def similarity_parts(analysis: Analysis, *, group: str | None = None) -> tuple[Figure, NDArray[Any]]:
    """M, centred M, the image-independent part and the excess, side by side; returns a 2 x 2 array of axes.

    Raises:
        UsageError: unknown group.
    """
    chosen = choose_group(analysis, group)
    figure = new_figure(7.2, 6.2)
    axes = figure.subplots(2, 2)
    for ax, (reading, (title, _)) in zip(axes.flat, READINGS.items(), strict=True):
        _draw(ax, chosen, "all", reading, annotate=False)
        ax.set_title(titled(title, analysis, chosen))
    return figure, axes


def _draw(ax: Axes, group: Group, part: str, reading: str, annotate: bool) -> None:
    """One heatmap with its colour bar; hatched cells have no value."""
    count = len(group.layers)
    values = np.asarray(group.matrices.get(part, {}).get(reading, np.full((count, count), np.nan)), dtype=np.float64)
    ax.set_box_aspect(1)
    if not np.isfinite(values).any():
        return say_undefined(ax, "for any two layers of this group")
    scale = colour_scale(values, signed=reading in _SIGNED)
    ax.patch.set(facecolor="0.97", hatch="/////", edgecolor="0.7")
    sns.heatmap(
        values,
        ax=ax,
        **scale,
        square=True,
        xticklabels=False,
        yticklabels=False,
        cbar_kws={"label": READINGS[reading][1], "shrink": 0.8},
    )
    ax.set(xlabel="Block", ylabel="Block")  # after seaborn, which clears them
    if annotate:
        _annotate(ax, values)
    ticks = thinned_ticks(count)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([tick + 0.5 for tick in ticks], labels=[str(tick) for tick in ticks], rotation=0)
    return None


def _annotate(ax: Axes, values: NDArray[np.float64]) -> None:
    """The numbers, in black or white by the cell's own luminance (seaborn's own choice greys out middle tones)."""
    mesh = ax.collections[0]
    size = 6.0 if len(values) <= 12 else 4.8
    for row, col in np.argwhere(np.isfinite(values)):
        colour = legible_on(mesh.cmap(mesh.norm(values[row, col])))
        text = f"{values[row, col]:.2f}".replace("-0.00", "0.00")
        ax.text(col + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour)
