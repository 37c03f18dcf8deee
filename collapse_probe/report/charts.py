"""Readings by depth for the interactive page: what each chart shows, as plain data, and what it means, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from collapse_probe import references
from collapse_probe.plots.families import PANELS, spectra
from collapse_probe.plots.panels import Panel, Track, axis_ends, bands_in_words, without_outliers
from collapse_probe.plots.select import arrange, arrange_streams, column, spread
from collapse_probe.readings import FAMILIES, Reading, reading_of
from collapse_probe.report import content
from collapse_probe.result import Analysis

#: What to look for in the charts of a family.
HINTS = {
    "across_layers": "Blocks repeat each other where all of these are high. The similarity ratio counts columns "
    "whose M with the nearest blocks is above the threshold.",
    "heads": "The heads of a block are copies of each other where diversity and divergence are near 0 and the "
    "effective number of heads is near 1.",
    "entropy_and_rank": "Uniform, untrained attention has entropy near 1, r near 0 and rank near 1. A trained block "
    "whose rank is near 1 attends alike for every query.",
    "where_attention_goes": "Distance tells local from global attention. A sink is a key that draws more than 0.3 of "
    "all attention; constant rows near 1 mean that attention ignores the query.",
    "tokens": "Tokens have become alike where the residual and the high frequencies are near 0 and the similarity is "
    "near 1.",
    "norms_and_branches": "Tokens of a norm far above the median distort other readings; a branch near 0 changes its "
    "tokens little.",
}

#: The parts of M stand before the other readings across layers: they are what the verdict rests on.
_PARTS_OF_M = (
    Panel(
        "M and its image-independent part, to the previous block", "Cosine",
        {"similarity_to_previous": "M", "image_independent_to_previous": "image-independent"},
    ),
    Panel(
        "Centred M and image-specific excess", "Cosine",
        {"centred_to_previous": "centred", "excess_to_previous": "excess"},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        title: what it shows.
        drawn: plain data that the page's script draws.
        spoken: the same in words, for readers who do not see it.
        meanings: each reading in it: label, meaning, and ranges in known models.
    """

    title: str
    drawn: dict[str, Any]
    spoken: str
    meanings: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Section:
    """One family of readings: its charts and the table of its values."""

    family: str
    title: str
    question: str
    hint: str
    charts: list[Chart]
    table: content.Table


def sections(analysis: Analysis) -> list[Section]:
    """Every family that the analysis has readings of."""
    found = []
    for family, (title, question) in FAMILIES.items():
        table = content.family_table(analysis, family)
        charts = _charts(analysis, family) if analysis.groups else []
        if charts or table.headings:
            bands = bands_in_words(analysis, [name for chart in charts for name in chart.drawn.get("readings", ())])
            hint = f"{HINTS[family]} {bands}" if charts else ""
            found.append(Section(family, title, question, hint, charts, table))
    return found


def _charts(analysis: Analysis, family: str) -> list[Chart]:
    tracks = {False: Track.along(arrange(analysis, None)), True: Track.along(arrange_streams(analysis, None))}
    panels = (*_PARTS_OF_M, *PANELS[family]) if family == "across_layers" else PANELS[family]
    shown = [panel for panel in panels if panel.defined(analysis.layers)]
    explained: set[str] = set()
    charts = [_by_depth(analysis, panel, tracks[panel.of_features], explained) for panel in shown]
    if family == "tokens" and (curves := spectra(analysis)) is not None:
        charts.append(_spectrum(*curves))
    return charts


def _by_depth(analysis: Analysis, panel: Panel, track: Track, explained: set[str]) -> Chart:
    """One panel; readings that an earlier chart explained are not explained again."""
    table = analysis.layers.loc[track.layers]
    names = panel.defined(table)
    twins = without_outliers(table, panel, names)
    low, high, log = axis_ends(table, panel, names)
    labels = {
        name: "all: none has a high norm" if f"{name}_typical" in twins else panel.lines[name]
        for name in names
        if name not in twins
    }
    drawn = {
        "kind": "depth",
        "readings": names,
        "ylabel": panel.ylabel,
        "xlabel": track.label,
        "ends": [low, high],
        "log": log,
        "layers": list(track.layers),
        "numbers": list(track.numbers),
        "lanes": [lane.tolist() for lane in track.lanes],
        "brackets": [list(item) for item in track.brackets],
        "lines": [_line(table, name, label, list(panel.lines).index(name)) for name, label in labels.items()],
        "onset": _onset(analysis, track) if "similarity_ratio" in names else [],
    }
    return Chart(panel.title, drawn, f"{panel.title} by layer: {_spoken(table, labels)}.", _meanings(names, explained))


def _line(table: pd.DataFrame, name: str, label: str, look: int) -> dict[str, Any]:
    values = column(table, name)
    low, high, interval = spread(table, name)
    return {
        "label": label,
        "look": look,
        "values": numbers(values),
        "low": numbers(low),
        "high": numbers(high),
        "interval": interval,
    }


def _onset(analysis: Analysis, track: Track) -> list[dict[str, Any]]:
    """Where the run of similar blocks begins that reaches the last one, by position on the axis, for each group."""
    found = []
    for group in analysis.groups:
        onset = group.derived.get("onset", {})
        value = onset.get("value")
        if value is None or not set(group.layers) <= set(track.layers):
            continue
        own = [track.layers.index(layer) for layer in group.layers]
        low, high = (onset.get(end) for end in ("low", "high"))
        between = [own[round(low)], own[round(high)]] if low is not None and high is not None else None
        found.append({"at": own[round(value)], "between": between})
    return found


def _spectrum(name: str, at: NDArray[np.float64], curves: NDArray[np.float64]) -> Chart:
    drawn = {"kind": "spectrum", "at": numbers(at), "curves": [numbers(curve) for curve in curves]}
    last = curves[:, -1][np.isfinite(curves[:, -1])]
    spoken = f"Log amplitude over frequency, a line for each block; at the highest frequency {span(last)}."
    meaning = "How much of each frequency is in the token features after each block, relative to the lowest."
    source = "Park and Kim (arXiv 2202.06709), fig. 2"
    return Chart(f"Spectrum{name}", drawn, spoken, [("Spectrum", meaning, source)])


def _meanings(names: Sequence[str], explained: set[str]) -> list[tuple[str, str, str]]:
    """Each reading once, however many of its lines there are."""
    readings: dict[str, Reading] = {}
    for name in names:
        reading = reading_of(name)
        if reading is not None and reading.name not in explained:
            readings[reading.name] = reading
    explained.update(readings)
    return [(item.label, item.meaning, references.in_words(item.name)) for item in readings.values()]


def _spoken(table: pd.DataFrame, labels: dict[str, str]) -> str:
    return "; ".join(f"{label} {span(column(table, name))}" for name, label in labels.items())


def span(values: NDArray[np.float64]) -> str:
    """From the smallest to the largest, in words."""
    finite = values[np.isfinite(values)]
    return f"{finite.min():.2f} to {finite.max():.2f}" if finite.size else "not defined"


def numbers(values: NDArray[np.float64]) -> list[float | None]:
    """As JSON knows them, to five significant digits; None where nothing is defined."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]
