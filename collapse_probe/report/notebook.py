"""The compact views that a notebook shows for an analysis and for a comparison."""

from __future__ import annotations

import html

from collapse_probe import plots
from collapse_probe.comparison import Comparison
from collapse_probe.report import content, differences
from collapse_probe.report.html import render_html
from collapse_probe.report.rendering import data_uri, fill
from collapse_probe.result import Analysis, Finding


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


def finding_to_html(finding: Finding) -> str:
    """One finding with its evidence, threshold and advice, as an HTML fragment."""
    return fill("notebook_finding.html.jinja", finding=finding)


class Interactive:
    """The interactive report inside a notebook: a frame of its own, so that neither gets into the other's way."""

    def __init__(self, analysis: Analysis, height: int) -> None:
        self._analysis, self._height = analysis, height

    def _repr_html_(self) -> str:
        page = html.escape(render_html(self._analysis))
        return f'<iframe srcdoc="{page}" width="100%" height="{self._height}" style="border: 0"></iframe>'


def comparison_to_html(comparison: Comparison) -> str:
    """Every verdict, the heatmaps side by side and the differences over all blocks, as an HTML fragment."""
    return fill(
        "notebook_comparison.html.jinja",
        reference=comparison.reference,
        verdicts=[(label, content.ordered(item.findings)) for label, item in comparison.analyses.items()],
        heatmaps=data_uri(plots.render(plots.heatmaps_compared(comparison.analyses)[0], "png", 144)),
        tables=[(label, differences.rows(comparison, label)) for label in comparison.differences],
        method=differences.method(comparison),
        crossed=[line for cross in comparison.cross for line in differences.cross_in_words(cross)],
    )
