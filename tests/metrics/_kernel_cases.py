"""Kernels against naive float64 loops. `test_layer_kernels` runs this file in a process of its own: Triton's
interpreter takes the place of a GPU only if it is chosen before triton is imported."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from collapse_probe.capture.attention_map import AttentionMap, QueryKey, TokenLayout
from collapse_probe.metrics import CrossLayerSimilarity, cross_layer
from collapse_probe.metrics.functional.columns import decompose_columns
from collapse_probe.metrics.layer_kernels import (
    Layer,
    Layers,
    Tile,
    add_unit_columns,
    available,
    image_products,
    layer_products,
    layers_of,
)
from collapse_probe.metrics.layer_kernels.layers import interpreted

pytest.importorskip("triton")
if not interpreted() and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or Triton's interpreter", allow_module_level=True)

DEVICE = "cpu" if interpreted() else "cuda"

#: How far M may be from float64 on the same queries and keys, in whatever dtype these are.
TOLERANCE = 3e-6


class Sizes(NamedTuple):
    layers: int = 3
    images: int = 2
    heads: int = 2
    queries: int = 37
    keys: int = 6
    dim: int = 32
    dtype: torch.dtype = torch.float32


SIZES = [
    Sizes(12, 2, 2, 37, 5, 64),
    Sizes(24, 1, 2, 20, 4, 80, torch.bfloat16),
    Sizes(32, 1, 1, 33, 3, 128, torch.float16),
    Sizes(40, 1, 1, 18, 3, 32, torch.bfloat16),
    Sizes(3, 2, 2, 5, 19, 20),
    Sizes(2, 1, 1, 16, 1, 8, torch.float16),
    Sizes(1, 1, 1, 1, 2, 16),
]


def made(sizes, spread=1.0, seed=0):
    """Layers whose queries and keys are slices of one projection, as models have them, each with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sizes.queries, sizes.keys)
    layers = []
    for number in range(sizes.layers):
        qkv = torch.randn(sizes.images, length, 3, sizes.heads, sizes.dim, generator=generator)
        qkv = qkv.to(sizes.dtype).to(DEVICE)
        q, k = (qkv[:, :count, i].transpose(1, 2) for i, count in ((0, sizes.queries), (1, sizes.keys)))
        layers.append(normalised(q, k, spread * (1 + number / 10) * sizes.dim**-0.5))
    return layers


def normalised(q, k, scale):
    return Layer(q, k, (q.double() @ k.double().mT * scale).logsumexp(-1).float(), scale)


def maps_of(layers):
    """Maps `[L, B, H, Q, K]` in float64, from queries, keys and normalisers."""
    maps = []
    for layer in layers:
        q, k, normalizer = (item.detach().cpu().double().numpy() for item in layer[:3])
        with np.errstate(all="ignore"):
            logits = np.einsum("bhqd,bhkd->bhqk", q, k) * layer.scale
            maps.append(np.where(np.isneginf(normalizer)[..., None], 0.0, np.exp(logits - normalizer[..., None])))
    return np.stack(maps)


def decomposed(column):
    """(w, level, exists, finite) of one column."""
    if not np.isfinite(column).all():
        return np.zeros_like(column), 0.0, False, False
    if not column.any():
        return np.zeros_like(column), 0.0, False, True
    scaled = column / column.max()
    norm = math.sqrt(sum(scaled**2))
    mean = sum(scaled) / len(scaled)
    return (scaled - mean) / norm, mean * math.sqrt(len(column)) / norm, True, True


def expected(maps):
    """Deviations `[L, B, H, K, Q]`, levels, existence and finiteness `[L, B, H, K]`, column by column."""
    layers, images, heads, queries, keys = maps.shape
    deviation = np.zeros((layers, images, heads, keys, queries))
    level = np.zeros((layers, images, heads, keys))
    exists, finite = level.astype(bool), level.astype(bool)
    for at in itertools.product(range(layers), range(images), range(heads), range(keys)):
        deviation[at], level[at], exists[at], finite[at] = decomposed(maps[(*at[:3], slice(None), at[3])])
    return deviation, level, exists, finite


def expected_products(deviation):
    layers, images, heads, keys, _ = deviation.shape
    out = np.zeros((images, heads, keys, layers, layers))
    for b, h, t, p, r in itertools.product(*map(range, out.shape)):
        out[b, h, t, p, r] = deviation[p, b, h, t] @ deviation[r, b, h, t]
    return out


def expected_images(deviation, level):
    layers, images, heads, keys, _ = deviation.shape
    out = np.zeros((images, images, layers, layers))
    for b, c, p, r, h, t in itertools.product(*map(range, (*out.shape, heads, keys))):
        out[b, c, p, r] += deviation[p, b, h, t] @ deviation[r, c, h, t] + level[p, b, h, t] * level[r, c, h, t]
    return out


