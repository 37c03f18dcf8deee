"""Similarity of the heads of one layer (DeepViT, arXiv 2103.11886, figure 3c)."""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.errors import UsageError
from collapse_probe.metrics.functional.columns import decompose_columns


def cross_head_similarity(attention: Tensor) -> Tensor:
    """Cosine similarity of the attention columns of every pair of heads of one layer.

    Args:
        attention: `[B, H, Q, K]`.

    Returns:
        `[B, H, H, K]`, in -1..1 (0..1 for probabilities); NaN where a column is zero or not finite.

    Raises:
        UsageError: the map does not have four axes.
    """
    if attention.ndim != 4:
        raise UsageError(f"attention must have the axes [B, H, Q, K]; got a tensor of shape {list(attention.shape)}.")
    columns = decompose_columns(attention.mT.clone(memory_format=torch.contiguous_format))
    similarity = torch.einsum("bgkq,bhkq->bghk", columns.deviation, columns.deviation)
    similarity += torch.einsum("bgk,bhk->bghk", columns.level, columns.level)
    exists = columns.exists[:, :, None] & columns.exists[:, None, :]
    return similarity.clamp(-1, 1).masked_fill(~exists, torch.nan)


def head_diversity(attention: Tensor) -> Tensor:
    """One minus the mean cross-head similarity off the diagonal: the head-diversity curve's value for a layer.

    Args:
        attention: `[B, H, Q, K]`, H at least 2.

    Returns:
        `[B]`, in 0..1 for probabilities; NaN where no pair of columns exists.

    Raises:
        UsageError: the map does not have four axes, or has a single head.
    """
    similarity = cross_head_similarity(attention)
    heads = similarity.shape[1]
    if heads < 2:
        raise UsageError("head_diversity compares heads with each other; this map has a single head.")
    off_diagonal = ~torch.eye(heads, dtype=torch.bool, device=similarity.device)
    return 1 - similarity[:, off_diagonal].nanmean((1, 2))
