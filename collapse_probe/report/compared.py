"""What is said of several analyses beside each other, whatever it is written on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from collapse_probe.plots.select import column
from collapse_probe.report import content
from collapse_probe.result import Analysis

#: Column of the layers table -> what its row is called.
NUMBERS = {
    "similarity_to_previous": "M to previous block",
    "image_independent_to_previous": "image-independent",
    "centred_to_previous": "centred",
    "cross_head_similarity": "head similarity",
    "normalized_entropy": "entropy / log K",
    "token_similarity": "token similarity",
    "feature_similarity_to_last": "features to last",
}


def numbers(analyses: Mapping[str, Analysis]) -> list[tuple[str, list[str]]]:
    """The rows of the table: what it is, and a cell for each analysis; rows that no analysis has are left out."""
    rows = [(words, [_range(item, name) for item in analyses.values()]) for name, words in NUMBERS.items()]
    found = [row for row in rows if any(cell != content.decimal(np.nan) for cell in row[1])]
    alike = [item.main_group.derived.get("similar_blocks", {}).get("value") for item in analyses.values()]
    if any(value is not None for value in alike):
        found.insert(1, ("similar blocks", ["–" if value is None else f"{value:g}" for value in alike]))
    return found


def _range(analysis: Analysis, name: str) -> str:
    values = _of_blocks(analysis, name)
    if not len(values):
        return content.decimal(np.nan)
    mean, low, high = (content.decimal(float(value), 2) for value in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low}..{high})"


def _of_blocks(analysis: Analysis, name: str) -> NDArray[np.float64]:
    values = column(analysis.layers.loc[analysis.main_group.layers], name)
    return values[np.isfinite(values)]


def in_short(analysis: Analysis) -> str:
    """What stands out by depth, for those who do not see the pictures."""
    similarity, entropy = (_of_blocks(analysis, name) for name in ("similarity_to_previous", "normalized_entropy"))
    parts = []
    if len(similarity):
        parts.append(f"M to the previous block from {similarity.min():.2f} to {similarity.max():.2f}")
    if len(entropy):
        parts.append(f"entropy over log K from {entropy.min():.2f} to {entropy.max():.2f}")
    return ", ".join(parts) or "no readings"
