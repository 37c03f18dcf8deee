"""All figures of an analysis, each drawn once, however many files and pages show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from collapse_probe.plots.curves import adjacent_similarity
from collapse_probe.plots.details import similarity_by_head, similarity_by_token
from collapse_probe.plots.families import (
    across_layers,
    entropy_and_rank,
    has_family,
    heads,
    norms_and_branches,
    tokens,
    where_attention_goes,
)
from collapse_probe.plots.matrices import has_beside, layer_similarity, similarity_beside, similarity_parts
from collapse_probe.plots.overview import overview
from collapse_probe.plots.sizes import check_width, figure_style
from collapse_probe.plots.style import render, settle
from collapse_probe.readings import FAMILIES
from collapse_probe.result import Analysis

#: File name (without its ending) -> what draws it.
FIGURES: dict[str, Callable[[Analysis], tuple[Figure, Any]]] = {
    "overview": overview,
    "layer_similarity": layer_similarity,
    "similarity_parts": similarity_parts,
    "adjacent_similarity": adjacent_similarity,
    "across_layers": across_layers,
    "similarity_beside": similarity_beside,
    "heads": heads,
    "entropy_and_rank": entropy_and_rank,
    "where_attention_goes": where_attention_goes,
    "tokens": tokens,
    "norms_and_branches": norms_and_branches,
    "similarity_by_head": similarity_by_head,
    "similarity_by_token": similarity_by_token,
}

#: Figures of pairs of layers, which a single layer does not have.
_OF_PAIRS = ("layer_similarity", "similarity_parts", "adjacent_similarity", "similarity_by_head", "similarity_by_token")


class Gallery:
    """The figures of one analysis by name, drawn when they are first asked for.

    The analysis must not change in between.

    Args:
        analysis: what to draw.
        width, titles: of all figures, as for :func:`~collapse_probe.plots.figure_style`.

    Attributes:
        names: the figures that have something to show, in reading order; none where the analysis holds no layers.
    """

    def __init__(self, analysis: Analysis, width: str | None = None, titles: bool = True) -> None:
        check_width(width)
        self.analysis = analysis
        self._width, self._titles = width, titles
        self.names = [name for name in FIGURES if _has(analysis, name)]
        self._figures: dict[str, Figure] = {}
        self._pngs: dict[str, bytes] = {}

    def figure(self, name: str, draw: Callable[[Analysis], tuple[Figure, Any]] | None = None) -> Figure:
        """The figure of that name; `draw` makes it where it is none of the gallery's own."""
        if name not in self._figures:
            with figure_style(self._width, self._titles):
                self._figures[name] = (draw or FIGURES[name])(self.analysis)[0]
        return self._figures[name]

    def render(self, name: str, suffix: str, draw: Callable[[Analysis], tuple[Figure, Any]] | None = None) -> bytes:
        """A figure as the bytes of a file of that ending, at print resolution."""
        if suffix == "png" and name in self._pngs:
            return self._pngs[name]
        figure = self.figure(name, draw)
        rendered = render(figure, suffix)
        settle(figure)
        if suffix == "png":
            self._pngs[name] = rendered
        return rendered


def _has(analysis: Analysis, name: str) -> bool:
    if not analysis.groups:
        return False
    if name in FAMILIES:
        return has_family(analysis, name)
    if name == "similarity_beside":
        return bool(has_beside(analysis))
    if name in _OF_PAIRS:
        return any(len(group.layers) > 1 and "similarity" in group.matrices.get("all", {}) for group in analysis.groups)
    return True
