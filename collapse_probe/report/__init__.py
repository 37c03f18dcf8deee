"""An :class:`~collapse_probe.result.Analysis` for readers: terminal summary, notebook view, self-contained HTML file.

All three lead with the verdict and end with what was not measured. None of them needs torch or the network.
"""

from __future__ import annotations

from collapse_probe.report.comparison import render_comparison, write_comparison
from collapse_probe.report.html import render_html, write_report
from collapse_probe.report.notebook import to_html
from collapse_probe.report.terminal import (
    print_comparison,
    print_conditions,
    print_differences,
    print_series,
    print_summary,
)
from collapse_probe.report.tracking import render_track, write_track

__all__ = [
    "print_comparison",
    "print_conditions",
    "print_differences",
    "print_series",
    "print_summary",
    "render_comparison",
    "render_html",
    "render_track",
    "to_html",
    "write_comparison",
    "write_report",
    "write_track",
]
