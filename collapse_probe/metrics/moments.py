"""Means over images with their standard errors, as sums that merge.

Images are the independent unit; columns, heads and tokens of one image are not. Each image contributes a sum `x` over
its columns and a weight `w` (how many of them exist). The reported mean is `sum x / sum w`; its standard error is that
of a ratio of means (linearised), which is the ordinary one where every image has the same weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Differences of sums below this share of the sums are rounding, not spread.
_ROUNDING = 1e-14


def moments(values: Tensor, weights: Tensor) -> Tensor:
    """Sums over images that :func:`mean_and_error` needs.

    Args:
        values: `[B, ...]`, each image's sum.
        weights: `[B, ...]`, each image's weight.

    Returns:
        `[5, ...]` in float64: sums of x, w, x², xw, w².
    """
    x, w = values.double(), weights.double()
    return torch.stack([x.sum(0), w.sum(0), (x * x).sum(0), (x * w).sum(0), (w * w).sum(0)])


def mean_and_error(sums: Tensor, images: float) -> tuple[Tensor, Tensor]:
    """Mean and standard error over images.

    Args:
        sums: what :func:`moments` gave, summed over all batches.
        images: how many images were summed.

    Returns:
        Two tensors `[...]`; the mean is NaN where nothing was counted, the error also for a single image.
    """
    x, w, xx, xw, ww = sums.unbind(0)
    counted = w > 0
    total = w.masked_fill(~counted, torch.nan)
    mean = x / total
    if images < 2:
        return mean, torch.full_like(mean, torch.nan)
    squares = without_rounding(xx - 2 * mean * xw + mean * mean * ww, xx)
    return mean, (squares * (images / (images - 1))).sqrt() / total


def without_rounding(difference: Tensor, scale: Tensor | float) -> Tensor:
    """A difference of sums that cannot be negative, with what is only rounding set to zero.

    Args:
        difference: the difference.
        scale: size of the sums that were subtracted from each other.
    """
    return torch.where(difference > _ROUNDING * scale, difference, torch.where(difference.isnan(), torch.nan, 0.0))