def close(value, reference, atol=TOLERANCE, rtol=0):
    np.testing.assert_allclose(value.double().cpu().numpy(), reference, atol=atol, rtol=rtol)


def check(layers, atol=TOLERANCE):
    """All that `layer_products` gives, against loops; returns it and the expected deviations."""
    found = layer_products(Layers.of(layers), 0, layers[0].k.shape[2])
    deviation, level, exists, finite = expected(maps_of(layers))
    close(found.products, expected_products(deviation), atol)
    last = (1, 2, 3, 0)
    close(found.level, level.transpose(last), atol)
    close(found.variation, np.linalg.norm(deviation, axis=-1).transpose(last), atol)
    np.testing.assert_array_equal(found.exists.cpu(), exists.transpose(last))
    np.testing.assert_array_equal(found.finite.cpu(), finite.transpose(last))
    return found, deviation


def check_centred(found, deviation, atol):
    """Cosines of the columns after subtracting their means."""
    norm = np.linalg.norm(deviation, axis=-1).transpose(1, 2, 3, 0)
    centred = expected_products(deviation) / norm[..., None] / norm[..., None, :]
    close(found.products / found.variation[..., None] / found.variation[..., None, :], centred, atol)


# -- products of layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_match_loops(sizes):
    layers = made(sizes)
    found, _ = check(layers)
    maps = maps_of(layers)
    close(found.mean, maps.mean(3).transpose(1, 2, 3, 0), 0, 5e-6)
    close(found.inverse, 1 / np.linalg.norm(maps, axis=3).transpose(1, 2, 3, 0), 0, 5e-6)


def test_products_are_those_of_decomposed_columns():
    layers = made(Sizes(queries=20))
    found = layer_products(Layers.of(layers), 1, 5)
    columns = torch.tensor(maps_of(layers)).float().mT[..., 1:5, :]
    plain = decompose_columns(columns.contiguous())
    close(found.products, torch.einsum("lbhkq,mbhkq->bhklm", plain.deviation, plain.deviation).numpy())
    for name in ("level", "variation", "exists", "finite"):
        close(getattr(found, name), getattr(plain, name).permute(1, 2, 3, 0).numpy())


def test_a_part_of_the_keys_is_a_part_of_the_products():
    layers = Layers.of(made(Sizes(keys=21)))
    whole = layer_products(layers, 0, 21)
    parts = [layer_products(layers, start, stop) for start, stop in ((0, 1), (1, 18), (18, 21))]
    for name, value in whole._asdict().items():
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts], 2), value, rtol=0, atol=0)


