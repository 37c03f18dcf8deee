"""Pictures of an :class:`~collapse_probe.result.Analysis`: matplotlib and seaborn, for papers and for the report.

Every function takes an analysis and returns ``(figure, axes)``. Nothing is shown, nothing is registered with pyplot,
and the caller's matplotlib settings stay as they were.
"""

from __future__ import annotations

from collapse_probe.plots.curves import adjacent_similarity, entropy, head_diversity
from collapse_probe.plots.details import similarity_by_head, similarity_by_token
from collapse_probe.plots.matrices import layer_similarity, similarity_parts
from collapse_probe.plots.save import save_figures
from collapse_probe.plots.style import render

__all__ = [
    "adjacent_similarity",
    "entropy",
    "head_diversity",
    "layer_similarity",
    "render",
    "save_figures",
    "similarity_by_head",
    "similarity_by_token",
    "similarity_parts",
]
