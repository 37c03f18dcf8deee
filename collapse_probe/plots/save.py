"""Figures as files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from collapse_probe.errors import UsageError
from collapse_probe.files import write_atomically
from collapse_probe.plots.curves import adjacent_similarity, entropy, head_diversity
from collapse_probe.plots.details import similarity_by_head, similarity_by_token
from collapse_probe.plots.matrices import layer_similarity, similarity_parts
from collapse_probe.plots.style import render
from collapse_probe.result import Analysis

#: File name (without its ending) -> what draws it.
FIGURES: dict[str, Callable[[Analysis], tuple[Figure, Any]]] = {
    "layer_similarity": layer_similarity,
    "similarity_parts": similarity_parts,
    "adjacent_similarity": adjacent_similarity,
    "head_diversity": head_diversity,
    "entropy": entropy,
    "similarity_by_head": similarity_by_head,
    "similarity_by_token": similarity_by_token,
}


def save_figures(analysis: Analysis, folder: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw every figure into a folder as ``layer_similarity.png``, ``layer_similarity.svg`` and so on.

    Args:
        analysis: what to draw.
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
    paths = []
    for name, draw in FIGURES.items():
        figure, _ = draw(analysis)
        for suffix in formats:
            paths.append(write_atomically(Path(folder) / f"{name}.{suffix}", render(figure, suffix)))
    return paths
