"""The report: one self-contained HTML file, readable on a phone, on paper, in the dark, and without colours."""

from __future__ import annotations

from pathlib import Path

from collapse_probe.files import write_atomically
from collapse_probe.plots import Gallery
from collapse_probe.report import charts, content, figures, scripts
from collapse_probe.report.explorer import MEANINGS, explorer
from collapse_probe.report.rendering import fill
from collapse_probe.result import Analysis


def render_html(analysis: Analysis | Gallery) -> str:
    """The whole page: nothing loaded from anywhere, every text escaped, pictures and Plotly inside.

    Args:
        analysis: what to report, or its :class:`~collapse_probe.plots.Gallery`, so that a figure that has been drawn
            is not drawn again.
    """
    gallery = analysis if isinstance(analysis, Gallery) else Gallery(analysis)
    analysis = gallery.analysis
    sections, between = charts.sections(analysis), explorer(analysis)
    drawn = {
        "charts": [chart.drawn for section in sections for chart in section.charts],
        "explorer": None if between is None else {**between.drawn, "start": between.start},
        "meanings": MEANINGS,
        "order": [] if between is None else [name for name, _, _ in between.readings],
        "parts": [] if between is None else [name for name, _ in between.parts],
    }
    return fill(
        "report.html.jinja",
        policy=scripts.policy(),
        plotly=scripts.plotly(),
        script=scripts.page(),
        data=scripts.as_data(drawn),
        model=content.model_name(analysis),
        complete=analysis.complete,
        extent=content.extent(analysis),
        origin=content.origin(analysis),
        warnings=content.warnings(analysis),
        findings=content.ordered(analysis.findings),
        derived=content.derived(analysis),
        hero=figures.hero(gallery),
        explorer=between,
        sections=sections,
        columns=content.columns(analysis),
        rows=content.rows(analysis),
        groups=content.groups(analysis),
        streams=content.streams(analysis),
        gaps=content.gaps(analysis),
        absent=content.absent(analysis),
        glossary=content.glossary(analysis),
        provenance=content.provenance_rows(analysis),
    )


def write_report(analysis: Analysis | Gallery, path: str | Path) -> Path:
    """Write :func:`render_html` to a file, whole or not at all; returns the path.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_atomically(path, render_html(analysis))
