"""Figures as files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from collapse_probe.errors import UsageError
from collapse_probe.files import write_atomically
from collapse_probe.plots.gallery import FIGURES, Gallery
from collapse_probe.result import Analysis

FORMATS = ("png", "svg")


def figure_files() -> list[str]:
    """The names of all files that :func:`save_figures` may write."""
    return [f"{name}.{suffix}" for name in FIGURES for suffix in FORMATS]


def save_figures(analysis: Analysis | Gallery, folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw every figure that has something to show into a folder as ``overview.png``, ``overview.svg`` and so on.

    Args:
        analysis: what to draw, or its :class:`Gallery`, which keeps what is drawn for a report.
        folder: made if it does not exist.
        formats: file endings that matplotlib can write: ``"png"``, ``"svg"``, ``"pdf"``…

    Returns:
        The paths, in the order drawn.

    Raises:
        UsageError: matplotlib does not write such a format.
        OutputError: a file cannot be written.
    """
    known = FigureCanvasAgg.get_supported_filetypes()
    unknown = [name for name in formats if name not in known]
    if unknown:
        raise UsageError(f"formats={list(formats)!r}: cannot write {unknown}; choose among {sorted(known)}.")
    gallery = analysis if isinstance(analysis, Gallery) else Gallery(analysis)
    return [
        write_atomically(Path(folder) / f"{name}.{suffix}", gallery.render(name, suffix))
        for name in gallery.names
        for suffix in formats
    ]
