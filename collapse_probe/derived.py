"""Readings derived from similarities, with intervals from bootstrap replicates: ratio, similar blocks, onset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from collapse_probe.metrics.replicates import percentile_interval
from collapse_probe.ratio import block_similarity_ratio, onset, similar_blocks


def block_readings(
    readings: Mapping[str, NDArray[Any]],
    replicates: Mapping[str, NDArray[np.float64]],
    images: float,
    threshold: float,
    nearest: int,
) -> dict[str, Any]:
    """Columns of the layers table that follow from the similarities of a group's layers."""
    columns: dict[str, Any] = {
        "similarity_ratio": block_similarity_ratio(readings["histogram"], nearest, threshold),
    }
    if "ratio" in replicates:
        low, high = percentile_interval(replicates["ratio"], images)
        columns["similarity_ratio_low"], columns["similarity_ratio_high"] = low, high
    similar = similar_blocks(readings["similarity"], threshold)
    columns["similar_to_previous"] = pd.array([pd.NA, *similar[1:]], dtype="boolean")
    return columns


def derived_readings(
    similarity: NDArray[np.float64],
    replicates: Mapping[str, NDArray[np.float64]],
    images: float,
    threshold: float,
) -> dict[str, dict[str, float | None]]:
    """Number of similar blocks and where the run of them that reaches the last block begins, each with 95 % intervals.

    Args:
        similarity: mean M, `[L, L]`.
        replicates: of :meth:`CrossLayerSimilarity.replicates`.
        images: how many images were measured.
        threshold: mean M above which neighbouring blocks are called similar.

    Returns:
        ``similar_blocks`` and ``onset``, each with ``value``, ``low`` and ``high`` (None where absent); ``onset`` also
        with ``share``, the share of replicates in which there is such a run. Nothing for a single layer.
    """
    if len(similarity) < 2 or not np.isfinite(np.diagonal(similarity, 1)).any():
        return {}
    similar = similar_blocks(similarity, threshold)
    out: dict[str, dict[str, float | None]] = {
        "similar_blocks": {"value": int(similar.sum()), "low": None, "high": None},
        "onset": {"value": onset(similar), "low": None, "high": None, "share": None},
    }
    if "similarity" in replicates:
        drawn = np.nan_to_num(replicates["similarity"], nan=-np.inf) > threshold
        onsets = np.array([np.nan if first is None else first for first in map(onset, drawn)])
        for name, values in (("similar_blocks", drawn.sum(1).astype(np.float64)), ("onset", onsets)):
            low, high = percentile_interval(values, images)
            out[name] |= {"low": _number(low), "high": _number(high)}
        out["onset"]["share"] = float(np.isfinite(onsets).mean())
    return out


def _number(value: NDArray[np.float64]) -> float | None:
    return float(value) if np.isfinite(value) else None
