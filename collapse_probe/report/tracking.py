"""A series of checkpoints for readers: what a table and a page say of each step."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from collapse_probe.files import write_atomically
from collapse_probe.plots import heatmap_at, heatmaps_over_steps, over_steps, render
from collapse_probe.plots.over_steps import MOST_HEATMAPS, spaced, title_of
from collapse_probe.plots.select import column
from collapse_probe.report import content
from collapse_probe.report.compared import in_short
from collapse_probe.report.rendering import data_uri, fill
from collapse_probe.result import Analysis, Finding
from collapse_probe.series import UNITS, Series, in_words

#: Column of the layers table -> its heading: a mean over the blocks of the main group.
COLUMNS = {
    "similarity_to_previous": "M to previous",
    "centred_to_previous": "centred",
    "image_independent_to_previous": "image-indep.",
    "normalized_entropy": "entropy / log K",
    "cross_head_similarity": "head simil.",
    "token_similarity": "token simil.",
}

#: So many frames at most does the page hold; of more steps, these are evenly spaced.
MOST_FRAMES = 60
_FRAME_DPI = 130


@dataclass(frozen=True)
class Row:
    """One checkpoint as tables show it.

    Attributes:
        step, label, known: which it is, and how its step is known.
        cells: means over blocks, one for each of :func:`columns`.
        similar: number of similar blocks.
        top1: share of labelled images that the model gets right; empty without labels.
        findings: the gravest of its verdict: problems and warnings, or what is well.
        link: where its own report is; may be empty.
    """

    step: str
    label: str
    known: str
    cells: tuple[str, ...]
    similar: str
    top1: str
    findings: list[Finding]
    link: str = ""


@dataclass(frozen=True)
class Frame:
    """One picture of the slider."""

    title: str
    source: str
    alt: str


def columns(series: Series) -> dict[str, str]:
    """Those of :data:`COLUMNS` that an analysis of the series has."""
    return {
        name: heading
        for name, heading in COLUMNS.items()
        if any(np.isfinite(_mean(point.analysis, name)) for point in series.points)
    }


def rows(series: Series, links: Mapping[str, str] | None = None) -> list[Row]:
    """A row for each checkpoint, by ascending step."""
    found = []
    for point in series.points:
        analysis = point.analysis
        cells = tuple(content.decimal(_mean(analysis, name), 2) for name in columns(series))
        alike = analysis.main_group.derived.get("similar_blocks", {}).get("value") if analysis.groups else None
        top1 = analysis.provenance.get("top1")
        found.append(
            Row(
                in_words(point.step),
                point.label,
                point.known,
                cells,
                "–" if alike is None else f"{alike:g}",
                f"{100 * top1['accuracy']:.1f} %" if top1 else "",
                gravest(analysis),
                (links or {}).get(point.label, ""),
            )
        )
    return found


def gravest(analysis: Analysis) -> list[Finding]:
    """Problems and warnings; where there are none, the first of what else is said."""
    ordered = content.ordered(analysis.findings)
    return [item for item in ordered if item.severity in ("problem", "warning")] or ordered[:1]


def verdict_in_short(row: Row) -> tuple[str, str]:
    """The severity and code of the gravest finding, and how many more there are of problems and warnings."""
    if not row.findings:
        return "", "none"
    first, more = row.findings[0], len(row.findings) - 1
    return first.severity, f"{content.severity(first)[0]} {first.code}" + (f" +{more}" if more else "")


def extent(series: Series) -> str:
    """How much was looked at, in a line."""
    first, last = (in_words(step) for step in (series.steps[0], series.steps[-1]))
    count = "1 checkpoint" if len(series) == 1 else f"{len(series)} checkpoints"
    where = f"{series.unit} {first}" + (f" to {last}" if first != last else "")
    return f"{count} · {where} · {content.extent(series.points[-1].analysis)}"


def origins(series: Series) -> list[str]:
    """How steps are known, in sentences, most frequent first; single checkpoints are named."""
    counts = Counter(point.known for point in series.points)
    lines = []
    for known, count in counts.most_common():
        labels = [point.label for point in series.points if point.known == known]
        whose = (
            "all" if count == len(series) else ", ".join(labels[:3]) + (f" and {count - 3} more" if count > 3 else "")
        )
        lines.append(f"{known} ({whose})")
    return lines


def render_track(
    series: Series, links: Mapping[str, str] | None = None, pictures: Mapping[str, bytes] | None = None
) -> str:
    """A self-contained page: curves and heatmaps over steps, a slider through all of them, and what was found when.

    Its one script moves the slider; a policy in the page admits that script alone, by its digest, and nothing from
    anywhere else. Without scripts the heatmaps stand side by side.

    Args:
        series: what to show.
        links: where the reports of single checkpoints are, by label.
        pictures: the figures `over_steps` and `heatmaps_over_steps` as PNG, where they have been drawn.

    Raises:
        UsageError: an analysis without layers.
    """
    pictures = pictures or {}
    curves = pictures.get("over_steps") or render(over_steps(series)[0])
    heatmaps = pictures.get("heatmaps_over_steps") or render(heatmaps_over_steps(series)[0])
    script = fill("slider.js.jinja")
    return fill(
        "track.html.jinja",
        model=content.model_name(series.points[-1].analysis),
        extent=extent(series),
        axis=UNITS[series.unit],
        origins=origins(series),
        curves=data_uri(curves),
        heatmaps=data_uri(heatmaps),
        spoken=_spoken(series),
        several=any(len(point.analysis.groups) > 1 for point in series.points),
        left_out=max(0, len(series) - MOST_HEATMAPS),
        frames=_frames(series) if len(series) > 1 else [],
        columns=columns(series),
        rows=rows(series, links),
        skipped=series.skipped,
        command=str(series.provenance.get("command", "")),
        options=series.provenance.get("options", {}),
        script=Markup(script),  # our own file, without values
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def write_track(
    series: Series,
    path: str | Path,
    links: Mapping[str, str] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> Path:
    """Write :func:`render_track` to a file, whole or not at all; returns the path.

    Raises:
        OutputError: the file cannot be written.
        UsageError: as :func:`render_track`.
    """
    return write_atomically(path, render_track(series, links, pictures))


def _frames(series: Series) -> list[Frame]:
    return [
        Frame(
            title_of(series, place),
            data_uri(render(heatmap_at(series, place)[0], dpi=_FRAME_DPI)),
            f"Heatmap of the similarity M between all blocks. {title_of(series, place)}: "
            f"{in_short(series.points[place].analysis)}.",
        )
        for place in spaced(len(series), MOST_FRAMES)
    ]


def _spoken(series: Series) -> str:
    """What the curves show, for those who do not see them."""
    first, last = series.points[0], series.points[-1]
    parts = [
        f"{heading} from {content.decimal(_mean(first.analysis, name), 2)} to "
        f"{content.decimal(_mean(last.analysis, name), 2)}"
        for name, heading in columns(series).items()
    ]
    return f"From {series.unit} {in_words(first.step)} to {in_words(last.step)}, mean over blocks: {', '.join(parts)}"


def _mean(analysis: Analysis, name: str) -> float:
    if not analysis.groups:
        return float("nan")
    values = column(analysis.layers.loc[analysis.main_group.layers], name)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
