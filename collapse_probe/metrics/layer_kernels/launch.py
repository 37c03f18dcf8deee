"""Start the programs: sizes of tiles, room for results, and what is left to sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from collapse_probe.errors import UsageError
from collapse_probe.metrics.layer_kernels.layers import Layer, Layers, interpreted
from collapse_probe.metrics.tiles import MapLike

if TYPE_CHECKING:
    from types import ModuleType

#: Products of float32 columns as three products of their TensorFloat-32 halves: about 1e-6 of the largest, where plain
#: TensorFloat-32 would be off by 1e-3.
_PRECISION = "tf32x3"

#: Keys over which one program sums products between images, and images summed in float32 before float64.
_KEYS_SUMMED, _IMAGES_SUMMED = 64, 8

#: Largest entry, times :func:`_magnifier`, below which a column counts as zero: its squares would lose digits.
_SMALLEST = 2.0**-51


class Tile(NamedTuple):
    """What one program holds at once: powers of two.

    Attributes:
        queries, keys: entries of the map, at all layers.
        depth: channels of queries and keys.
        warps: of 32 threads each.
    """

    queries: int
    keys: int
    depth: int
    warps: int = 8


class LayerProducts(NamedTuple):
    """Decomposed columns of L layers, and the products of their deviations: see
    :mod:`collapse_probe.metrics.functional.columns`.

    Attributes:
        products: `[B, H, k, L, L]`, `<w_p, w_r>` of the deviations `w = (a - mean) / |a|`, zero for absent columns.
        level: `[B, H, k, L]`, `mean sqrt(Q) / |a|`, zero for absent columns.
        variation: `[B, H, k, L]`, `|w|` in 0..1, zero for absent columns.
        mean: `[B, H, k, L]`, zero for absent columns.
        inverse: `[B, H, k, L]`, `1 / |a|`, zero for absent columns.
        exists: `[B, H, k, L]` bool, False where the column is zero or not finite.
        finite: `[B, H, k, L]` bool, False where an entry is NaN or infinite.
    """

    products: Tensor
    level: Tensor
    variation: Tensor
    mean: Tensor
    inverse: Tensor
    exists: Tensor
    finite: Tensor


def layers_of(maps: Sequence[MapLike]) -> Layers:
    """The layers of maps for which :func:`available` says yes. Row normalisers that no kernel of the model returned are
    computed.

    Raises:
        UsageError: kernels cannot produce one of the maps.
    """
    parts = [item.queries_and_keys() for item in maps]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        raise UsageError(
            f"kernels take maps that are a softmax over queries and keys alone, without windows; layer "
            f"{parts.index(None)} is not. Use its columns."
        )
    if all(normalizer is not None for _, _, normalizer, _ in known):
        return Layers.of(
            [Layer(q, k, normalizer, scale) for q, k, normalizer, scale in known if normalizer is not None]
        )
    layers = Layers.of([Layer(q, k, q.new_empty(q.shape[:3], dtype=torch.float32), scale) for q, k, _, scale in known])
    normalise(layers)
    return layers


def normalise(layers: Layers) -> None:
    """Write the log of each row's sum of exponentials over all keys."""
    batch, heads, queries, keys = layers.shape
    tile = normalizers_tile(layers)
    with torch.cuda.device_of(layers.table):
        _programs().normalizers_program[(math.ceil(queries / tile.queries), batch * heads, len(layers))](
            *_addresses(layers), heads, len(layers), queries, keys, **_constants(layers, tile)
        )


