"""One figure for each family of readings: across layers, heads, entropy and rank, where attention goes, tokens, norms.

Each is a grid of small panels by depth. A panel that was not measured is left out; one whose metric was asked for and
is not defined says why.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collapse_probe.plots.panels import Panel, Track, bands_in_words, depth_axis, draw_panel
from collapse_probe.plots.select import arrange, arrange_streams, column
from collapse_probe.plots.sizes import figure_width, narrow, room, set_title, small_print
from collapse_probe.plots.style import SEQUENTIAL, as_written, key_below, new_figure, paper, say_undefined
from collapse_probe.readings import FAMILIES
from collapse_probe.result import Analysis, Stream

#: In inches.
_WIDTH, _PANEL_HEIGHT, _LOW_PANEL, _SMALL_LINE = 7.2, 1.75, 1.45, 0.12
_ROOM_FOR_ONSET = 1.5


def mark_onset(ax: Axes, analysis: Analysis, track: Track) -> None:
    """Where the run of similar blocks begins that reaches the last one, with its 95 % interval, for each group."""
    for group in analysis.groups:
        found = group.derived.get("onset", {})
        value = found.get("value")
        if value is None or not set(group.layers) <= set(track.layers):
            continue
        own = [track.layers.index(layer) for layer in group.layers]
        low, high = (own[round(found[end])] if found.get(end) is not None else None for end in ("low", "high"))  # type: ignore[arg-type]
        at = own[round(value)]
        if low is not None and high is not None:
            ax.plot([low, high], [0.5, 0.5], color="0.25", linewidth=1.0, marker="|", markersize=5, label="_onset")
        ax.plot([at], [0.5], color="0.25", marker="D", markersize=4, label="_onset")
        if len(analysis.groups) == 1 and room(ax) > _ROOM_FOR_ONSET:
            _say_onset(ax, track, at, low, high)


def _say_onset(ax: Axes, track: Track, at: int, low: int | None, high: int | None) -> None:
    """The number, on the side with more room: low ratios before the onset and high ones after leave the middle free."""
    words, right = f"onset {track.numbers[at]}", at < 0.55 * len(track.layers)
    edge = at
    if low is not None and high is not None:
        words += f" [{track.numbers[low]}, {track.numbers[high]}]"
        edge = high if right else low
    ax.annotate(
        words, (edge, 0.5), xytext=(5 if right else -5, 0), textcoords="offset points", va="center",
        ha="left" if right else "right", fontsize=7, color="0.25",
    )  # fmt: skip


def onset_in_words(analysis: Analysis) -> list[str]:
    """What the marks of :func:`mark_onset` are, where there are any."""
    if all(group.derived.get("onset", {}).get("value") is None for group in analysis.groups):
        return []
    return ["◆ onset of the run of similar blocks that reaches the last block; bar: 95 % interval."]


def _number_of_heads(ax: Axes, analysis: Analysis, track: Track) -> None:
    heads = column(analysis.layers.loc[track.layers], "heads")
    for lane in track.lanes:
        ax.plot([lane[0] - 0.5, lane[-1] + 0.5], [heads[lane[0]]] * 2, color="0.5", linewidth=0.8, label="_heads")
    largest = float(np.nanmax(heads, initial=1))
    ax.set_ylim(1 - 0.04 * largest, 1.06 * largest)


PANELS = {
    "across_layers": (
        Panel("Similarity ratio", "Share of columns", {"similarity_ratio": "ratio"}, adorn=mark_onset),
        Panel(
            "Attention, to the previous block", "Similarity",
            {"similarity_to_previous": "M (columns)", "tv_similarity_to_previous": "row overlap"},
        ),
        Panel(
            "Token features, to the previous block", "Similarity",
            {"feature_similarity_to_previous": "cosine", "cka_to_previous": "CKA"},
        ),
        Panel("Token features, to the last block", "Cosine", {"feature_similarity_to_last": "cosine"}),
    ),
    "heads": (
        Panel("Head diversity", "1 − cosine of columns", {"head_diversity": "head diversity"}),
        Panel("Effective heads", "Heads (grey: H)", {"effective_heads": "effective heads"}, adorn=_number_of_heads),
        Panel("Centred similarity of heads", "Correlation", {"centred_cross_head_similarity": "centred cross-head"}),
        Panel("Divergence of heads", "JS, nats", {"head_divergence": "head divergence"}),
    ),
    "entropy_and_rank": (
        Panel("Attention entropy", "Entropy / log K", {"normalized_entropy": "entropy"}),
        Panel("Relative variation", "r", {"relative_variation": "r"}, log=True),
        Panel(
            "Rank of maps", "Rank", {"effective_rank": "effective rank", "stable_rank": "stable rank"},
            log=True,
        ),
    ),
    "where_attention_goes": (
        Panel("Mean attention distance", "Patches", {"attention_distance": "distance"}),
        Panel(
            "Heads with a sink", "Share of heads",
            {"sink_share": "any token", "sink_share_prefix": "prefix token", "sink_share_patch": "patch"},
        ),
        Panel(
            "Attention received", "Share of attention",
            {"sink_strength": "strongest key", "prefix_attention": "prefix tokens"},
        ),
        Panel("Constancy of rows", "Share of energy", {"constant_rows": "constant rows"}),
    ),
    "tokens": (
        Panel(
            "Rank residual", "Relative 1,∞-norm",
            {"rank_residual": "all", "rank_residual_typical": "typical"},
        ),
        Panel(
            "Rank residual, Frobenius", "Relative norm",
            {"rank_residual_frobenius": "all", "rank_residual_frobenius_typical": "typical"},
        ),
        Panel(
            "Similarity of tokens", "Cosine",
            {"token_similarity": "all", "token_similarity_typical": "typical"},
        ),
        Panel("High / low frequencies", "Ratio of norms", {"high_to_low_ratio": "high / low"}, log=True),
        Panel(
            "Highest frequency", "Δ log amplitude",
            {"high_frequency_log_amplitude": "Δ log amplitude"},
        ),
    ),
    "norms_and_branches": (
        Panel("High-norm patches", "Share of patches", {"outlier_share": "high-norm patches"}),
        Panel(
            "Largest norms", "× median patch",
            {"largest_norm_ratio": "largest patch", "prefix_norm_ratio": "prefix token"}, log=True,
        ),
        Panel("Median patch norm", "Norm", {"median_norm": "median norm"}, log=True),
        Panel(
            "What a block adds", "Norm / stream's norm",
            {"attention_branch_share": "attention", "mlp_branch_share": "MLP"}, log=True,
        ),
    ),
}  # fmt: skip


def across_layers(analysis: Analysis, *, group: str | None = None) -> tuple[Figure, NDArray[Any]]:
    """Do blocks repeat each other? Similarity ratio with its onset, rows and columns of maps, token features.

    Bands are ±1 standard error, of the similarity ratio a 95 % interval; so is the bar at the onset. Several groups
    stand side by side, as several residual streams do in the panels about token features.

    Args:
        analysis: what to show.
        group: one group's layers only; by default all.

    Raises:
        UsageError: unknown group.
    """
    return _family("across_layers", analysis, group)


def heads(analysis: Analysis, *, group: str | None = None) -> tuple[Figure, NDArray[Any]]:
    """Do the heads of a block repeat each other? Diversity, effective number and divergence, ±1 standard error.

    Raises:
        UsageError: unknown group.
    """
    return _family("heads", analysis, group)


def entropy_and_rank(analysis: Analysis, *, group: str | None = None) -> tuple[Figure, NDArray[Any]]:
    """How evenly and how variedly does a block attend? Entropy, relative variation, rank of maps, ±1 standard error.

    Raises:
        UsageError: unknown group.
    """
    return _family("entropy_and_rank", analysis, group)


def where_attention_goes(analysis: Analysis, *, group: str | None = None) -> tuple[Figure, NDArray[Any]]:
    """How far does attention reach, and do all queries ask the same keys? Distance, sinks, constancy of rows.

    Bands are ±1 standard error.

    Raises:
        UsageError: unknown group.
    """
    return _family("where_attention_goes", analysis, group)


def tokens(analysis: Analysis, *, group: str | None = None) -> tuple[Figure, NDArray[Any]]:
    """Do the tokens of an image become alike? Rank residual, similarity, frequencies, ±1 standard error.

    The last panel holds the whole spectrum of the stream with most blocks, a line for each block.

    Raises:
        UsageError: unknown group.
    """
    return _family("tokens", analysis, group)


def norms_and_branches(analysis: Analysis, *, group: str | None = None) -> tuple[Figure, NDArray[Any]]:
    """Which tokens stand out, and how much does a block add to its stream? Bands are ±1 standard error.

    Raises:
        UsageError: unknown group.
    """
    return _family("norms_and_branches", analysis, group)


def has_family(analysis: Analysis, family: str) -> bool:
    """Whether anything of a family is defined."""
    if not analysis.groups:
        return False
    tracks = {False: Track.along(arrange(analysis, None)), True: Track.along(arrange_streams(analysis, None))}
    return any(_why_undefined(analysis, panel, tracks[panel.of_features]) == "" for panel in PANELS[family])


@paper()
def _family(family: str, analysis: Analysis, group: str | None) -> tuple[Figure, NDArray[Any]]:
    tracks = {
        False: Track.along(arrange(analysis, group)),
        True: Track.along(arrange_streams(analysis, group)),
    }
    reasons = {panel.title: _why_undefined(analysis, panel, tracks[panel.of_features]) for panel in PANELS[family]}
    panels = [panel for panel in PANELS[family] if reasons[panel.title] is not None]
    spectrum = spectra(analysis) if family == "tokens" and group is None else None
    if not panels and spectrum is None:
        return _nothing(family)
    count = len(panels) + (spectrum is not None)
    names = [name for panel in panels for name in panel.lines]
    below = [bands_in_words(analysis, names), *_letters(analysis, group, panels)]
    if "similarity_ratio" in names:
        below[1:1] = onset_in_words(analysis)
    if _tells_outliers_apart(analysis, names):
        below[1:1] = ["typical: without tokens above 5 times the median patch norm."]
    brackets = any(tracks[panel.of_features].brackets for panel in panels)
    figure, axes, columns = _grid(count, brackets, below)
    same = tracks[False].layers == tracks[True].layers
    for place, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        track = tracks[panel.of_features]
        if reason := reasons[panel.title]:
            ax.set_title(panel.title)
            say_undefined(ax, reason if reason != _UNKNOWN else "")
            continue
        draw_panel(ax, analysis, panel, track)
        beneath = place + columns
        drawn_below = beneath < len(panels) and not reasons[panels[beneath].title]
        numbers = not (same and drawn_below and not track.brackets)
        depth_axis(ax, track, numbers, most=16 if room(ax) > 2.5 else 9)
    if spectrum is not None:
        _spectrum(axes[count - 1], *spectrum)
    return figure, axes


#: Readings between layers that are not called after the previous one.
_BETWEEN = ("similarity_ratio", "feature_similarity_to_last")

#: A panel that was measured and holds nothing, for reasons that the analysis does not know.
_UNKNOWN = "?"


def _why_undefined(analysis: Analysis, panel: Panel, track: Track) -> str | None:
    """Empty for a panel with values, the reason where there are none, None where it was not measured at all."""
    table = analysis.layers.loc[track.layers]
    between = any(name.endswith("_to_previous") or name in _BETWEEN for name in panel.lines)
    if between and all(len(lane) == 1 for lane in track.lanes):
        return "no layer has another to be compared with" if len(track.layers) > 1 else "there is one layer only"
    if panel.defined(table):
        return ""
    reasons = [entry["reason"] for entry in analysis.absent if entry.get("metric") in panel.metrics]
    if reasons:
        return _wrapped("; ".join(dict.fromkeys(reasons)))
    return _UNKNOWN if any(name in table for name in panel.lines) else None


def _wrapped(words: str, width: int = 44) -> str:
    return "\n".join(textwrap.wrap(words, width))


def _tells_outliers_apart(analysis: Analysis, names: Sequence[str]) -> bool:
    pairs = [(name.removesuffix("_typical"), name) for name in names if name.endswith("_typical")]
    table = analysis.layers
    return any(not np.array_equal(column(table, name), column(table, twin), equal_nan=True) for name, twin in pairs)


def _grid(count: int, brackets: bool, below: Sequence[str]) -> tuple[Figure, NDArray[Any], int]:
    """A figure with room for so many panels, as many of them side by side as its width allows, and the small print."""
    columns = 1 if narrow(figure_width(_WIDTH)) else {1: 1, 2: 2, 4: 2}.get(count, 3)
    width = figure_width(_WIDTH if columns > 1 else 4.4)
    rows = -(-count // columns)
    height = (_LOW_PANEL if narrow(width) and count > 1 else _PANEL_HEIGHT) + (0.3 if brackets else 0)
    lines = small_print(below, width)
    figure = new_figure(width, height * rows + 0.2 + _SMALL_LINE * len(lines))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.remove()
    key_below(figure, lines)
    return figure, axes[:count], columns


def _nothing(family: str) -> tuple[Figure, NDArray[Any]]:
    figure = new_figure(figure_width(4.4), 1.6)
    ax = figure.add_subplot()
    set_title(ax, FAMILIES[family][0])
    say_undefined(ax, "none of these readings is part of this analysis")
    return figure, np.array([ax], dtype=object)


def _letters(analysis: Analysis, group: str | None, panels: Sequence[Panel]) -> list[str]:
    """What the letters at the brackets mean."""
    if group is not None:
        return []
    lines = []
    if len(analysis.groups) > 1 and not all(panel.of_features for panel in panels):
        lines += [f"{item.name}  {_place(item.module)}{item.description}" for item in analysis.groups]
    if len(analysis.streams) > 1 and any(panel.of_features for panel in panels):
        lines += [f"{item.name}  {stream_in_words(item)}" for item in analysis.streams]
    return lines


def _place(module: str) -> str:
    return f"{as_written(module)}: " if module else ""


def stream_in_words(stream: Stream) -> str:
    """For example ``"layers.1.blocks: 2 blocks, 196 tokens of 192 channels"``."""
    count = "1 block" if len(stream.layers) == 1 else f"{len(stream.layers)} blocks"
    return f"{_place(stream.module)}{count}, {stream.tokens} tokens of {stream.channels} channels"


def _spectral_stream(analysis: Analysis) -> Stream | None:
    known = [item for item in analysis.streams if "relative_log_amplitude_by_frequency" in item.arrays]
    known = [item for item in known if np.isfinite(item.arrays["relative_log_amplitude_by_frequency"]).any()]
    return max(known, key=lambda item: len(item.layers), default=None)


def spectra(analysis: Analysis) -> tuple[str, NDArray[np.float64], NDArray[np.float64]] | None:
    """Log amplitude by frequency of the stream with most blocks: its name where there are several, the frequencies
    (multiples of pi per patch), and a row for each block; None where it was not measured."""
    stream = _spectral_stream(analysis)
    if stream is None:
        return None
    curves = stream.arrays["relative_log_amplitude_by_frequency"]
    # Frequencies are evenly spaced from 0; on grids of even size the last is one step below pi.
    size = min(stream.grid or (2 * curves.shape[1], 0)) or 2 * curves.shape[1]
    return f" ({stream.name})" if len(analysis.streams) > 1 else "", np.arange(curves.shape[1]) * 2 / size, curves


def _spectrum(ax: Axes, whose: str, at: NDArray[np.float64], curves: NDArray[np.float64]) -> None:
    """Log amplitude over frequency, a line per block from dark to light (Park and Kim, figure 2)."""
    norm = Normalize(0, max(len(curves) - 1, 1) * 1.1)  # the lightest yellow is lost on white
    scale = ScalarMappable(norm, SEQUENTIAL)
    for block, curve in enumerate(curves):
        ax.plot(
            at,
            curve,
            color=matplotlib.colormaps[SEQUENTIAL](float(norm(block))),
            linewidth=0.9,
            marker="." if len(at) < 12 else None,
        )
    ax.set_title(f"Spectrum{whose}", fontsize=8)
    ax.set(xlabel="Frequency (π per patch)", ylabel="Δ log amplitude")
    ax.grid(visible=True)
    bar = ax.figure.colorbar(scale, ax=ax, label="Block", pad=0.02, boundaries=np.arange(len(curves) + 1) - 0.5,
                             ticks=[0, len(curves) - 1])  # fmt: skip
    bar.outline.set_visible(False)
