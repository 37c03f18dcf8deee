"""Walk over the maps of a layer group tile by tile, so that they are never all in memory at once.

A tile holds a few key columns of every layer for a block of images; every metric that needs it sees the same one. The
columns are produced once per tile, and decomposed once.

Where attention stays within windows, each token of an image is a key in exactly one of its W windows: the windows are
further key columns. Column w * K + k of an image is key k of window w, and its length is the Q queries of that window.
A tile holds the same keys of all windows: together their queries are no more than those of attention without windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

#: Keys that a tile should hold at least, measured: products with fewer are slow. Where those of all heads would not fit
#: and every metric sees heads one by one, tiles hold some of the heads.
WIDE = 64


class MapLike(Protocol):
    """What a metric needs of an attention map: see `collapse_probe.capture.AttentionMap`.

    With W windows per image the first axis of `shape` counts windows, an image's side by side; `select` takes images.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def windows(self) -> int: ...
    @property
    def prefix_tokens(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor: ...
    def admissible_keys(self) -> Tensor | None: ...
    def queries_and_keys(self) -> tuple[Tensor, Tensor, Tensor | None, float] | None: ...
    def select(self, start: int, stop: int) -> MapLike: ...
    def select_heads(self, start: int, stop: int) -> MapLike | None: ...


@dataclass(frozen=True)
class GroupShape:
    """Sizes of a layer group: L layers of H heads, and Q queries and K keys in each of W windows per image.

    The first keys of a window are prefix tokens. Without windows W is 1.
    """

    layers: int
    heads: int
    queries: int
    keys: int
    prefix_tokens: int = 0
    windows: int = 1

    @property
    def columns(self) -> int:
        """Key columns of an image in one layer and head: the keys of all its windows."""
        return self.windows * self.keys

    @property
    def parts(self) -> int:
        """Sets of keys that are reported apart: prefix tokens and patches where both exist."""
        return 2 if 0 < self.prefix_tokens < self.keys else 1


class KeyRange(Protocol):
    """Keys start..stop-1 of each window, which are all of the same part, in some heads."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def part(self) -> int: ...
    @property
    def heads(self) -> slice: ...


@dataclass(frozen=True)
class AllHeads:
    """Such keys in all heads."""

    start: int
    stop: int
    part: int

    @property
    def heads(self) -> slice:
        return slice(None)


@dataclass
class Tile:
    """Keys start..stop-1 of each window in every layer, for one block of images and all heads, or some that follow
    each other.

    Attributes:
        start, stop: range of keys; it never straddles prefix tokens and patches.
        first_head: the first of its heads.
        part: 0 for the first set of keys (prefix tokens where they are reported apart), 1 for the second.
        applied: columns of the maps that multiplied the values, `[L, B, W, H, k, Q]`, overwritten by `columns`.
        softmax: columns of the softmax maps, L tensors `[B, W, H, k, Q]`; parts of `applied` where they are the same.
            They may have other numbers of heads than the applied maps, and than each other.
    """

    start: int
    stop: int
    first_head: int
    part: int
    applied: Tensor
    softmax: list[Tensor] = field(repr=False)

    @property
    def heads(self) -> slice:
        """Which of the applied maps' heads it holds."""
        return slice(self.first_head, self.first_head + self.applied.shape[3])

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
    prefixes, windows = ({item.prefix_tokens for item in maps}, {item.windows for item in maps})
    if len(shapes) != 1 or len(prefixes) != 1 or len(windows) != 1:
        raise UsageError(
            f"layers can be compared only where their maps agree in shape, prefix tokens and windows; got shapes "
            f"{sorted(shapes)}, prefix tokens {sorted(prefixes)} and windows {sorted(windows)}. Update one metric per "
            "layer group."
        )
    batch, heads, queries, keys = maps[0].shape
    if not batch * heads * queries * keys:
        raise UsageError(f"these maps hold nothing: their shape is {sorted(shapes)[0]}.")
    if maps[0].windows < 1 or batch % maps[0].windows:
        raise UsageError(f"{batch} maps cannot be {maps[0].windows} windows of each of several images.")
    return GroupShape(len(maps), heads, queries, keys, maps[0].prefix_tokens, maps[0].windows)


def image_count(item: MapLike) -> int:
    """How many images a batch of maps holds."""
    return item.shape[0] // item.windows


def image_blocks(maps: Sequence[MapLike], index: Tensor) -> Iterator[tuple[list[MapLike], Tensor]]:
    """The same layers for the images of one block after the other, with their places in the order of all images.

    A block is the images with the same ``index // BLOCK``: which images are looked at together does not depend on
    batches, shards, or on neighbours that could not be read.
    """
    for start, stop in runs(index // BLOCK):
        yield [item.select(start, stop) for item in maps], index[start:stop]


def runs(values: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of equal values that follow each other."""
    _, lengths = values.unique_consecutive(return_counts=True)
    stop = 0
    for length in lengths.tolist():
        start, stop = stop, stop + length
        yield start, stop


def tiles(maps: Sequence[MapLike], tile_bytes: int | None = None, heads_apart: bool = False) -> Iterator[Tile]:
    """All tiles of one block of images, in order of their heads, where these are apart, and of their keys.

    Args:
        maps: L maps of the same shape.
        tile_bytes: aimed-at size of a tile's columns; by default what suits the device.
        heads_apart: whether a tile may hold some of the heads only.
    """
    shape, images = group_shape(maps), image_count(maps[0])
    tile_bytes = tile_bytes or TILE_BYTES.get(maps[0].device.type, TILE_BYTES["cpu"])
    width = _tile_width(shape, images, maps[0].dtype.itemsize, tile_bytes)
    together = shape.heads
    if heads_apart and width < min(WIDE, shape.keys) and maps_of_heads(maps, 0, 1) is not None:
        groups = math.ceil(shape.heads / max(1, shape.heads * width // WIDE))
        together = math.ceil(shape.heads / groups)
    for first in range(0, shape.heads, together):
        some = maps if together == shape.heads else maps_of_heads(maps, first, min(first + together, shape.heads))
        assert some is not None
        yield from _tiles_of_heads(some, first, images, tile_bytes)


def maps_of_heads(maps: Sequence[MapLike], start: int, stop: int) -> list[MapLike] | None:
    """The same layers for heads start..stop-1; None where some layer mixes heads."""
    parts = [item.select_heads(start, stop) for item in maps]
    known = [item for item in parts if item is not None]
    return known if len(known) == len(parts) else None


def _tiles_of_heads(maps: Sequence[MapLike], first_head: int, images: int, tile_bytes: int) -> Iterator[Tile]:
    shape, dtype, device = group_shape(maps), maps[0].dtype, maps[0].device
    width = _tile_width(shape, images, dtype.itemsize, tile_bytes)
    before, after = (shape.layers, images, shape.windows, shape.heads), (shape.queries,)
    buffer = torch.empty(math.prod((*before, width, *after)), dtype=dtype, device=device)
    for start, stop, part in _ranges(shape, width):
        sizes = (*before, stop - start, *after)
        applied = buffer[: math.prod(sizes)].view(sizes)
        softmaxes = [_write(item, start, stop, applied[layer]) for layer, item in enumerate(maps)]
        yield Tile(start, stop, first_head, part, applied, softmaxes)


def key_ranges(maps: Sequence[MapLike], tile_bytes: int | None = None) -> Iterator[AllHeads]:
    """The keys of these maps in ranges for which products of all pairs of layers take about as much as a tile would."""
    shape, images = group_shape(maps), image_count(maps[0])
    tile_bytes = tile_bytes or TILE_BYTES.get(maps[0].device.type, TILE_BYTES["cpu"])
    for start, stop, part in _ranges(shape, _tile_width(replace(shape, queries=1), images, 4, tile_bytes)):
        yield AllHeads(start, stop, part)


def _ranges(shape: GroupShape, width: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and part of ranges of keys that do not straddle prefix tokens and patches."""
    start = 0
    while start < shape.keys:
        edge = shape.prefix_tokens if start < shape.prefix_tokens and shape.parts == 2 else shape.keys
        stop = min(start + width, edge)
        yield start, stop, int(shape.parts == 2 and start >= shape.prefix_tokens)
        start = stop


def _tile_width(shape: GroupShape, images: int, element: int, tile_bytes: int) -> int:
    # Products of all pairs of layers, and the bins they fall into, take as much as 4 L queries would.
    length = max(shape.queries, 4 * shape.layers)
    column = shape.layers * images * shape.windows * shape.heads * length * element
    return max(1, min(shape.keys, tile_bytes // max(1, column)))


def _write(item: MapLike, start: int, stop: int, out: Tensor) -> Tensor:
    """Write keys start..stop-1 of each window into `out` `[B, W, H, k, Q]`; returns those of the softmax."""
    return item.write_columns(start, stop, out.flatten(0, 1)).unflatten(0, out.shape[:2])


@dataclass(frozen=True)
class TensorMap:
    """A tensor `[B, H, Q, K]` as a map, for users who bring their own; with windows `[B * W, H, Q, K]`."""

    tensor: Tensor
    prefix_tokens: int = 0
    windows: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, keys = self.tensor.shape
        return batch, heads, queries, keys

    def select(self, start: int, stop: int) -> TensorMap:
        return replace(self, tensor=self.tensor[start * self.windows : stop * self.windows])

    def select_heads(self, start: int, stop: int) -> TensorMap:
        return replace(self, tensor=self.tensor[:, start:stop])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.tensor.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def admissible_keys(self) -> None:
        """Masks of a tensor are not known."""

    def queries_and_keys(self) -> None:
        """Nor is what it came from."""

    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write key columns start..stop-1, key by key, into `out` `[B, H, k, Q]`; returns those of the softmax."""
        return out.copy_(self.tensor[..., start:stop].mT)


def as_maps(
    maps: Tensor | Sequence[Tensor | MapLike] | Mapping[str, MapLike], prefix_tokens: int, windows: int = 1
) -> list[MapLike]:
    """The layers' maps, whatever they came as: `[L, B, H, Q, K]`, a sequence, or a capture's dictionary.

    The number of prefix tokens and of windows per image are those of maps that come as tensors.

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
            item = TensorMap(item, prefix_tokens, windows)
        if not hasattr(item, "write_columns"):
            raise UsageError(f"maps must be tensors or AttentionMaps; got a {type(item).__name__}.")
        layers.append(item)
    return layers
