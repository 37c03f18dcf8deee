"""Similarity of the heads of each layer, streamed (DeepViT, arXiv 2103.11886, figure 3c)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collapse_probe.metrics.base import TileMetric
from collapse_probe.metrics.moments import mean_and_error, moments
from collapse_probe.metrics.tiles import GroupShape, Tile


class CrossHeadSimilarity(TileMetric):
    """Cosine similarity of attention columns between the heads of a layer, over any number of images.

    `compute()` returns a dictionary of float64 tensors, with L layers and H heads:

    - ``cross_head_similarity`` `[L]`: mean over pairs of different heads, tokens and images, in -1..1 (0..1 for
      probabilities); NaN for a single head; ``cross_head_similarity_se`` its standard error over images;
    - ``head_diversity`` `[L]`: 1 minus that (the head-diversity curve), with the same standard error as
      ``head_diversity_se``;
    - ``cross_head_matrix`` `[L, H, H]`: the mean of every pair of heads.

    Args:
        kwargs: see :class:`TileMetric`.

    Example:
        >>> import torch
        >>> metric = CrossHeadSimilarity()
        >>> metric.update(torch.rand(2, 4, 3, 5, 5).softmax(-1))
        >>> metric.compute()["head_diversity"].shape
        torch.Size([2])
    """

    matrix_sum: Tensor
    matrix_counts: Tensor
    pair_moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("matrix_sum", "matrix_counts", "pair_moments")
        self._values: Tensor | None = None
        self._counts: Tensor | None = None

    def state_shapes(self, group: GroupShape) -> dict[str, tuple[int, ...]]:
        matrix = (group.layers, group.heads, group.heads)
        return {"matrix_sum": matrix, "matrix_counts": matrix, "pair_moments": (5, group.layers)}

    def see(self, tile: Tile) -> None:
        columns = tile.columns
        layers, images, _, heads, _, queries = columns.deviation.shape
        # Heads side by side for one (layer, image, token): a copy, because heads and tokens change places.
        flat = columns.deviation.transpose(3, 4).reshape(-1, heads, queries)
        level = columns.level.transpose(3, 4).reshape(-1, heads)
        similarity = torch.addcmul(torch.bmm(flat, flat.mT), level[:, :, None], level[:, None, :]).clamp_(-1, 1)
        values = similarity.view(layers, images, -1, heads, heads).to(self.images.device).double().sum(2)
        exists = columns.exists.to(self.images.device).double()
        counts = torch.einsum("lbwgk,lbwhk->lbgh", exists, exists)
        self._values = values if self._values is None else self._values + values
        self._counts = counts if self._counts is None else self._counts + counts

    def fold(self, images: int) -> None:  # noqa: ARG002
        values, counts = self._values, self._counts
        assert values is not None
        assert counts is not None
        assert self.group is not None
        self._values = self._counts = None
        self.matrix_sum += values.sum(1)
        self.matrix_counts += counts.sum(1)
        different = ~torch.eye(self.group.heads, dtype=torch.bool, device=values.device)
        columns = max(1, int(different.sum()) * self.group.columns)
        pooled, weights = (item[..., different].sum(-1).T / columns for item in (values, counts))
        self.pair_moments += moments(pooled, weights)

    def results(self) -> dict[str, Tensor]:
        if self.group is None:
            return {}
        mean, error = mean_and_error(self.pair_moments, float(self.images))
        return {
            "cross_head_similarity": mean,
            "cross_head_similarity_se": error,
            "head_diversity": 1 - mean,
            "head_diversity_se": error.clone(),
            "cross_head_matrix": self.matrix_sum / self.matrix_counts,
        }
