"""Walk over the maps of a layer group tile by tile, so that they are never all in memory at once.

A tile holds a few key columns of every layer for a block of images; every metric that needs it sees the same one. The
columns are produced once per tile, and decomposed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from collapse_probe.errors import UsageError
from collapse_probe.metrics.functional.columns import Columns, decompose_columns

#: Images that are looked at together. Pairs within such a block give the standard error of the image-independent part.
BLOCK = 4

#: Default size of a tile's columns in bytes, measured: smaller tiles make small products, larger ones leave the cache.
TILE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


class MapLike(Protocol):
    """What a metric needs of an attention map: see `collapse_probe.capture.AttentionMap`."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def prefix_tokens(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor: ...
    def admissible_keys(self) -> Tensor | None: ...
    def select(self, start: int, stop: int) -> MapLike: ...


@dataclass(frozen=True)
class GroupShape:
    """Sizes of a layer group: L layers of H heads, Q queries, K keys, of which the first are prefix tokens."""

    layers: int
    heads: int
    queries: int
    keys: int
    prefix_tokens: int = 0

    @property
    def parts(self) -> int:
        """Sets of keys that are reported apart: prefix tokens and patches where both exist."""
        return 2 if 0 < self.prefix_tokens < self.keys else 1


@dataclass
class Tile:
    """Key columns start..stop-1 of every layer, for one block of images.

    Attributes:
        start, stop: range of keys; it never straddles prefix tokens and patches.
        part: 0 for the first set of keys (prefix tokens where they are reported apart), 1 for the second.
        applied: columns of the maps that multiplied the values, `[L, B, H, k, Q]`, overwritten by `columns`.
        softmax: columns of the softmax maps, L tensors `[B, H, k, Q]`; parts of `applied` where they are the same.
    """

    start: int
    stop: int
    part: int
    applied: Tensor
    softmax: list[Tensor] = field(repr=False)

    @cached_property
    def columns(self) -> Columns:
        """The applied columns, decomposed."""
        return decompose_columns(self.applied)


def group_shape(maps: Sequence[MapLike]) -> GroupShape:
    """Sizes that all layers share.

    Raises:
        UsageError: there is no layer, or they differ.
    """
    if not maps:
        raise UsageError("a metric needs the maps of at least one layer; got none.")
    shapes = {tuple(item.shape) for item in maps}
    prefixes = {item.prefix_tokens for item in maps}
    if len(shapes) != 1 or len(prefixes) != 1:
        raise UsageError(
            f"layers can be compared only where their maps agree in shape and prefix tokens; got shapes "
            f"{sorted(shapes)} and prefix tokens {sorted(prefixes)}. Update one metric per layer group."
        )
    images, heads, queries, keys = maps[0].shape
    if not images * heads * queries * keys:
        raise UsageError(f"these maps hold nothing: their shape is {sorted(shapes)[0]}.")
    return GroupShape(len(maps), heads, queries, keys, maps[0].prefix_tokens)


def image_blocks(maps: Sequence[MapLike], size: int = BLOCK) -> Iterator[list[MapLike]]:
    """The same layers for `size` images after the other; the last block may hold fewer."""
    images = maps[0].shape[0]
    for start in range(0, images, size):
        stop = min(start + size, images)
        yield [item.select(start, stop) for item in maps]


def tiles(maps: Sequence[MapLike], tile_bytes: int | None = None) -> Iterator[Tile]:
    """All tiles of one block of images, in order of their keys.

    Args:
        maps: L maps of the same shape.
        tile_bytes: aimed-at size of a tile's columns; by default what suits the device.
    """
    shape = group_shape(maps)
    images = maps[0].shape[0]
    dtype, device = maps[0].dtype, maps[0].device
    width = _tile_width(shape, images, dtype.itemsize, tile_bytes or TILE_BYTES.get(device.type, TILE_BYTES["cpu"]))
    buffer = torch.empty(shape.layers * images * shape.heads * width * shape.queries, dtype=dtype, device=device)
    start = 0
    while start < shape.keys:
        edge = shape.prefix_tokens if start < shape.prefix_tokens and shape.parts == 2 else shape.keys
        stop = min(start + width, edge)
        sizes = (shape.layers, images, shape.heads, stop - start, shape.queries)
        applied = buffer[: math.prod(sizes)].view(sizes)
        softmaxes = [item.write_columns(start, stop, applied[layer]) for layer, item in enumerate(maps)]
        part = int(shape.parts == 2 and start >= shape.prefix_tokens)
        yield Tile(start, stop, part, applied, softmaxes)
        start = stop


def _tile_width(shape: GroupShape, images: int, element: int, tile_bytes: int) -> int:
    column = shape.layers * images * shape.heads * shape.queries * element
    return max(1, min(shape.keys, tile_bytes // max(1, column)))


@dataclass(frozen=True)
class TensorMap:
    """A tensor `[B, H, Q, K]` as a map, for users who bring their own."""

    tensor: Tensor
    prefix_tokens: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, keys = self.tensor.shape
        return batch, heads, queries, keys

    def select(self, start: int, stop: int) -> TensorMap:
        return TensorMap(self.tensor[start:stop], self.prefix_tokens)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.tensor.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def admissible_keys(self) -> None:
        """Masks of a tensor are not known."""

    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write key columns start..stop-1, key by key, into `out` `[B, H, k, Q]`; returns those of the softmax."""
        return out.copy_(self.tensor[..., start:stop].mT)


def as_maps(maps: Tensor | Sequence[Tensor | MapLike] | Mapping[str, MapLike], prefix_tokens: int) -> list[MapLike]:
    """The layers' maps, whatever they came as: `[L, B, H, Q, K]`, a sequence, or a capture's dictionary.

    Raises:
        UsageError: a tensor does not have the axes that it should.
    """
    items = list(maps.values()) if isinstance(maps, Mapping) else list(maps)
    layers: list[MapLike] = []
    for item in items:
        if isinstance(item, Tensor):
            if item.ndim != 4:
                raise UsageError(
                    f"maps must be [L, B, H, Q, K], or L tensors [B, H, Q, K]; got one of shape {list(item.shape)}."
                )
            item = TensorMap(item, prefix_tokens)
        if not hasattr(item, "write_columns"):
            raise UsageError(f"maps must be tensors or AttentionMaps; got a {type(item).__name__}.")
        layers.append(item)
    return layers