def layer_products(layers: Layers, start: int, stop: int, tile: Tile | None = None) -> LayerProducts:
    """Decompose the columns of keys start..stop-1 and multiply their deviations between all layers, in one pass.

    Sums are in float32. Columns are shifted by their mean over the first chunk of queries before they are multiplied,
    and the products are corrected for what the true mean differs from it: at worst, where those queries alone differ
    from all others, products lose as many digits as there are chunks (5e-6 of them for 1374 queries).

    A column whose largest entry is below 1e-31 (exactly: 2^-51 over :func:`_magnifier`) counts as zero, since its
    squares cannot be told apart in float32; `decompose_columns` draws that line at 1e-38.

    Args:
        layers: L layers.
        start: first key.
        stop: the key after the last.
        tile: what a program holds at once; results depend on it by rounding alone.

    Raises:
        IndexError: the range holds no key, or others than the layers'.
    """
    _check_keys(layers, start, stop)
    batch, heads, queries, _ = layers.shape
    tile = tile or products_tile(layers)
    count = len(layers)
    small = (batch, heads, stop - start, count)
    products = torch.empty(*small, count, device=layers.device)
    level, variation, mean, inverse = (torch.empty(small, device=layers.device) for _ in range(4))
    exists, finite = (torch.empty(small, dtype=torch.bool, device=layers.device) for _ in range(2))
    out = LayerProducts(products, level, variation, mean, inverse, exists, finite)
    magnify = _magnifier(queries)
    with torch.cuda.device_of(layers.table):
        _programs().products_program[(batch * heads * math.ceil((stop - start) / tile.keys),)](
            *_addresses(layers), *out[:5], exists.view(torch.uint8), finite.view(torch.uint8),
            heads, count, queries, start, stop, magnify, _SMALLEST,
            LAYERS=_padded(layers), GRAM=_PRECISION, **_constants(layers, tile),
        )  # fmt: skip
    return out


