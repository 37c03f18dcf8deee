"""Entropy of attention, streamed (Zhai et al., ICML 2023, arXiv 2303.06296)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collapse_probe.metrics.base import TileMetric
from collapse_probe.metrics.moments import mean_and_error, moments
from collapse_probe.metrics.tiles import GroupShape, MapLike, Tile


class AttentionEntropy(TileMetric):
    """Shannon entropy of attention rows, `-sum_j A log A`, over any number of images.

    Taken on the softmax map, also where the model mixes heads after it. `compute()` returns a dictionary of float64
    tensors, with L layers and H heads:

    - ``entropy`` `[L]`: mean over heads, queries and images, in nats, 0..log K; ``entropy_se`` its standard error.
      A query belongs to one window, and K counts the keys of that window;
    - ``normalized_entropy`` `[L]`: each row divided by the log of the number of keys that its mask admits, 0..1, and
      ``normalized_entropy_se``; rows that admit a single key have none;
    - ``entropy_by_head`` `[L, H]` in nats, over the heads of the softmax, which may be others than those of the applied
      map; absent where the layers' softmax maps differ in their number.

    A row with an entry that is not finite, or that is masked as a whole, is left out; the share of such rows is
    ``entropy_absent`` `[L]`.

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
    normalized_moments: Tensor
    by_head: Tensor
    by_head_counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("row_moments", "normalized_moments", "by_head", "by_head_counts")
        self._rows: list[Tensor | None] = []
        self._admissible: list[Tensor | None] = []

    def state_shapes(self, group: GroupShape) -> dict[str, tuple[int, ...]]:
        return {"row_moments": (5, group.layers), "normalized_moments": (5, group.layers)}

    def begin_block(self, maps: Sequence[MapLike]) -> None:
        self._rows = [None] * len(maps)
        self._admissible = [item.admissible_keys() for item in maps]

    def see_softmax(self, tile: Tile) -> None:
        for layer, columns in enumerate(tile.softmax):
            rows = torch.special.entr(columns).sum(-2)  # [B, W, H, Q]
            before = self._rows[layer]
            self._rows[layer] = rows if before is None else before + rows

    def fold(self, images: int) -> None:  # noqa: ARG002
        rows = [self._here(row) for row in self._rows if row is not None]
        keys = [self._keys(row, counts) for row, counts in zip(rows, self._admissible, strict=True)]
        self._rows, self._admissible = [], []
        if len({row.shape for row in rows}) == 1:
            by_head, by_head_counts = self._add(slice(None), torch.stack(rows), torch.stack(keys))
            self.by_head, self.by_head_counts = self.by_head + by_head, self.by_head_counts + by_head_counts
            return
        for layer, (row, count) in enumerate(zip(rows, keys, strict=True)):
            self._add(slice(layer, layer + 1), row[None], count[None])

    def _keys(self, rows: Tensor, counts: Tensor | None) -> Tensor:
        """How many keys each row may attend to: `[B, W, H, Q]`, or sizes that broadcast to it."""
        assert self.group is not None
        if counts is None:
            return torch.full_like(rows, float(self.group.keys))
        images, windows, heads, queries = rows.shape
        return self._here(counts.expand(images * windows, heads, queries)).unflatten(0, (images, windows))

    def _add(self, layers: slice, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows `[L, B, W, H, Q]` of some layers to the moments; returns their sums and counts by head, `[L, H]`."""
        rows = rows.clamp(min=0)
        present = rows.isfinite() & (keys > 0)
        values, counts = _over_rows(rows.masked_fill(~present, 0.0)), _over_rows(present)
        self.row_moments[:, layers] += self._moments(values, counts, rows)
        choice = present & (keys > 1)
        shares = (rows / keys.log()).masked_fill(~choice, 0.0)
        self.normalized_moments[:, layers] += self._moments(_over_rows(shares), _over_rows(choice), rows)
        return values.sum(1), counts.sum(1)

    @staticmethod
    def _moments(values: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
        size = rows.shape[2:].numel()  # divides sums, so that moments stay of the order of 1
        return moments(values.sum(-1).T / size, counts.sum(-1).T / size)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.images.device).double()  # in this order: MPS has no float64

    def results(self) -> dict[str, Tensor]:
        if self.group is None:
            return {}
        images = float(self.images)
        mean, error = mean_and_error(self.row_moments, images)
        normalized, normalized_error = mean_and_error(self.normalized_moments, images)
        out = {
            "entropy": mean,
            "entropy_se": error,
            "normalized_entropy": normalized,
            "normalized_entropy_se": normalized_error,
            "entropy_absent": 1 - self.row_moments[1] / images,
        }
        if self.by_head.ndim:
            out["entropy_by_head"] = self.by_head / self.by_head_counts
        return out


def _over_rows(values: Tensor) -> Tensor:
    """Sums over the queries of all windows: `[L, B, W, H, Q]` -> `[L, B, H]`."""
    return values.sum(-1, dtype=torch.float64).sum(2)
