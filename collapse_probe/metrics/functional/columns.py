"""The columns of an attention map as level and deviation: the one decomposition behind every column cosine.

A column is one key token's attention over all queries, "how much token t contributes to each output token" (DeepViT,
arXiv 2103.11886, section 3). With `a` the column over Q queries, `m` its mean and `|a|` its norm,

    level      c = m sqrt(Q) / |a|
    deviation  w = (a - m) / |a|
    variation  r = |a - m| / |a| = |w|

so that for two columns the cosine is `c c' + <w, w'>` and the cosine of the centred columns is `<w, w'> / (r r')`. The
mean is subtracted before any product: subtracting it from products afterwards loses all digits where r is small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Below this relative variation a centred column is rounding noise, in every dtype.
MIN_VARIATION = 1e-4

# Columns below this are scaled before they are squared.
_SMALL = 1e-6


class Columns(NamedTuple):
    """Decomposed columns; axes before the last are those of the input.

    Attributes:
        deviation: `[..., K, Q]`, zero for absent columns.
        level: `[..., K]`, zero for absent columns.
        variation: `[..., K]`, in 0..1.
        exists: `[..., K]`, False where the column is zero (a token nobody attends to) or not finite.
        finite: `[..., K]`, False where an entry is NaN or infinite.
    """

    deviation: Tensor
    level: Tensor
    variation: Tensor
    exists: Tensor
    finite: Tensor

    def centred_exists(self, min_variation: float = MIN_VARIATION) -> Tensor:
        """Where the centred column is more than rounding noise: `[..., K]`."""
        return self.exists & (self.variation >= min_variation)


def decompose_columns(columns: Tensor) -> Columns:
    """Split columns `[..., K, Q]` (queries last) into level and deviation.

    The input is overwritten where it is already float32 or wider; pass a copy to keep it. Small columns are divided by
    their largest entry first, so that columns of 1e-30 keep all their digits.
    """
    columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
    if columns.device.type == "cpu" and (found := _decompose_plain(columns)) is not None:
        return found
    queries = columns.shape[-1]
    peak = torch.maximum(columns.amax(-1), -columns.amin(-1))
    finite = peak.isfinite()
    exists = finite & (peak >= torch.finfo(columns.dtype).tiny)
    # Asking whether any column is odd would make a GPU wait, so both corrections are unconditional.
    columns.masked_fill_(~finite[..., None], 0.0)
    small = exists & (peak < _SMALL)  # whose squares would lose digits or vanish
    columns /= torch.where(small, peak, 1.0)[..., None]
    mean = columns.mean(-1)
    columns -= mean[..., None]
    spread = torch.linalg.vector_norm(columns, dim=-1)
    norm = torch.hypot(spread, mean * queries**0.5).masked_fill_(~exists, torch.inf)
    columns /= norm[..., None]
    return Columns(columns, mean * queries**0.5 / norm, spread / norm, exists, finite)


def _decompose_plain(columns: Tensor) -> Columns | None:
    """The same in fewer steps where no column is odd; None, and nothing changed, where one is."""
    mean = columns.mean(-1)
    # A mean that is not small is that of a column that is not, either; infinities and NaN show in it.
    doubtful = ~(mean.abs() >= _SMALL)
    if not mean.isfinite().all() or (doubtful.any() and not (columns[doubtful].abs().amax(-1) >= _SMALL).all()):
        return None
    columns -= mean[..., None]
    spread = torch.linalg.vector_norm(columns, dim=-1)
    level = mean * columns.shape[-1] ** 0.5
    norm = torch.hypot(spread, level)
    columns /= norm[..., None]
    present = torch.ones_like(mean, dtype=torch.bool)
    return Columns(columns, level / norm, spread / norm, present, present)
