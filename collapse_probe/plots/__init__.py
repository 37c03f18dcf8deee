"""Pictures of an :class:`~collapse_probe.result.Analysis` and of attention itself, by matplotlib and seaborn: for
papers and for the report.

Every function takes an analysis (some take several, a series of them, or a :class:`~collapse_probe.look.Look`) and
returns ``(figure, axes)``. Nothing is
shown, nothing is registered with pyplot, and the caller's matplotlib settings stay as they were. Width and titles are
chosen with :func:`figure_style`.

Figures of one axes draw on the caller's `ax`, those of several on an array of them. Where the number of panels depends
on what there is to show (`overview`, the families `across_layers`, `heads`, `entropy_and_rank`, `where_attention_goes`,
`tokens` and `norms_and_branches`, `curves_compared`, `cross_similarity`, and all pictures of a look) they lay out a
figure of their own.
"""

from __future__ import annotations

from collapse_probe.plots.attention import (
    attention_by_depth,
    attention_over_image,
    column_by_depth,
    rollout_by_depth,
)
from collapse_probe.plots.comparison import curves_compared, heatmaps_compared
from collapse_probe.plots.cross import cross_similarity, differences
from collapse_probe.plots.curves import adjacent_similarity, entropy, head_diversity
from collapse_probe.plots.details import similarity_by_head, similarity_by_token
from collapse_probe.plots.families import (
    across_layers,
    entropy_and_rank,
    heads,
    norms_and_branches,
    tokens,
    where_attention_goes,
)
from collapse_probe.plots.gallery import Gallery
from collapse_probe.plots.matrices import layer_similarity, similarity_beside, similarity_parts
from collapse_probe.plots.over_steps import heatmap_at, heatmaps_over_steps, over_steps
from collapse_probe.plots.overview import overview
from collapse_probe.plots.save import save_figures
from collapse_probe.plots.sizes import figure_style
from collapse_probe.plots.style import render

__all__ = [
    "Gallery",
    "across_layers",
    "adjacent_similarity",
    "attention_by_depth",
    "attention_over_image",
    "column_by_depth",
    "cross_similarity",
    "curves_compared",
    "differences",
    "entropy",
    "entropy_and_rank",
    "figure_style",
    "head_diversity",
    "heads",
    "heatmap_at",
    "heatmaps_compared",
    "heatmaps_over_steps",
    "layer_similarity",
    "norms_and_branches",
    "over_steps",
    "overview",
    "render",
    "rollout_by_depth",
    "save_figures",
    "similarity_beside",
    "similarity_by_head",
    "similarity_by_token",
    "similarity_parts",
    "tokens",
    "where_attention_goes",
]
