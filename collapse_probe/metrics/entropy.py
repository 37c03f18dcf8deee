"""Entropy of attention, streamed (Zhai et al., ICML 2023, arXiv 2303.06296)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from collapse_probe.metrics.base import TileMetric
from collapse_probe.metrics.moments import mean_and_error, moments
from collapse_probe.metrics.tiles import GroupShape, Tile


class AttentionEntropy(TileMetric):
    """Shannon entropy of attention rows, `-sum_j A log A`, over any number of images.

    Taken on the softmax map, also where the model mixes heads after it. `compute()` returns a dictionary of float64
    tensors, with L layers and H heads:

    - ``entropy`` `[L]`: mean over heads, queries and images, in nats, 0..log K; ``entropy_se`` its standard error;
    - ``normalized_entropy`` `[L]`: divided by log K, 0..1 (NaN for a single key), and ``normalized_entropy_se``;
    - ``entropy_by_head`` `[L, H]` in nats.

    A row with an entry that is not finite is left out; the share of such rows is ``entropy_absent`` `[L]`.

    Args:
        kwargs: see :class:`TileMetric`.

    Example:
        >>> import torch
        >>> metric = AttentionEntropy()
        >>> metric.update(torch.full((1, 2, 1, 4, 4), 0.25))
        >>> round(float(metric.compute()["normalized_entropy"]), 6)
        1.0
    """

    row_moments: Tensor
    by_head: Tensor
    by_head_counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("row_moments", "by_head", "by_head_counts")
        self._rows: list[Tensor | None] = []

    def state_shapes(self, group: GroupShape) -> dict[str, tuple[int, ...]]:
        by_head = (group.layers, group.heads)
        return {"row_moments": (5, group.layers), "by_head": by_head, "by_head_counts": by_head}

    def see_softmax(self, tile: Tile) -> None:
        if not self._rows:
            self._rows = [None] * len(tile.softmax)
        for layer, columns in enumerate(tile.softmax):
            rows = torch.special.entr(columns).sum(-2)
            before = self._rows[layer]
            self._rows[layer] = rows if before is None else before + rows

    def fold(self, images: int) -> None:  # noqa: ARG002
        rows = torch.stack([row for row in self._rows if row is not None]).to(self.images.device, torch.float64)
        self._rows = []
        finite = rows.isfinite()
        rows = rows.clamp(min=0).masked_fill(~finite, 0.0)
        values, counts = rows.sum(-1), finite.sum(-1).double()  # [L, B, H]
        self.by_head += values.sum(1)
        self.by_head_counts += counts.sum(1)
        size = rows.shape[2] * rows.shape[3]
        self.row_moments += moments(values.sum(-1).T / size, counts.sum(-1).T / size)

    def results(self) -> dict[str, Tensor]:
        if self.group is None:
            return {}
        mean, error = mean_and_error(self.row_moments, float(self.images))
        largest = math.log(self.group.keys) if self.group.keys > 1 else math.nan
        return {
            "entropy": mean,
            "entropy_se": error,
            "normalized_entropy": mean / largest,
            "normalized_entropy_se": error / largest,
            "entropy_by_head": self.by_head / self.by_head_counts,
            "entropy_absent": 1 - self.row_moments[1] / self.images,
        }
