"""The compact view that a notebook shows for an analysis."""

from __future__ import annotations

from collapse_probe import plots
from collapse_probe.report import content
from collapse_probe.report.rendering import data_uri, fill
from collapse_probe.result import Analysis


def to_html(analysis: Analysis) -> str:
    """Verdict, a small heatmap of M and the per-layer table as an HTML fragment; all text is escaped."""
    heatmap = data_uri(plots.render(plots.layer_similarity(analysis)[0], "png", 144)) if analysis.groups else None
    return fill(
        "notebook.html.jinja",
        headline=content.headline(analysis),
        findings=content.ordered(analysis.findings),
        heatmap=heatmap,
        columns=content.columns(analysis),
        rows=content.rows(analysis),
        warnings=content.warnings(analysis),
        top1=content.top1(analysis),
        derived=content.derived(analysis),
        groups=content.groups(analysis),
        gaps=content.gaps(analysis),
    )
