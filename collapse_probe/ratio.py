"""Readings derived from similarities: the similarity ratio and the number of similar blocks (DeepViT, figures 1 and 3).

The paper states neither cut-off in what could be read, so thresholds are options here and their defaults are ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from collapse_probe.errors import UsageError

#: Default cut-off for calling the maps of two neighbouring blocks similar. Ours, not the paper's.
SIMILAR = 0.9

#: Bins of the histogram of M over -1..1: thresholds are resolved to 0.005.
HISTOGRAM_BINS = 400


def histogram_edge(threshold: float, bins: int = HISTOGRAM_BINS) -> int:
    """The first bin of a histogram over -1..1 that counts as above a threshold.

    Raises:
        UsageError: the threshold is out of range.
    """
    if not -1 <= threshold <= 1:
        raise UsageError(f"threshold must lie within -1..1; got {threshold}.")
    return round((threshold + 1) / 2 * bins)


def similarity_ratio(histogram: npt.NDArray[np.integer], threshold: float = SIMILAR) -> npt.NDArray[np.float64]:
    """Share of (image, head, token) whose similarity M exceeds a threshold, for every pair of layers.

    Args:
        histogram: counts of M, `[..., bins]`, equal bins over -1..1.
        threshold: in -1..1, rounded to the nearest bin edge.

    Returns:
        `[...]`, in 0..1; NaN where nothing was counted.

    Raises:
        UsageError: the threshold is out of range.
    """
    edge = histogram_edge(threshold, histogram.shape[-1])
    total = histogram.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, histogram[..., edge:].sum(-1) / total, np.nan)


def block_similarity_ratio(
    histogram: npt.NDArray[np.integer], nearest: int = 1, threshold: float = SIMILAR
) -> npt.NDArray[np.float64]:
    """The similarity ratio of each block with its nearest `nearest` blocks on either side, pooled.

    Args:
        histogram: counts of M, `[L, L, bins]`.
        nearest: how many blocks before and after each block are compared with it, at least 1.
        threshold: in -1..1.

    Returns:
        `[L]`, in 0..1; NaN for a single block.

    Raises:
        UsageError: `nearest` or the threshold is out of range.
    """
    if nearest < 1:
        raise UsageError(f"nearest must be at least 1; got {nearest}.")
    layers = histogram.shape[0]
    distance = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    near = (distance >= 1) & (distance <= nearest)
    return similarity_ratio((histogram * near[..., None]).sum(1), threshold)


def similar_blocks(similarity: npt.NDArray[np.floating], threshold: float = SIMILAR) -> npt.NDArray[np.bool_]:
    """Which blocks have a map similar to the block before them: mean M above a threshold.

    Args:
        similarity: mean M, `[L, L]`.
        threshold: in -1..1.

    Returns:
        `[L]` booleans; the first block has no block before it and is False.

    Raises:
        UsageError: the threshold is out of range.
    """
    if not -1 <= threshold <= 1:
        raise UsageError(f"threshold must lie within -1..1; got {threshold}.")
    previous = np.diagonal(similarity, offset=1)
    return np.concatenate([[False], np.nan_to_num(previous, nan=-np.inf) > threshold])


def onset(similar: npt.NDArray[np.bool_]) -> int | None:
    """First block of the run of similar blocks that reaches the last block, or None where there is no such run.

    The run begins with the block whose successor is the first similar one: block p and p + 1 being alike concerns both.
    """
    if not similar.any() or not similar[-1]:
        return None
    breaks = np.flatnonzero(~similar)
    return int(breaks[-1])
