"""Several analyses on one page: each one's verdict, the same pictures and the same numbers beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collapse_probe.comparison import Comparison, Cross
from collapse_probe.files import write_atomically
from collapse_probe.plots import cross_similarity, curves_compared, differences, heatmaps_compared, render
from collapse_probe.report import content
from collapse_probe.report import differences as apart
from collapse_probe.report.compared import in_short, numbers
from collapse_probe.report.rendering import data_uri, fill
from collapse_probe.result import Analysis, Finding

_LEGEND = "Mean over blocks (smallest to largest)."


@dataclass(frozen=True)
class Side:
    """One analysis as the page shows it: its label, how much was looked at, its verdict, where its own report is."""

    label: str
    extent: str
    findings: list[Finding]
    link: str


@dataclass(frozen=True)
class Apart:
    """What sets one model apart from the first: its label, tables by place, and the picture of layers side by side."""

    label: str
    tables: list[tuple[str, list[tuple[str, list[str]]]]]
    cross: Cross | None
    picture: str
    spoken: list[str]


def render_comparison(
    analyses: Mapping[str, Analysis] | Comparison,
    introduction: Sequence[str] = (),
    links: Mapping[str, str] | None = None,
) -> str:
    """A self-contained page that shows analyses side by side; of a comparison, also what sets its models apart.

    Args:
        analyses: one to four, by label, or a comparison.
        introduction: paragraphs at the top.
        links: where the reports of the single analyses are, by label.

    Raises:
        UsageError: too many analyses, or one without layers.
    """
    links = links or {}
    comparison = analyses if isinstance(analyses, Comparison) else None
    if isinstance(analyses, Comparison):
        analyses = analyses.analyses
    sides = [
        Side(label, content.headline(item), content.ordered(item.findings), links.get(label, ""))
        for label, item in analyses.items()
    ]
    heatmaps, curves = (data_uri(render(draw(analyses)[0])) for draw in (heatmaps_compared, curves_compared))
    return fill(
        "comparison.html.jinja",
        introduction=introduction,
        sides=sides,
        heatmaps=heatmaps,
        curves=curves,
        spoken="; ".join(f"{label}: {in_short(item)}" for label, item in analyses.items()),
        numbers=numbers(analyses),
        legend=_LEGEND,
        reference="" if comparison is None else comparison.reference,
        apart=[] if comparison is None else [_apart(comparison, label) for label in comparison.differences],
        differences="" if comparison is None else data_uri(render(differences(comparison)[0])),
        method="" if comparison is None else apart.method(comparison),
        notes=[] if comparison is None else comparison.notes[0 if comparison.paired else 1 :],
    )


def _apart(comparison: Comparison, label: str) -> Apart:
    cross = next((item for item in comparison.cross if item.second == label), None)
    tables = [(where, apart.rows(comparison, label, where)) for where in apart.PLACES]
    picture = "" if cross is None or not cross.matrices else data_uri(render(cross_similarity(cross)[0]))
    spoken = [] if cross is None else apart.cross_in_words(cross)
    return Apart(label, [(where, rows) for where, rows in tables if rows], cross, picture, spoken)


def write_comparison(
    analyses: Mapping[str, Analysis] | Comparison,
    path: str | Path,
    introduction: Sequence[str] = (),
    links: Mapping[str, str] | None = None,
) -> Path:
    """Write :func:`render_comparison` to a file, whole or not at all; returns the path.

    Raises:
        OutputError: the file cannot be written.
        UsageError: as :func:`render_comparison`.
    """
    return write_atomically(path, render_comparison(analyses, introduction, links))