@pytest.mark.parametrize("tile", [Tile(16, 4, 16), Tile(32, 16, 8), Tile(64, 8, 32), Tile(16, 32, 64)])
def test_tiles_agree(tile):
    layers, sums = Layers.of(made(Sizes(keys=9, dim=24))), []
    usual, found = layer_products(layers, 2, 9), layer_products(layers, 2, 9, tile)
    for name, value in usual._asdict().items():
        torch.testing.assert_close(getattr(found, name), value, rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(
        image_products(layers, usual, 2, 9, tile), image_products(layers, usual, 2, 9), rtol=0, atol=1e-5
    )
    for choice in (tile, None):
        sums.append(torch.zeros(3, 2, 7, 37, dtype=torch.float64, device=DEVICE))
        add_unit_columns(layers, usual, 2, 9, sums[-1], choice)
    torch.testing.assert_close(*sums, rtol=0, atol=2e-6)


# -- columns that lose digits ----------------------------------------------------------------------------------------


def test_nearly_uniform_columns_keep_their_centred_cosine():
    """At a relative variation of 1e-3 the squares of the mean are a million times those of what is left of the column:
    had they been taken from products, nothing would remain of the centred cosine."""
    found, deviation = check(made(Sizes(queries=197, keys=3), spread=1e-3))
    assert 5e-4 < found.variation.mean() < 2e-3
    check_centred(found, deviation, 2e-3)


@pytest.mark.parametrize("spread", [6.0, 40.0])
def test_sharply_peaked_columns(spread):
    """Logits of tens have float32 errors of their own, which no kernel can avoid: 1e-7 of them each."""
    check(made(Sizes(queries=70), spread=spread), atol=1e-5)


def test_first_queries_unlike_all_others():
    """The shift is the mean over the first queries: the worst case is a column that lives there alone."""
    layers = made(Sizes(queries=200, keys=4, images=1))
    for layer in layers:
        layer.log_normalizer[:, :, 16:] += 12
    check(layers)
    for layer in layers:
        layer.log_normalizer[:, :, 16:] -= 12
        layer.log_normalizer[:, :, :16] += 12
    check(layers)


@pytest.mark.parametrize(("spread", "atol"), [(1.0, 2e-5), (1e-3, 1e-2)])
def test_columns_of_1e_30_keep_their_digits(spread, atol):
    """What they lose they lose to the logits, which are -70 and have float32 errors of 4e-6."""
    layers = made(Sizes(), spread)
    for layer in layers:
        layer.log_normalizer.add_(30 * math.log(10))
    found, deviation = check(layers)
    assert found.exists.all()
    assert found.mean.max() < 1e-30
    check_centred(found, deviation, atol)
    group, level = Layers.of(layers), expected(maps_of(layers))[1]
    close(image_products(group, found, 0, 6), expected_images(deviation, level), 1e-5)


def test_columns_below_the_limit_count_as_zero():
    layers = made(Sizes())
    layers[1].log_normalizer.add_(36 * math.log(10))
    found = layer_products(Layers.of(layers), 0, 6)
    assert not found.exists[..., 1].any()
    assert found.exists[..., ::2].all()
    assert found.finite.all()
    assert not found.products[..., 1, :].any()


def spoilt(sizes=None):
    """Layers with a zero column, one with a NaN, one with an infinity, a masked row, and a head of NaN."""
    layers = made(sizes or Sizes(images=3, queries=20, keys=5))
    q, k, _, scale = layers[1]
    q[..., 0], k[:, :, 3, :] = 1.0, 0.0
    k[0, 0, 3, 0] = -2000 / scale
    layers[1] = normalised(q, k, scale)
    layers[0].k[0, 1, 2, 4] = torch.nan
    layers[2].k[0, 0, 1, 0] = torch.inf
    layers[2].q[2, 1, 17] = torch.nan
    layers[0].log_normalizer[1, 0, 7] = -torch.inf
    return layers


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zero_and_nonfinite_columns_are_left_out():
    layers = spoilt()
    found, _ = check(layers)
    assert not found.exists[0, 0, 3, 1]
    assert found.finite[0, 0, 3, 1]
    assert not found.finite[0, 1, 2, 0]
    assert not found.finite[2, 1, :, 2].any()
    assert found.finite.sum() == found.finite.numel() - 7
    for name in ("products", "level", "variation", "mean", "inverse"):
        assert getattr(found, name).isfinite().all()
    for value in (found.products[0, 1, 2, 0], found.products[0, 0, 3, :, 1], found.products[2, 1, :, 2]):
        assert not value.any()


# -- products of images, sums over images ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "layers",
    [
        made(Sizes(12, 4, 1, 19, 9, 32)),
        made(Sizes(17, 2, 1, 17, 5, 64, torch.bfloat16)),
        made(Sizes(3, 1, 2, 9, 4, 8, torch.float16)),
        spoilt(),
    ],
    ids=["12 layers", "17 layers", "one image", "absent columns"],
)
def test_image_products_match_loops(layers):
    stop = layers[0].k.shape[2]
    group = Layers.of(layers)
    products = layer_products(group, 1, stop)
    deviation, level, _, _ = expected(maps_of(layers)[..., 1:])
    found = image_products(group, products, 1, stop)
    assert found.dtype == torch.float64
    close(found, expected_images(deviation, level), 1e-5)
    assert torch.equal(found, image_products(group, products, 1, stop))
    torch.testing.assert_close(found, found.permute(1, 0, 3, 2), rtol=0, atol=1e-6)


def test_image_products_of_more_keys_than_one_program_sums():
    layers = made(Sizes(2, 2, 1, 5, 150, 8))
    deviation, level, _, _ = expected(maps_of(layers))
    group = Layers.of(layers)
    close(image_products(group, layer_products(group, 0, 150), 0, 150), expected_images(deviation, level), 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "layers",
    [made(Sizes(2, 11, 2, 19, 6)), made(Sizes(2, 1, 2, 66, 6, 80, torch.bfloat16)), spoilt()],
    ids=["11 images", "one image", "absent columns"],
)
def test_unit_columns_are_added(layers):
    deviation, *_ = expected(maps_of(layers))
    count, _, heads, keys, queries = deviation.shape
    group = Layers.of(layers)
    state = torch.rand(count, heads, keys + 2, queries, dtype=torch.float64, device=DEVICE)
    before = state.clone()
    products = layer_products(group, 1, keys)
    add_unit_columns(group, products, 1, keys, state[:, :, 2 : keys + 1])
    close(state[:, :, 2 : keys + 1] - before[:, :, 2 : keys + 1], deviation.sum(1)[:, :, 1:], 5e-6)
    assert torch.equal(state[:, :, :2], before[:, :, :2])
    assert torch.equal(state[:, :, keys + 1 :], before[:, :, keys + 1 :])
    again = before.clone()
    add_unit_columns(group, products, 1, keys, again[:, :, 2 : keys + 1])
    assert torch.equal(again, state)


