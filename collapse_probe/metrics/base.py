"""What the metrics on layer groups have in common: states that merge by sum, fed tile by tile."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from collapse_probe.errors import UsageError
from collapse_probe.metrics.tiles import (
    GroupShape,
    MapLike,
    Tile,
    as_maps,
    group_shape,
    image_blocks,
    image_count,
    tiles,
)

Maps = Tensor | Sequence[Tensor | MapLike] | Mapping[str, MapLike]


_SIZES = tuple(field.name for field in fields(GroupShape))


class TileMetric(Metric):
    """A metric over the maps of one layer group.

    States are float64 sums over images: batches, workers and ranks merge to the same answer. They keep float64 through
    `.to(torch.bfloat16)`, `.half()` and `set_dtype`, and lie on the CPU where a device has no float64.

    Args:
        prefix_tokens: leading key tokens that are not patches; only for maps given as tensors, since an
            `AttentionMap` knows its own.
        windows: maps per image, side by side on the batch axis; only for maps given as tensors.
        tile_bytes: aimed-at size of the columns that are in memory at once; results do not depend on it.
        kwargs: passed to `torchmetrics.Metric`.
    """

    images: Tensor
    sizes: Tensor

    is_differentiable = False
    full_state_update = False

    def __init__(
        self, *, prefix_tokens: int = 0, windows: int = 1, tile_bytes: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.prefix_tokens, self.windows, self.tile_bytes = prefix_tokens, windows, tile_bytes
        self._group: GroupShape | None = None
        # A scalar zero is neutral under summation with a state of any shape: ranks without images merge.
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sizes", torch.zeros(len(_SIZES), dtype=torch.int64), dist_reduce_fx="max")

    @property
    def group(self) -> GroupShape | None:
        """Sizes of the layer group; None before the first batch. They travel with the states, so that a merged or
        loaded metric knows them too."""
        if self._group is None and self.sizes.any():
            self._group = GroupShape(**dict(zip(_SIZES, self.sizes.tolist(), strict=True)))
        return self._group

    def update(self, maps: Maps) -> None:
        """Add a batch.

        Args:
            maps: the maps of L comparable layers: `[L, B, H, Q, K]`, a sequence of L tensors or `AttentionMap`s
                `[B, H, Q, K]`, or a capture's `maps`. With W windows per image B counts windows.

        Raises:
            UsageError: the maps differ in shape among each other or from those of earlier batches.
        """
        feed([self], as_maps(maps, self.prefix_tokens, self.windows), self.tile_bytes)

    def compute(self) -> dict[str, Tensor]:
        """The readings: see the class."""
        return self.results()

    def open_group(self, group: GroupShape) -> None:
        """Learn the sizes, or check them against what is known, and make room for the states."""
        if self.group is not None and self.group != group:
            raise UsageError(f"this metric has seen maps of {self.group}; it cannot add {group}.")
        self._group = group
        self.sizes = torch.tensor([getattr(group, name) for name in _SIZES], device=self.sizes.device)
        for name, shape in self.state_shapes(group).items():
            state = getattr(self, name)
            if state.shape != torch.Size(shape):
                setattr(self, name, torch.zeros(shape, dtype=state.dtype, device=state.device))

    def finish_block(self, images: int) -> None:
        """All tiles of a block of images were seen: fold what was gathered into the states."""
        self.images += images
        self.fold(images)

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """The readings from the states as they are; empty before the first image."""

    @abstractmethod
    def state_shapes(self, group: GroupShape) -> dict[str, tuple[int, ...]]:
        """Shapes of the states for a group of these sizes."""

    def begin_block(self, maps: Sequence[MapLike]) -> None:
        """Learn what is needed of a block's maps beside their columns."""

    def see_softmax(self, tile: Tile) -> None:
        """Gather what this metric needs of the softmax columns, before anyone decomposes and so overwrites them."""

    def see(self, tile: Tile) -> None:
        """Gather what this metric needs of the decomposed columns."""

    @abstractmethod
    def fold(self, images: int) -> None:
        """Add what was gathered over a block's tiles to the states."""

    def add_sum(self, *names: str, dtype: torch.dtype = torch.float64) -> None:
        """Declare states that merge by sum."""
        for name in names:
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def state_bytes(self) -> int:
        """Memory that the sums take; it does not grow with the number of images."""
        return sum(getattr(self, name).nbytes for name in self._defaults)

    def set_dtype(self, dst_type: str | torch.dtype) -> TileMetric:  # noqa: ARG002
        """Sums stay in float64: a lower precision would lose what they were kept for."""
        return self

    def reset(self) -> None:
        """Forget everything, the group's sizes too."""
        super().reset()
        self._group = None

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> TileMetric:
        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor if device.type == "mps" else tensor.to(device)

        super()._apply(move, exclude_state)
        return self


def feed(metrics: Sequence[TileMetric], maps: Sequence[MapLike], tile_bytes: int | None = None) -> None:
    """Show every tile of a batch to every metric: columns are produced once for all of them."""
    group = group_shape(maps)
    # States made under inference mode could not be added to outside it, so updates run with it off.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(maps[0].device.type, enabled=False):
        for metric in metrics:
            metric.open_group(group)
        for block in image_blocks(maps):
            for metric in metrics:
                metric.begin_block(block)
            for tile in tiles(block, tile_bytes):
                for metric in metrics:
                    metric.see_softmax(tile)
                for metric in metrics:
                    metric.see(tile)
            for metric in metrics:
                metric.finish_block(image_count(block[0]))
