"""Several analyses on one page: each one's verdict, the same pictures and the same numbers beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collapse_probe.files import write_atomically
from collapse_probe.plots import curves_compared, heatmaps_compared, render
from collapse_probe.report import content
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


def render_comparison(
    analyses: Mapping[str, Analysis], introduction: Sequence[str] = (), links: Mapping[str, str] | None = None
) -> str:
    """A self-contained page that shows analyses side by side.

    Args:
        analyses: one to four, by label.
        introduction: paragraphs at the top.
        links: where the reports of the single analyses are, by label.

    Raises:
        UsageError: too many analyses, or one without layers.
    """
    links = links or {}
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
    )


def write_comparison(
    analyses: Mapping[str, Analysis],
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