def image_products(layers: Layers, products: LayerProducts, start: int, stop: int, tile: Tile | None = None) -> Tensor:
    """Products of unit columns `(w, level)` between images, `[B, B, L, L]` float64, summed over heads and keys.

    Entry `[b, c, p, r]` is the sum over keys start..stop-1 of `<u_p, u_r>` with layer p on image b and layer r on
    image c. Every pair of images is computed anew from queries and keys, so the batch should be small: a block of four.
    Programs sum in float32 over 64 keys of one head, everything else is in float64; the order is always the same.

    Args:
        layers: L layers.
        products: what :func:`layer_products` gave for the same keys.
        start: first key.
        stop: the key after the last.
        tile: what a program holds at once; results depend on it by rounding alone.

    Raises:
        IndexError: the range holds no key, or others than the layers'.
        UsageError: the products are those of other layers or keys.
    """
    _check_products(layers, products, start, stop)
    batch, heads, queries, _ = layers.shape
    count = len(layers)
    level = products.level.double().permute(0, 3, 1, 2).reshape(batch * count, -1)
    out = (level @ level.T).view(batch, count, batch, count).transpose(1, 2).contiguous()
    out.diagonal(dim1=0, dim2=1).add_(products.products.sum((1, 2), dtype=torch.float64).permute(1, 2, 0))
    if batch == 1:
        return out
    tile = tile or images_tile(layers)
    steps = max(1, _KEYS_SUMMED // tile.keys)
    blocks = math.ceil((stop - start) / (steps * tile.keys))
    ones, others = torch.triu_indices(batch, batch, 1)
    partial = torch.empty(len(ones), heads * blocks, count, count, device=layers.device)
    with torch.cuda.device_of(layers.table):
        _programs().images_program[(blocks, heads, len(ones))](
            *_addresses(layers), products.mean, products.inverse, partial,
            batch, heads, count, queries, start, stop,
            LAYERS=_padded(layers), STEPS=steps, GRAM=_PRECISION, **_constants(layers, tile),
        )  # fmt: skip
    for pair, (one, other) in enumerate(zip(ones.tolist(), others.tolist(), strict=True)):
        between = partial[pair].sum(0, dtype=torch.float64)
        out[one, other] += between
        out[other, one] += between.T
    return out


def add_unit_columns(
    layers: Layers, products: LayerProducts, start: int, stop: int, unit_sum: Tensor, tile: Tile | None = None
) -> None:
    """Add the deviations w of all images to their sums, which are read and written once.

    Eight images at a time are summed in float32, these in float64; the order is always the same.

    Args:
        layers: L layers of any number of images.
        products: what :func:`layer_products` gave for the same keys.
        start: first key.
        stop: the key after the last.
        unit_sum: `[L, H, stop - start, Q]` float64, changed in place; queries must lie side by side.
        tile: what a program holds at once; results do not depend on it.

    Raises:
        IndexError: the range holds no key, or others than the layers'.
        UsageError: the products are those of other layers or keys, or the sums have another shape, dtype or device.
    """
    _check_products(layers, products, start, stop)
    batch, heads, queries, _ = layers.shape
    expected = (len(layers), heads, stop - start, queries)
    if unit_sum.shape != expected or unit_sum.dtype != torch.float64 or unit_sum.device != layers.device:
        raise UsageError(
            f"unit_sum must be {list(expected)} in float64 on {layers.device}; got {list(unit_sum.shape)} in "
            f"{unit_sum.dtype} on {unit_sum.device}."
        )
    if unit_sum.stride(-1) != 1:
        raise UsageError(f"queries of unit_sum must lie side by side; its strides are {unit_sum.stride()}.")
    tile = tile or sums_tile(layers)
    blocks = math.ceil((stop - start) / tile.keys) * math.ceil(queries / tile.queries)
    with torch.cuda.device_of(layers.table):
        _programs().sums_program[(blocks, heads, len(layers))](
            *_addresses(layers), products.mean, products.inverse, unit_sum, *unit_sum.stride()[:3],
            batch, heads, len(layers), queries, start, stop,
            GROUP=_IMAGES_SUMMED, **_constants(layers, tile),
        )  # fmt: skip


def _programs() -> ModuleType:
    from collapse_probe.metrics.layer_kernels import programs  # needs triton, which is optional

    return programs


def _addresses(layers: Layers) -> tuple[Tensor, Tensor, Tensor]:
    return layers.table, layers.items[0].q, layers.items[0].log_normalizer


def _constants(layers: Layers, tile: Tile) -> dict[str, int | str | bool]:
    return {
        "ALIGN": layers.align,
        "DIM": layers.dim,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "DEPTH": tile.depth,
        "PRECISION": _PRECISION,
        "WIDEN": interpreted(),  # the interpreter multiplies the bits of bfloat16 as if they were integers
        "num_warps": tile.warps,
        "num_stages": 1,  # layers are many: a second stage would not fit
        "enable_fp_fusion": True,  # its default differs between versions of triton
    }


def _padded(layers: Layers) -> int:
    """The layers of a tile: a power of two, and no fewer than tensor cores multiply."""
    return max(16, 1 << (len(layers) - 1).bit_length())


def products_tile(layers: Layers) -> Tile:
    """Sizes with which that program keeps to its registers, and to 64 KB of shared memory."""
    padded = _padded(layers)
    return Tile(16, 256 // padded, _depth(layers, 64 if padded < 64 else 32))


def normalizers_tile(layers: Layers) -> Tile:
    """The same of the program that goes over all keys of one layer's rows."""
    return Tile(64, 64, _depth(layers, 64), 4)


def images_tile(layers: Layers) -> Tile:
    """The same of the program that holds the columns of two images."""
    padded = _padded(layers)
    return Tile(16, max(4, 128 // padded), _depth(layers, 64 if padded < 64 else 32))


def sums_tile(layers: Layers) -> Tile:
    """The same of the program that holds the columns of one layer."""
    return Tile(64, 32, _depth(layers, 64), 4)


def _depth(layers: Layers, size: int) -> int:
    """Channels that make up so many bytes, fewer where these divide a head and those do not."""
    depth = size // layers.items[0].q.element_size()
    return depth if layers.dim % depth == 0 or depth < 32 else 16


def _magnifier(queries: int) -> float:
    """A power of two by which columns are multiplied: squares of entries up to 16 are summed within float32, and those
    of entries of 1e-31 keep their digits."""
    return 2.0 ** (59 - math.ceil(math.log2(queries) / 2))


def _check_keys(layers: Layers, start: int, stop: int) -> None:
    if not 0 <= start < stop <= layers.shape[3]:
        raise IndexError(f"keys {start}..{stop - 1} are out of range: these layers have {layers.shape[3]} keys.")


def _check_products(layers: Layers, products: LayerProducts, start: int, stop: int) -> None:
    _check_keys(layers, start, stop)
    expected = (*layers.shape[:2], stop - start, len(layers))
    if products.level.shape != expected or products.level.device != layers.device:
        raise UsageError(
            f"these products are of columns {list(products.level.shape)}, the layers and keys of columns "
            f"{list(expected)}: pass what layer_products gave for the same keys."
        )
