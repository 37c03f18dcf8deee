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


def save_figures(
    analysis: Analysis | Gallery,
    folder: str | Path,
    formats: Sequence[str] = FORMATS,
    width: str | None = None,
    titles: bool = True,
) -> list[Path]:
    """Draw every figure that has something to show into a folder as ``overview.png``, ``overview.svg`` and so on.

    Args:
        analysis: what to draw, or its :class:`Gallery`, which keeps what is drawn for a report.
        folder: made if it does not exist.
        formats: file endings that matplotlib can write: ``"png"``, ``"svg"``, ``"pdf"``…
        width, titles: as for :func:`~collapse_probe.plots.figure_style`.

    Returns:
        The paths, in the order drawn.

    Raises:
        UsageError: matplotlib does not write such a format, or there is no such width; or a gallery is given with a
            width or without titles, both of which are its own.
        OutputError: a file cannot be written.
    """
    check_formats(formats)
    if isinstance(analysis, Gallery) and (width is not None or not titles):
        raise UsageError("width and titles are the gallery's own: give them to Gallery(analysis, width, titles).")
    gallery = analysis if isinstance(analysis, Gallery) else Gallery(analysis, width, titles)
    return [
        write_atomically(Path(folder) / f"{name}.{suffix}", gallery.render(name, suffix))
        for name in gallery.names
        for suffix in formats
    ]


def check_formats(formats: Sequence[str]) -> None:
    """Raises UsageError for a file ending that matplotlib does not write."""
    known = FigureCanvasAgg.get_supported_filetypes()
    unknown = [name for name in formats if name not in known]
    if unknown:
        raise UsageError(f"formats={list(formats)!r}: cannot write {unknown}; choose among {sorted(known)}.")
