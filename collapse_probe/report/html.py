"""The report: one self-contained HTML file, readable on a phone, on paper, in the dark, and without colours."""

from __future__ import annotations

from pathlib import Path

from collapse_probe.files import write_atomically
from collapse_probe.report import content
from collapse_probe.report.figures import hero_name, pictures
from collapse_probe.report.rendering import fill
from collapse_probe.result import Analysis


def render_html(analysis: Analysis) -> str:
    """The whole page: no script, nothing loaded from anywhere, every text escaped, pictures inside."""
    shown = pictures(analysis)
    hero = next((picture for picture in shown if picture.name == hero_name(analysis)), None)
    return fill(
        "report.html.jinja",
        model=content.model_name(analysis),
        extent=content.extent(analysis),
        origin=content.origin(analysis),
        findings=content.ordered(analysis.findings),
        hero=hero,
        pictures=[picture for picture in shown if picture is not hero],
        rows=content.rows(analysis),
        groups=content.groups(analysis),
        gaps=content.gaps(analysis),
        provenance=content.provenance_rows(analysis),
    )


def write_report(analysis: Analysis, path: str | Path) -> Path:
    """Write :func:`render_html` to a file, whole or not at all; returns the path.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_atomically(path, render_html(analysis))
