"""Small panels of readings by depth: lines with light error bands, a key above the axes, one panel per question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from collapse_probe.plots.select import Arrangement, column, spread
from collapse_probe.plots.sizes import fold, room, text_width, upright
from collapse_probe.plots.style import BLACK, BLUE, GREEN, VERMILION, bracket, thinned_ticks
from collapse_probe.readings import FEATURES, READINGS
from collapse_probe.result import Analysis

#: Colour, marker and line style of the first line of a panel, the second…: they stay apart in grey.
STYLES = ((BLACK, "o", "-"), (BLUE, "s", "--"), (VERMILION, "^", ":"), (GREEN, "D", "-."))

#: Values that span more than this ratio are drawn on a logarithmic axis, where the panel allows it.
_WIDE = 30
_BRACKETS, _KEY = 14, 11  # points above the axes that they need
_SAMPLE = 22  # points beside its name that a sample in the key needs


@dataclass(frozen=True)
class Panel:
    """One question, answered by one to four lines.

    Attributes:
        title: the question in words.
        ylabel: quantity and unit.
        lines: column of the layers table -> its name in the key.
        log: whether values that span orders of magnitude may get a logarithmic axis.
        adorn: draws what else belongs there: reference lines, an onset.
    """

    title: str
    ylabel: str
    lines: dict[str, str]
    log: bool = False
    adorn: Callable[[Axes, Analysis, Track], None] | None = None

    @property
    def of_features(self) -> bool:
        """Whether it shows residual streams (else attention maps)."""
        return all(READINGS[name.removesuffix(part)].reads == FEATURES for name, part in self._parts())

    @property
    def metrics(self) -> list[str]:
        """The metrics that its lines come from."""
        return list(dict.fromkeys(READINGS[name.removesuffix(part)].metric for name, part in self._parts()))

    def _parts(self) -> list[tuple[str, str]]:
        return [(name, next((p for p in ("_prefix", "_patch") if name.endswith(p)), "")) for name in self.lines]

    def defined(self, table: pd.DataFrame) -> list[str]:
        """The columns that hold a value."""
        return [name for name in self.lines if np.isfinite(column(table, name)).any()]


@dataclass(frozen=True)
class Track:
    """What lies along the x axis.

    Attributes:
        layers: names, from left to right.
        numbers: what stands at their ticks.
        label: what the axis is called.
        lanes: positions that one line joins.
        brackets: first position, the one behind the last, and the letter of each group or stream.
    """

    layers: list[str]
    numbers: list[int]
    label: str
    lanes: list[NDArray[np.intp]]
    brackets: list[tuple[int, int, str]] = field(default_factory=list)

    @classmethod
    def along(cls, shown: Arrangement) -> Track:
        """Groups or streams side by side."""
        lanes = [np.arange(start, stop) for start, stop in shown.spans]
        names = [(*span, group.name) for span, group in zip(shown.spans, shown.groups, strict=True)]
        return cls(shown.layers, shown.numbers, shown.label, lanes, names if shown.several else [])


def draw_panel(ax: Axes, analysis: Analysis, panel: Panel, track: Track) -> None:
    """Lines, bands, limits and key of a panel that has something to show."""
    table = analysis.layers.loc[track.layers]
    names = panel.defined(table)
    small = len(track.layers) > 20
    twins = without_outliers(table, panel, names)
    for place, name in enumerate(panel.lines):
        if name in names and name not in twins:
            label = "all: none has a high norm" if f"{name}_typical" in twins else panel.lines[name]
            _line(ax, table, track, name, label, place, small)
    ax.set_ylabel(upright(ax, panel.ylabel))
    _limits(ax, table, panel, names)
    if panel.adorn is not None:
        panel.adorn(ax, analysis, track)
    above = _BRACKETS if track.brackets else 0
    if len(panel.lines) > 1:
        above += _KEY * _key(ax, above)
    ax.set_title(fold(panel.title, room(ax), 8, "bold"), pad=4 + above, fontsize=8)
    ax.grid(visible=True)
    ax.set_axisbelow(True)


def depth_axis(ax: Axes, track: Track, numbers: bool = True, most: int = 16) -> None:
    """Ticks, label and brackets of the x axis; without numbers where a panel below has them."""
    count = len(track.layers)
    ticks = thinned_ticks(count, most)
    ax.set_xticks(ticks, labels=[str(track.numbers[tick]) for tick in ticks] if numbers else [""] * len(ticks))
    ax.set_xlabel(fold(track.label, room(ax), 8) if numbers else "")
    ax.set_xlim(-0.5, count - 0.5)
    if track.brackets:
        bracket(ax, [(start - 0.5, stop - 0.5) for start, stop, _ in track.brackets], [b[2] for b in track.brackets])
        for _, stop, _ in track.brackets[:-1]:
            ax.axvline(stop - 0.5, color="0.8", linewidth=0.6, zorder=0)


def bands_in_words(analysis: Analysis, names: Sequence[str]) -> str:
    """What the error bands of these columns are."""
    known = [name for name in names if np.isfinite(column(analysis.layers, name)).any()]
    intervals = [name for name in known if spread(analysis.layers, name)[2]]
    if not intervals:
        return "Bands: ±1 standard error over images."
    own = [READINGS[name].label[0].lower() + READINGS[name].label[1:] for name in intervals]
    listed = " and ".join(filter(None, [", ".join(own[:-1]), own[-1]]))
    if len(intervals) == len(known):
        return "Bands: 95 % intervals."
    return f"Bands: ±1 standard error over images; 95 % interval of the {listed}."


def without_outliers(table: pd.DataFrame, panel: Panel, names: Sequence[str]) -> list[str]:
    """Lines without high-norm tokens that say the same as those with them, as there are none."""
    pairs = [(name, f"{name}_typical") for name in panel.lines if f"{name}_typical" in names]
    return [twin for name, twin in pairs if np.array_equal(column(table, name), column(table, twin), equal_nan=True)]


def _line(ax: Axes, table: pd.DataFrame, track: Track, name: str, label: str, place: int, small: bool) -> None:
    colour, marker, dashes = STYLES[place]
    values, (low, high, _) = column(table, name), spread(table, name)
    for number, lane in enumerate(track.lanes):
        ax.fill_between(lane, low[lane], high[lane], color=colour, alpha=0.22, linewidth=0)
        ax.plot(
            lane, values[lane], color=colour, marker=marker, linestyle=dashes, label="_" if number else label,
            markersize=2.2 if small else 3.2, linewidth=1.1, markeredgewidth=0.9,
            # Hollow, so that a marker beneath stays visible.
            markerfacecolor="white" if place else colour,
        )  # fmt: skip


def _limits(ax: Axes, table: pd.DataFrame, panel: Panel, names: Sequence[str]) -> None:
    low, high, log = axis_ends(table, panel, names)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(numticks=5))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        return
    ax.set_ylim(low, high)


def axis_ends(table: pd.DataFrame, panel: Panel, names: Sequence[str]) -> tuple[float, float, bool]:
    """Ends of a panel's axis, and whether it is logarithmic; then they are those of the values.

    The range of the readings where it has ends, wider where values (or bands) leave it, with a margin.
    """
    ends = np.concatenate([np.concatenate(spread(table, name)[:2]) for name in names])
    ends = ends[np.isfinite(ends)]
    known = [READINGS[name] for name in names if name in READINGS] or [READINGS[_whole(name)] for name in names]
    values = np.concatenate([column(table, name) for name in names])
    values = values[np.isfinite(values)]
    if panel.log and values.min() > 0 and values.max() > _WIDE * values.min():
        return float(values.min()), float(values.max()), True
    lows, highs = [item.low for item in known], [item.high for item in known]
    low = min([ends.min(), *(end for end in lows if end is not None)])
    high = max([ends.max(), *(end for end in highs if end is not None)])
    if None not in lows and ends.min() >= min(cast("list[float]", lows)) - 1e-9:
        low = min(cast("list[float]", lows))
    if high - low < 1e-9:
        high = low + 0.1
    margin = 0.06 * (high - low)
    return float(low - margin), float(high + margin), False


def _whole(name: str) -> str:
    return name.removesuffix("_prefix").removesuffix("_patch")


def _key(ax: Axes, above: float) -> int:
    """Samples of the lines with their names, in a row between axes and title, clear of the data; in rows where one is
    too narrow. Returns how many."""
    figure = cast(Figure, ax.figure)
    _, names = ax.get_legend_handles_labels()
    columns = 4 if sum(text_width(name, 7) + _SAMPLE / 72 for name in names) <= room(ax) else 1
    shift = ScaledTranslation(0, (above + 1) / 72, figure.dpi_scale_trans)
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), bbox_transform=ax.transAxes + shift, ncols=columns, borderaxespad=0,
        handlelength=1.8, handletextpad=0.4, columnspacing=1.0, borderpad=0, labelspacing=0.35, fontsize=7,
    )  # fmt: skip
    return -(-len(names) // columns)
