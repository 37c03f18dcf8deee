"""Metrics on the maps of a layer group, fed tile by tile."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from collapse_probe.errors import UsageError
from collapse_probe.metrics.base import StreamingMetric
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


@dataclass(frozen=True)
class MapScope:
    """What is known of the maps of a layer group before they are measured.

    Attributes:
        kind: what asks what: ``"token"``, ``"window"``, ``"class"``…
        shape: their sizes.
        grid: height and width of the patch grid, or None where it is not known.
        patch_size: height and width of a patch in pixels of the model's input, or None where it is not known.
        is_probability: of each layer, whether the map that multiplied the values has probabilities for rows.
    """

    kind: str
    shape: GroupShape
    grid: tuple[int, int] | None = None
    patch_size: tuple[float, float] | None = None
    is_probability: tuple[bool, ...] = ()


class TileMetric(StreamingMetric):
    """A metric over the maps of one layer group.

    Attributes:
        map: ``"applied"`` for metrics on what multiplied the values, ``"softmax"`` for those that need probabilities:
            where a model mixes heads after its softmax these are taken underneath.
        heads_apart: whether it sees each head without the others, so that a tile may hold some of them only.

    Args:
        prefix_tokens: leading key tokens that are not patches; only for maps given as tensors, since an
            `AttentionMap` knows its own.
        windows: maps per image, side by side on the batch axis; only for maps given as tensors.
        tile_bytes: aimed-at size of the columns that are in memory at once; results do not depend on it.
        kwargs: passed to `torchmetrics.Metric`.
    """

    map: ClassVar[str] = "applied"
    heads_apart: ClassVar[bool] = False

    sizes: Tensor

    def __init__(
        self, *, prefix_tokens: int = 0, windows: int = 1, tile_bytes: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.prefix_tokens, self.windows, self.tile_bytes = prefix_tokens, windows, tile_bytes
        self._group: GroupShape | None = None
        self._read: Tensor | None = None
        self.add_state("sizes", torch.zeros(len(_SIZES), dtype=torch.int64), dist_reduce_fx="max")

    @property
    def group(self) -> GroupShape | None:
        """Sizes of the layer group; None before the first batch. They travel with the states, so that a merged or
        loaded metric knows them too."""
        if self._read is not self.sizes:  # whatever replaces the states replaces the tensor
            self._read = self.sizes
            self._group = (
                GroupShape(**dict(zip(_SIZES, self.sizes.tolist(), strict=True))) if self.sizes.any() else None
            )
        return self._group

    def undefined(self, scope: MapScope) -> str:  # noqa: ARG002
        """Why this reading is not defined on maps of this kind; empty where it is."""
        return ""

    def update(self, maps: Maps, index: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            maps: the maps of L comparable layers: `[L, B, H, Q, K]`, a sequence of L tensors or `AttentionMap`s
                `[B, H, Q, K]`, or a capture's `maps`. With W windows per image B counts windows.
            index: the images' places in the order of all images, ascending, `[images]`; by default they follow those
                seen before. What is drawn at random, and which images are paired, hangs on it.

        Raises:
            UsageError: the maps differ in shape among each other or from those of earlier batches.
        """
        feed([self], as_maps(maps, self.prefix_tokens, self.windows), self.tile_bytes, index)

    def open_group(self, group: GroupShape) -> None:
        """Learn the sizes, or check them against what is known, and make room for the states."""
        if self.group is not None and self.group != group:
            raise UsageError(f"this metric has seen maps of {self.group}; it cannot add {group}.")
        self._group = group
        self._read = self.sizes = torch.tensor([getattr(group, name) for name in _SIZES], device=self.sizes.device)
        self.make_room(self.state_shapes(group))

    def finish_block(self, images: int) -> None:
        """All tiles of a block of images were seen: fold what was gathered into the states."""
        self.images += images
        self.fold(images)

    @abstractmethod
    def state_shapes(self, group: GroupShape) -> dict[str, tuple[int, ...]]:
        """Shapes of the states for a group of these sizes."""

    def begin_block(self, maps: Sequence[MapLike], index: Tensor) -> None:
        """Learn what is needed of a block's maps beside their columns, and which images they are of."""

    def reads_maps(self, maps: Sequence[MapLike]) -> bool:  # noqa: ARG002
        """Whether these maps are measured without their columns, all images of a batch at once."""
        return False

    def see_maps(self, maps: Sequence[MapLike], tile_bytes: int | None) -> None:
        """Gather what this metric needs of maps that it reads itself."""
        raise NotImplementedError

    def see_softmax(self, tile: Tile) -> None:
        """Gather what this metric needs of the softmax columns, before anyone decomposes and so overwrites them."""

    def see(self, tile: Tile) -> None:
        """Gather what this metric needs of the decomposed columns."""

    @abstractmethod
    def fold(self, images: int) -> None:
        """Add what was gathered over a block's tiles to the states."""


def feed(
    metrics: Sequence[TileMetric],
    maps: Sequence[MapLike],
    tile_bytes: int | None = None,
    index: Tensor | None = None,
) -> None:
    """Show every tile of a batch to every metric: columns are produced once for all of them."""
    group = group_shape(maps)
    index = metrics[0].numbered(image_count(maps[0]), index)
    # States made under inference mode could not be added to outside it, so updates run with it off.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(maps[0].device.type, enabled=False):
        for metric in metrics:
            metric.open_group(group)
        if all(metric.reads_maps(maps) for metric in metrics):
            for metric in metrics:
                metric.begin_block(maps, index)
                metric.see_maps(maps, tile_bytes)
                metric.finish_block(len(index))
            return
        heads_apart = all(metric.heads_apart for metric in metrics)
        for block, numbers in image_blocks(maps, index):
            for metric in metrics:
                metric.begin_block(block, numbers)
            for tile in tiles(block, tile_bytes, heads_apart):
                for metric in metrics:
                    metric.see_softmax(tile)
                for metric in metrics:
                    metric.see(tile)
            for metric in metrics:
                metric.finish_block(image_count(block[0]))
