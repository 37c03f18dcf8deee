"""Layer-by-layer heatmaps: DeepViT's cross-layer similarity (arXiv 2103.11886, eq. 2) and its companions.

Deviation: the paper shows M alone. M is near 1 in untrained networks too, so the same picture exists for what is left
after uniform attention is removed (centred), for what another image's map shares (image-independent), and for the rest
(excess). Rows of maps (Reuse Transformer) and token features (CKA, cosine) have theirs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.plots.families import stream_in_words
from collapse_probe.plots.select import Arrangement, arrange, arrange_streams, titled
from collapse_probe.plots.sizes import figure_width, fold, narrow, set_title, share, small_print
from collapse_probe.plots.style import (
    as_written,
    bracket,
    colour_scale,
    key_below,
    legible_on,
    new_figure,
    paper,
    say_undefined,
    several_axes,
    single_axes,
    thinned_ticks,
    title_pad,
)
from collapse_probe.result import PARTS, Analysis, Group, Stream

#: What each reading is called in titles and on colour bars.
READINGS = {
    "similarity": ("Similarity M", "Cosine similarity M"),
    "centred": ("Centred similarity", "Centred similarity C"),
    "image_independent": ("Image-independent part", "M against other images"),
    "excess": ("Image-specific excess", "M minus image-independent part"),
    "tv_similarity": ("Overlap of attention rows", "1 − total variation"),
    "cka": ("CKA of token features", "Linear CKA"),
    "feature_similarity": ("Similarity of token features", "Cosine similarity"),
}
#: The readings of attention columns, and those beside them; those of token features belong to residual streams.
COLUMNS = ("similarity", "centred", "image_independent", "excess")
BESIDE = ("tv_similarity", "feature_similarity", "cka")
OF_FEATURES = ("cka", "feature_similarity")
SIGNED = ("centred", "excess")
_PART_WORDS = {"all": "", "prefix": ", prefix tokens", "patch": ", patch tokens"}
_LONGEST_PLACE = 36

#: Inches of width from which a colour bar stands beside its heatmap, and inches beside the cells with and without it.
_BAR_BELOW, _BESIDE_CELLS = 2.8, {True: 1.2, False: 0.5}

#: Points of width that a number on a cell takes, and one on an axis; font size of those on cells.
_NUMBER, _TICK, _NUMBER_SIZE = 15, 12, 6.0

#: Height of a line of the key and of brackets in inches, and width of the axis' numbers in points.
_KEY_LINE, _BRACKETS, _BESIDE_NUMBERS = 0.12, 0.45, 20


@paper()
def layer_similarity(
    analysis: Analysis,
    ax: Axes | None = None,
    *,
    group: str | None = None,
    part: str = "all",
    reading: str = "similarity",
) -> tuple[Figure, Axes]:
    """Heatmap of one reading between every two layers, the first in the upper left corner; hatched: not comparable.

    With several groups of comparable layers (the stages of a hierarchical model, or kinds of attention), layers stand
    group by group, each group a framed block with its letter at a bracket; a key below says what the letters mean. The
    numbers on the axes count layers in execution order, also where groups alternate (regular and shifted windows) and
    blocks therefore do not.

    Args:
        analysis: what to show.
        ax: axes to draw on; new ones by default. On given axes there is no key.
        group: name of one group (or residual stream) to show alone, its layers counted from 0; by default all.
        part: the key tokens that count: ``"all"``, ``"prefix"`` or ``"patch"``; of attention columns only.
        reading: ``"similarity"`` (M), ``"image_independent"`` or ``"tv_similarity"``, 0..1; ``"centred"`` or
            ``"excess"``, -1..1; ``"cka"`` or ``"feature_similarity"`` of token features, shown by residual stream.

    Raises:
        UsageError: unknown group, part or reading, or a part that no group shown reports apart.
    """
    if reading not in READINGS:
        raise UsageError(f"reading={reading!r} is unknown; choose one of {list(READINGS)}.")
    if part not in PARTS:
        raise UsageError(f"part={part!r} is unknown; choose one of {list(PARTS)}.")
    shown = owners_of(analysis, reading, group)
    known = {name for item in shown.groups for name in item.matrices}
    if part not in known and part != "all":
        whose = "no group has a" if shown.several else f"group {shown.groups[0].name} has no"
        raise UsageError(f"{whose} part {part!r}; there is {sorted(known)}.")
    width = figure_width(4.6)
    key = [f"{item.name}  {_in_words(item)}" for item in shown.groups] if shown.several and ax is None else []
    lines = small_print(key, width)
    key_height = _KEY_LINE * (len(lines) + 2) if lines else 0.0
    figure, ax = single_axes(ax, width, width - 0.6 + key_height)
    _draw(ax, shown, part, reading, annotate=72 * side_of(ax) / len(shown.layers) >= _NUMBER)
    title = READINGS[reading][0] + _PART_WORDS[part]
    set_title(ax, title if shown.several else titled(title, analysis, shown.groups[0]), pad=title_pad(shown.several))
    if lines:
        key_below(figure, lines)
    return figure, ax


def owners_of(analysis: Analysis, reading: str, group: str | None) -> Arrangement:
    """The groups, or for token features the streams, whose matrices are shown."""
    if reading not in OF_FEATURES or not analysis.streams:
        return arrange(analysis, group)
    named = next((stream for stream in analysis.streams if stream.name == group), None)
    if named is not None:
        return Arrangement([named], named.layers, list(range(len(named.layers))), "Block")
    if group is not None:
        known = [stream.name for stream in analysis.streams]
        raise UsageError(f"group={group!r} is unknown; {reading} is a reading of the residual streams {known}.")
    return arrange_streams(analysis, None)


@paper()
def similarity_parts(
    analysis: Analysis, ax: Sequence[Axes] | NDArray[Any] | None = None, *, group: str | None = None
) -> tuple[Figure, NDArray[Any]]:
    """M, centred M, image-independent part and excess, side by side; returns an array of axes, 2 x 2 where wide enough.

    Several groups are shown as in :func:`layer_similarity`. `ax` are four axes of the caller.

    Raises:
        UsageError: unknown group, or not four axes.
    """
    shown = arrange(analysis, group)
    if ax is None:
        figure, axes = _heatmaps(4, 2, figure_width(7.2), shown.several)
    else:
        figure, axes = several_axes(ax, count=4)
    for panel, reading in zip(axes.flat, COLUMNS, strict=True):
        _draw(panel, shown, "all", reading, annotate=False)
        title = READINGS[reading][0]
        _head(panel, title if shown.several else titled(title, analysis, shown.groups[0]), shown.several)
    return figure, axes


def has_beside(analysis: Analysis) -> list[str]:
    """Which of the readings in :func:`similarity_beside` an analysis has for any two layers."""
    owners: list[Group | Stream] = [*analysis.groups, *analysis.streams]
    return [name for name in BESIDE if any(_pairs(owner, name) for owner in owners)]


@paper()
def similarity_beside(
    analysis: Analysis, ax: Axes | Sequence[Axes] | NDArray[Any] | None = None
) -> tuple[Figure, NDArray[Any]]:
    """Rows of attention maps, and token features by cosine and by CKA, side by side; returns a flat array of axes.

    Only readings that the analysis has are shown, up to three; several groups or streams as in
    :func:`layer_similarity`. `ax` are as many axes of the caller.

    Raises:
        UsageError: not as many axes as readings.
    """
    readings = has_beside(analysis) or ["feature_similarity"]
    owners = {reading: owners_of(analysis, reading, None) for reading in readings}
    if ax is None:
        several = any(shown.several for shown in owners.values())
        figure, axes = _heatmaps(len(readings), len(readings), figure_width(max(3.4 * len(readings), 4.4)), several)
    else:
        figure, axes = several_axes(ax, count=len(readings))
    for panel, (reading, shown) in zip(axes.flat, owners.items(), strict=True):
        _draw(panel, shown, "all", reading, annotate=False)
        _head(panel, READINGS[reading][0], shown.several)
    return figure, axes.ravel()


def _heatmaps(count: int, columns: int, width: float, several: bool) -> tuple[Figure, NDArray[Any]]:
    """A figure for so many heatmaps, fewer of them side by side on one column, and its axes."""
    if narrow(width):  # brackets of several groups need more room than half a column
        columns = 1 if several else min(columns, 2)
    rows, each = -(-count // columns), width / columns
    figure = new_figure(width, rows * (each + (0.8 if each < _BAR_BELOW else -0.4)))
    figure.set_layout_engine("compressed")  # made for squares: others leave them too little room for words
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, axes if count == rows * columns else axes.ravel()[:count]


def _head(ax: Axes, text: str, several: bool) -> None:
    """The heading of one heatmap among others."""
    size = 9 if share(ax) >= _BAR_BELOW else 8
    room = share(ax) - 0.6 - (_BRACKETS if several else 0)
    ax.set_title(fold(text, room, size, "bold"), fontsize=size, pad=title_pad(several))


def _pairs(owner: Group | Stream, reading: str) -> bool:
    values = owner.matrices.get("all", {}).get(reading)
    return values is not None and len(values) > 1 and bool(np.isfinite(values[~np.eye(len(values), dtype=bool)]).any())


def _draw(ax: Axes, shown: Arrangement, part: str, reading: str, annotate: bool) -> None:
    """One heatmap with its colour bar; hatched cells have no value."""
    count = len(shown.layers)
    values = values_between(shown, part, reading)
    ax.set_box_aspect(1)
    if not np.isfinite(values).any():
        return say_undefined(ax, "for any two layers")
    scale = colour_scale(values, signed=reading in SIGNED)
    ax.patch.set(facecolor="0.97", hatch="/////", edgecolor="0.7")
    sns.heatmap(
        values,
        ax=ax,
        **scale,
        square=True,
        xticklabels=False,
        yticklabels=False,
        cbar_kws=colour_bar(ax, READINGS[reading][1], (scale["vmin"], scale["vmax"])),
    )
    label = fold(shown.label, side_of(ax) - (_BRACKETS if shown.several else 0), 8)
    ax.set(xlabel=label, ylabel=label)  # after seaborn, which clears them
    if annotate:
        _annotate(ax, values)
    ticks = thinned_ticks(count, min(16, int(72 * side_of(ax) / _TICK)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([tick + 0.5 for tick in ticks], labels=[str(shown.numbers[tick]) for tick in ticks], rotation=0)
    if shown.several:
        _frame(ax, shown)
    return None


def side_of(ax: Axes) -> float:
    """About how many inches wide the cells are together."""
    return share(ax) - _BESIDE_CELLS[share(ax) >= _BAR_BELOW]


def colour_bar(ax: Axes, label: str, ends: tuple[float, float]) -> dict[str, Any]:
    """Where a colour bar stands: beside the heatmap, or below a small one."""
    if share(ax) >= _BAR_BELOW:
        return {"label": label, "shrink": 0.8}
    ticks = [ends[0], sum(ends) / 2, ends[1]]
    return {"label": fold(label, share(ax) - 0.5, 8), "location": "bottom", "ticks": ticks}


def values_between(shown: Arrangement, part: str, reading: str) -> NDArray[np.float64]:
    """`[L, L]` over all layers shown; NaN between groups, and where a group lacks the part or the reading."""
    values = np.full((len(shown.layers), len(shown.layers)), np.nan)
    for group, (start, stop) in zip(shown.groups, shown.spans, strict=True):
        own = group.matrices.get(part, {}).get(reading)
        if own is not None:
            values[start:stop, start:stop] = own
    return values


def _frame(ax: Axes, shown: Arrangement) -> None:
    """A frame around each group, and its letter above and on the left."""
    for start, stop in shown.spans:
        size = stop - start
        ax.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor="0.25", linewidth=0.8))
    names = [group.name for group in shown.groups]
    bracket(ax, shown.spans, names, "x")
    bracket(ax, shown.spans, names, "y", gap=_BESIDE_NUMBERS)
    ax.yaxis.labelpad = _BESIDE_NUMBERS


def _in_words(group: Group | Stream) -> str:
    if isinstance(group, Stream):
        return stream_in_words(group)
    place = group.layers[0] if len(group.layers) == 1 else group.module
    if len(place) > _LONGEST_PLACE:
        place = "…" + place[-_LONGEST_PLACE:]
    return f"{as_written(place)}: {group.description}" if place else group.description


def _annotate(ax: Axes, values: NDArray[np.float64]) -> None:
    """The numbers, in black or white by the cell's own luminance (seaborn's own choice greys out middle tones)."""
    mesh = ax.collections[0]
    for row, col in np.argwhere(np.isfinite(values)):
        colour = legible_on(mesh.cmap(mesh.norm(values[row, col])))
        text = f"{values[row, col]:.2f}".replace("-0.00", "0.00")
        ax.text(col + 0.5, row + 0.5, text, ha="center", va="center", fontsize=_NUMBER_SIZE, color=colour)
