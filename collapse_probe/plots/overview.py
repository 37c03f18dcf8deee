"""The readings that matter, by depth, on one page: small multiples for a paper."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.plots.families import mark_onset, onset_in_words, stream_in_words
from collapse_probe.plots.panels import Panel, Track, bands_in_words, depth_axis, draw_panel
from collapse_probe.plots.sizes import figure_width, narrow, small_print
from collapse_probe.plots.style import key_below, new_figure, paper, say_undefined
from collapse_probe.result import Analysis, Finding, Group, Stream

#: Readings of neighbouring layers: one line for each group, or for each stream.
PANELS = (
    Panel(
        "Similarity to previous block", "Cosine",
        {"similarity_to_previous": "M", "image_independent_to_previous": "image-independent"},
    ),
    Panel(
        "Centred M and excess", "Cosine", {"centred_to_previous": "centred", "excess_to_previous": "excess"}
    ),
    Panel("Similarity ratio", "Share", {"similarity_ratio": "ratio"}, adorn=mark_onset),
    Panel(
        "Features to previous block", "Similarity",
        {"feature_similarity_to_previous": "cosine", "cka_to_previous": "CKA"},
    ),
    Panel("Head diversity", "1 − cosine", {"head_diversity": "head diversity"}),
    Panel("Attention entropy", "Entropy / log K", {"normalized_entropy": "entropy"}),
    Panel("Relative variation", "r", {"relative_variation": "r"}, log=True),
    Panel("Effective rank of maps", "Rank", {"effective_rank": "effective rank"}, log=True),
    Panel("Attention distance", "Patches", {"attention_distance": "distance"}),
    Panel(
        "Attention received", "Share",
        {"sink_strength": "strongest key", "prefix_attention": "prefix"},
    ),
    Panel(
        "Tokens", "Ratio, cosine",
        {"rank_residual_frobenius_typical": "rank residual", "token_similarity_typical": "similarity"},
    ),
    Panel(
        "Norms", "× median patch",
        {"largest_norm_ratio": "largest patch", "prefix_norm_ratio": "prefix"}, log=True,
    ),
)  # fmt: skip

_WIDTH, _ROW = 7.0, 1.42
_COLUMNS = 3
_MOST_KEY_LINES = 8


@paper()
def overview(analysis: Analysis) -> tuple[Figure, NDArray[Any]]:
    """Up to twelve readings by depth, as wide as a page; returns the axes as a flat array.

    All panels share the x axis: layers in execution order. Lines join the layers of one group where layers are compared
    with each other, and those of one residual stream elsewhere. Bands are ±1 standard error, or 95 % intervals where
    the small print says so. Blocks that a finding names are shaded; the small print says which. Readings that are not
    defined anywhere have no panel.

    Raises:
        UsageError: the analysis holds no layers.
    """
    if not analysis.groups:
        raise UsageError("The analysis holds no layers, so there is nothing to plot.")
    panels = [panel for panel in PANELS if panel.defined(analysis.layers)]
    if not panels:
        figure = new_figure(figure_width(_WIDTH), 1.6)
        ax = figure.add_subplot()
        say_undefined(ax, "this analysis holds none of the readings shown here")
        return figure, np.array([ax], dtype=object)
    concerned = [finding for finding in analysis.findings if _shaded(finding, analysis)]
    names = [name for panel in panels for name in panel.lines]
    below = [
        bands_in_words(analysis, names),
        *onset_in_words(analysis),
        *_shading_in_words(analysis, concerned),
        *_letters(analysis),
    ]
    columns = min(2 if narrow(figure_width(_WIDTH)) else _COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = figure_width(_WIDTH if columns > 1 else 4.4)
    lines = small_print(below, width)
    height = _ROW * rows + 0.35 + 0.11 * len(lines) + (0.2 if len(analysis.streams) > 1 else 0)
    figure = new_figure(width, height)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    for place, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        track = _track(analysis, panel, brackets=place < columns)
        draw_panel(ax, analysis, panel, track)
        depth_axis(ax, track, numbers=place + columns >= len(panels), most=9 if columns < 2 or width > 4 else 5)
        _shade(ax, analysis, concerned)
    key_below(figure, lines)
    return figure, axes[: len(panels)]


def _track(analysis: Analysis, panel: Panel, brackets: bool) -> Track:
    """All layers in execution order, with the lines that a panel's readings are joined by."""
    layers = list(analysis.layers.index)
    place = {layer: number for number, layer in enumerate(layers)}
    between = any("_to_previous" in name or name == "similarity_ratio" for name in panel.lines)
    owners: Sequence[Group | Stream] = analysis.streams
    if (between and not panel.of_features) or not analysis.streams:
        owners = analysis.groups
    lanes = [np.array([place[layer] for layer in owner.layers]) for owner in owners]
    alone = sorted(set(range(len(layers))) - {int(at) for lane in lanes for at in lane})
    lanes += [np.array([at]) for at in alone]
    letters = _in_order(analysis.streams, place) if brackets and len(analysis.streams) > 1 else []
    single = len(analysis.groups) == 1
    return Track(layers, list(range(len(layers))), "Block" if single else "Layer, in execution order", lanes, letters)


def _in_order(streams: Sequence[Stream], place: dict[str, int]) -> list[tuple[int, int, str]]:
    """First position, the one behind the last, and name of each stream; nothing where streams alternate."""
    spans = [(place[item.layers[0]], place[item.layers[-1]] + 1, item.name) for item in streams]
    apart = all(stop <= start for (_, stop, _), (start, _, _) in pairwise(spans))
    return spans if apart else []


def _shaded(finding: Finding, analysis: Analysis) -> bool:
    """A finding about some of the layers: shading all of them would say nothing."""
    return finding.severity != "ok" and 0 < len(set(finding.layers) & set(analysis.layers.index)) < len(analysis.layers)


def _shade(ax: Axes, analysis: Analysis, findings: Sequence[Finding]) -> None:
    named = {layer for finding in findings for layer in finding.layers}
    for start, stop in _runs([number for number, layer in enumerate(analysis.layers.index) if layer in named]):
        ax.axvspan(start - 0.5, stop + 0.5, color="0.92", linewidth=0, zorder=0)


def _shading_in_words(analysis: Analysis, findings: Sequence[Finding]) -> list[str]:
    place = {layer: number for number, layer in enumerate(analysis.layers.index)}
    lines = []
    for finding in findings:
        numbers = sorted(place[layer] for layer in finding.layers if layer in place)
        blocks = ", ".join(f"{start}" if start == stop else f"{start}–{stop}" for start, stop in _runs(numbers))
        lines.append(textwrap.shorten(f"Shaded {blocks}: {finding.title}", 150, placeholder=" …"))
    return _some(lines, "findings")


def _letters(analysis: Analysis) -> list[str]:
    if len(analysis.streams) < 2:
        return []
    return _some([f"{item.name}  {stream_in_words(item)}" for item in analysis.streams], "streams")


def _some(lines: list[str], what: str) -> list[str]:
    if len(lines) <= _MOST_KEY_LINES:
        return lines
    return [*lines[: _MOST_KEY_LINES - 1], f"… and {len(lines) - _MOST_KEY_LINES + 1} more {what}"]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers.

    >>> _runs([1, 2, 3, 7])
    [(1, 3), (7, 7)]
    """
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