# -- row normalisers, and the metric as a whole ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "spread"),
    [
        (Sizes(12, 1, 2, 37, 5, 64), 1.0),
        (Sizes(2, 2, 1, 70, 150, 24), 40.0),
        (Sizes(3, 1, 1, 33, 3, 128, torch.bfloat16), 1.0),
    ],
    ids=str,
)
def test_row_normalisers_match_float64(sizes, spread):
    layers = made(sizes, spread)
    group = layers_of(as_maps(layers, given=False))
    for layer, found in zip(layers, group.items, strict=True):
        q, k = (item.detach().cpu().double() for item in layer[:2])
        close(found.log_normalizer, (q @ k.mT * layer.scale).logsumexp(-1).numpy(), 2e-5 * spread, 1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("pair_budget", "tile_bytes", "bad"),
    [
        (0, None, False),
        pytest.param(0, None, True, marks=pytest.mark.sweep),
        pytest.param(1 << 30, 8000, False, marks=pytest.mark.sweep),
        pytest.param(1 << 30, None, True, marks=pytest.mark.sweep),
    ],
)
def test_similarity_is_that_of_tiles(pair_budget, tile_bytes, bad, monkeypatch):
    """Batches of a few blocks and a rest, images of which some are missing, prefix tokens, and absent columns."""
    sizes = Sizes(3, 20, 2, 18, 5, 8)
    layers = spoilt(sizes) if bad else made(sizes, 3.0)
    maps = as_maps(layers, given=True, prefix_tokens=1)
    index = torch.tensor([*range(9), 10, 11, *range(64, 68), *range(70, 75)])

    def measured():
        metric = CrossLayerSimilarity(pair_budget=pair_budget, tile_bytes=tile_bytes).to(DEVICE)
        for start, stop in ((0, 8), (8, 20)):
            metric.update([item.select(start, stop) for item in maps], index[start:stop])
        return metric.compute() | {f"replicates {name}": value for name, value in metric.replicates().items()}

    launched = []
    monkeypatch.setattr(cross_layer, "layer_products", lambda *args: launched.append(1) or layer_products(*args))
    found = measured()
    assert launched
    monkeypatch.setattr(cross_layer, "usable", lambda _: False)
    launched.clear()
    expected = measured()
    assert not launched
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name == "histogram":
            assert (value.sum(-1) == expected[name].sum(-1)).all()
            assert (value - expected[name]).abs().sum() <= 0.01 * value.sum()  # rounding moves some to the next bin
        else:
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-5, equal_nan=True, msg=name)


def as_maps(layers, given, prefix_tokens=0):
    return [
        AttentionMap(
            f"blocks.{i}",
            "token",
            TokenLayout(prefix_tokens),
            QueryKey(layer.q, layer.k, layer.scale, log_normalizer=layer.log_normalizer if given else None),
        )
        for i, layer in enumerate(layers)
    ]


# -- how layers are reached ------------------------------------------------------------------------------------------


def test_layers_of_any_strides_give_the_same():
    layers = made(Sizes(dim=64))
    usual = Layers.of(layers)
    assert usual.align == 4
    wanted = layer_products(usual, 0, 6)
    contiguous = [layer._replace(q=layer.q.contiguous(), k=layer.k.contiguous()) for layer in layers]
    moved = [layer._replace(k=layer.k.mT.contiguous().mT) for layer in layers]
    shifted = []
    for layer in layers:  # one element behind an aligned address
        room = torch.empty(layer.q.numel() + 1, dtype=layer.q.dtype, device=DEVICE)[1:].view(layer.q.shape)
        shifted.append(layer._replace(q=room.copy_(layer.q)))
    mixed = [layers[0], contiguous[1], shifted[2]]
    assert Layers.of(shifted).align == 1
    assert Layers.of(moved).items[0].k.stride(-1) == 1
    for others in (contiguous, moved, shifted, mixed):
        torch.testing.assert_close(layer_products(Layers.of(others), 0, 6), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("given", [True, False])
def test_maps_are_read_where_they_are(given):
    layers = made(Sizes())
    maps = as_maps(layers, given)
    assert available(maps)
    group = layers_of(maps)
    assert group.items[1].q.data_ptr() == layers[1].q.data_ptr()
    close(layer_products(group, 0, 6).products, layer_products(Layers.of(layers), 0, 6).products.cpu().numpy(), 1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_nothing_waits_for_the_device():
    layers = made(Sizes())
    state = torch.zeros(3, 2, 6, 37, dtype=torch.float64, device=DEVICE)
    for mode in ("default", "error"):  # the first time programs are compiled and loaded
        torch.cuda.set_sync_debug_mode(mode)
        try:
            group = Layers.of(layers)
            products = layer_products(group, 0, 6)
            image_products(group, products, 0, 6)
            add_unit_columns(group, products, 0, 6, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
