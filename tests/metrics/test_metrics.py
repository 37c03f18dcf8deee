"""What is special to the metrics of maps that came first, and to the tiles that all metrics of maps are fed.

What every metric promises is in `test_conformance.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from _reference import (
    _reference_centred,
    _reference_columns,
    _reference_cross_head,
    _reference_entropy,
    _reference_image_independent,
    _reference_similarity,
    _reference_variation,
    peaked_maps,
)

from collapse_probe.errors import UsageError
from collapse_probe.metrics import AttentionEntropy, CrossHeadSimilarity, CrossLayerSimilarity, cross_layer
from collapse_probe.metrics.replicates import replicate_weights
from collapse_probe.metrics.tile_metric import feed
from collapse_probe.metrics.tiles import TensorMap, image_blocks, tiles

METRICS = [CrossLayerSimilarity, CrossHeadSimilarity, AttentionEntropy]
MAPS = torch.tensor(peaked_maps(images=12))
every_metric = pytest.mark.parametrize("metric_class", METRICS)


def run(metric_class, *batches, **kwargs):
    metric = metric_class(prefix_tokens=1, **kwargs)
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def assert_same(one, other, atol=1e-12, but=()):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name not in but:
            torch.testing.assert_close(
                value, other[name], atol=atol, rtol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def standard_error(per_image):
    return np.std(per_image, axis=0, ddof=1) / np.sqrt(len(per_image))


# -- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [False, True])
def test_cross_layer_against_loops(negative):
    maps = peaked_maps(images=8, negative=negative)
    out = {key: value.numpy() for key, value in run(CrossLayerSimilarity, torch.tensor(maps)).items()}
    m, c, i = _reference_similarity(maps), _reference_centred(maps), _reference_image_independent(maps)
    close = lambda name, expected: np.testing.assert_allclose(out[name], expected, atol=1e-12, err_msg=name)  # noqa: E731
    for suffix, keys in (("", slice(None)), ("_prefix", slice(0, 1)), ("_patch", slice(1, None))):
        close(f"similarity{suffix}", m[..., keys].mean((0, 3, 4)))
        close(f"similarity{suffix}_se", standard_error(m[..., keys].mean((3, 4))))
        close(f"centred{suffix}", c[..., keys].mean((0, 3, 4)))
        close(f"centred{suffix}_se", standard_error(c[..., keys].mean((3, 4))))
        close(f"image_independent{suffix}", i[..., keys].mean((2, 3)))
        close(f"excess{suffix}", m[..., keys].mean((0, 3, 4)) - i[..., keys].mean((2, 3)))
        assert (out[f"centred{suffix}_absent"] == 0).all()
    close("similarity_by_head", m.mean((0, 4)))
    close("similarity_by_token", m.mean((0, 3)))
    close("centred_by_head", c.mean((0, 4)))
    close("centred_by_token", c.mean((0, 3)))
    close("image_independent_by_head", i.mean(3))
    close("image_independent_by_token", i.mean(2))
    r = np.array([[[[_reference_variation(h[:, t]) for t in range(7)] for h in b] for b in layer] for layer in maps])
    close("relative_variation", r.mean((1, 2, 3)))
    close("relative_variation_se", standard_error(r.mean((2, 3)).T))
    edges = np.linspace(-1, 1, 401)
    for p in range(3):
        for q in range(3):
            values = np.clip(m[:, p, q].ravel(), -1, 1 - 1e-9)
            if p != q:
                np.testing.assert_array_equal(out["histogram"][p, q], np.histogram(values, edges)[0])
    assert out["histogram"].sum() == m.size


def test_absent_columns_are_left_out_of_means_and_counted():
    maps = peaked_maps(images=8)
    maps[1, 2, 0, :, 3] = 0  # a token nobody attends to
    maps[0, 5, 1, :, 4] = 0.25  # attended to uniformly: nothing is left when centred
    maps[2, 6, 1, 0, 5] = np.nan
    out = {key: value.numpy() for key, value in run(CrossLayerSimilarity, torch.tensor(maps)).items()}
    with np.errstate(invalid="ignore"):
        clean = np.where(np.isnan(maps).any(3, keepdims=True), 0.0, maps)  # the reference calls zero columns absent
    m, c, i = _reference_similarity(clean), _reference_centred(clean), _reference_image_independent(clean)
    np.testing.assert_allclose(out["similarity"], np.nanmean(m, (0, 3, 4)), atol=1e-12)
    np.testing.assert_allclose(out["similarity_by_head"], np.nanmean(m, (0, 4)), atol=1e-12)
    np.testing.assert_allclose(out["similarity_by_token"], np.nanmean(m, (0, 3)), atol=1e-12)
    np.testing.assert_allclose(out["centred"], np.nanmean(c, (0, 3, 4)), atol=1e-12)
    np.testing.assert_allclose(out["zero_columns"], [0, 1, 0])
    np.testing.assert_allclose(out["nonfinite_columns"], [0, 0, 1])
    weights = (~np.isnan(m)).sum((0, 3, 4))
    np.testing.assert_array_equal(out["histogram"].sum(-1), weights)
    np.testing.assert_allclose(out["centred_absent"], 1 - (~np.isnan(c)).sum((0, 3, 4)) / weights, atol=1e-12)
    # pooled over every existing pair of columns of different images
    pairs = np.zeros((3, 3))
    total = np.zeros((3, 3))
    exists = ~np.isnan(_reference_similarity(clean).diagonal(axis1=1, axis2=2))  # [b, h, t, l]
    for p in range(3):
        for q in range(3):
            both = exists[..., p].sum(0) * exists[..., q].sum(0) - (exists[..., p] & exists[..., q]).sum(0)
            pairs[p, q], total[p, q] = both.sum(), (both * i[p, q]).sum()
    np.testing.assert_allclose(out["image_independent"], total / pairs, atol=1e-12)


# -- windows ---------------------------------------------------------------------------------------------------------

WINDOWS = 3
WINDOWED = torch.tensor(peaked_maps(images=12 * WINDOWS, queries=5, keys=4, seed=1))


def run_windows(metric_class, *batches, prefix_tokens=0, **kwargs):
    metric = metric_class(prefix_tokens=prefix_tokens, windows=WINDOWS, **kwargs)
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def _of_part(name, part):
    return f"{name.removesuffix('_se')}{part}_se" if name.endswith("_se") else f"{name}{part}"


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_windows_of_an_image_are_further_key_columns(prefix):
    out = run_windows(CrossLayerSimilarity, WINDOWED, prefix_tokens=prefix)
    out = {key: value.numpy() for key, value in out.items()}
    maps = _reference_columns(WINDOWED.numpy(), WINDOWS)
    m, c, i = _reference_similarity(maps), _reference_centred(maps), _reference_image_independent(maps)
    place = np.arange(WINDOWS * 4) % 4  # within the window
    parts = {"": place >= 0} | ({"_prefix": place < 1, "_patch": place >= 1} if prefix else {})
    for suffix, keys in parts.items():
        expected = {
            "similarity": m[..., keys].mean((0, 3, 4)),
            "similarity_se": standard_error(m[..., keys].mean((3, 4))),
            "centred": c[..., keys].mean((0, 3, 4)),
            "centred_se": standard_error(c[..., keys].mean((3, 4))),
            "image_independent": i[..., keys].mean((2, 3)),
            "excess": m[..., keys].mean((0, 3, 4)) - i[..., keys].mean((2, 3)),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(out[_of_part(name, suffix)], value, atol=1e-12, err_msg=name + suffix)
    for name, values in (("similarity", m.mean(0)), ("centred", c.mean(0)), ("image_independent", i)):
        np.testing.assert_allclose(out[f"{name}_by_head"], values.mean(3), atol=1e-12, err_msg=name)
        np.testing.assert_allclose(out[f"{name}_by_token"], values.mean(2), atol=1e-12, err_msg=name)
    r = [[[[_reference_variation(h[:, t]) for t in range(12)] for h in b] for b in layer] for layer in maps]
    np.testing.assert_allclose(out["relative_variation"], np.mean(r, axis=(1, 2, 3)), atol=1e-12)
    assert out["histogram"].sum() == m.size


def test_pairs_within_blocks_hold_whole_images():
    out = run_windows(CrossLayerSimilarity, WINDOWED, pair_budget=0)
    maps = _reference_columns(WINDOWED.numpy(), WINDOWS)
    blocks = [_reference_image_independent(maps[:, start : start + 4]).mean((2, 3)) for start in (0, 4, 8)]
    np.testing.assert_allclose(out["image_independent"], np.mean(blocks, axis=0), atol=1e-12)
    np.testing.assert_allclose(out["image_independent_se"], standard_error(blocks), atol=1e-12)


def test_absent_columns_of_single_windows_are_left_out():
    maps = WINDOWED.clone()
    maps[1, 4, 0, :, 2] = 0  # image 1, window 1
    maps[2, 23, 1, 0, 3] = torch.nan  # image 7, window 2
    out = {key: value.numpy() for key, value in run_windows(CrossLayerSimilarity, maps).items()}
    columns = _reference_columns(maps.numpy(), WINDOWS)
    clean = np.where(np.isnan(columns).any(3, keepdims=True), 0.0, columns)  # the reference calls zero columns absent
    m = _reference_similarity(clean)
    np.testing.assert_allclose(out["similarity"], np.nanmean(m, (0, 3, 4)), atol=1e-12)
    np.testing.assert_allclose(out["similarity_by_head"], np.nanmean(m, (0, 4)), atol=1e-12)
    np.testing.assert_allclose(out["similarity_by_token"], np.nanmean(m, (0, 3)), atol=1e-12)
    np.testing.assert_allclose(out["image_independent_by_token"].shape, (3, 3, 12))
    assert out["zero_columns"].tolist() == [0, 1, 0]
    assert out["nonfinite_columns"].tolist() == [0, 0, 1]


def test_heads_are_compared_within_windows():
    out = run_windows(CrossHeadSimilarity, WINDOWED)
    for layer, maps in enumerate(_reference_columns(WINDOWED.numpy(), WINDOWS)):
        reference = _reference_cross_head(maps)
        pairs = reference[:, 0, 1].mean(1)
        np.testing.assert_allclose(out["cross_head_similarity"][layer], pairs.mean(), atol=1e-12)
        np.testing.assert_allclose(out["cross_head_similarity_se"][layer], standard_error(pairs), atol=1e-12)
        np.testing.assert_allclose(out["cross_head_matrix"][layer], reference.mean((0, 3)), atol=1e-12)


@dataclass(frozen=True)
class MixedMap(TensorMap):
    """A map with a softmax of its own underneath, some of whose keys are masked."""

    softmax: torch.Tensor | None = None
    masked: torch.Tensor | None = None

    def select(self, start, stop):
        rows = slice(start * self.windows, stop * self.windows)
        masked = self.masked if self.masked is None or self.masked.shape[0] == 1 else self.masked[rows]
        return MixedMap(self.tensor[rows], self.prefix_tokens, self.windows, self.softmax[rows], masked)

    def admissible_keys(self):
        return None if self.masked is None else (~self.masked).sum(-1)

    def write_columns(self, start, stop, out):
        super().write_columns(start, stop, out)
        return self.softmax[..., start:stop].mT


def masked_softmax(layers, heads, masked, seed):
    logits = torch.randn(layers, 12 * WINDOWS, heads, 5, 4, dtype=torch.float64, generator=torch.manual_seed(seed))
    return logits.masked_fill(masked, -torch.inf).softmax(-1)


def shifted_mask():
    """Another mask in every window; all images share them. One row is masked as a whole, one admits a single key."""
    masked = torch.zeros(WINDOWS, 1, 5, 4, dtype=torch.bool)
    masked[1, :, :3, 2:] = masked[1, :, 3:, :2] = True
    masked[2, :, 0] = masked[2, :, 1, 1:] = True
    return masked.repeat(12, 1, 1, 1)


def _reference_normalized(softmax, masked):
    """Mean entropy, the same over the log of the admissible keys, and shares by head, by loops over rows."""
    entropies, shares = [], []
    for softmax_map, masks in zip(softmax.numpy(), masked.numpy(), strict=True):
        for head in softmax_map:
            for row, mask in zip(head, masks[0], strict=True):
                keys = int((~mask).sum())
                if keys:
                    entropies.append(-sum(a * math.log(a) for a in row if a > 0))
                if keys > 1:
                    shares.append(entropies[-1] / math.log(keys))
    return np.mean(entropies), np.mean(shares)


@pytest.mark.parametrize("tile_bytes", [None, 1])
def test_rows_are_normalised_by_the_keys_of_their_own_window(tile_bytes):
    masked = shifted_mask()
    softmax = masked_softmax(3, 2, masked, seed=4)
    layers = [MixedMap(WINDOWED[layer], 0, WINDOWS, softmax[layer], masked) for layer in range(3)]
    out = run_windows(AttentionEntropy, layers, tile_bytes=tile_bytes)
    for layer in range(3):
        entropy, normalized = _reference_normalized(softmax[layer].nan_to_num(0.0), masked)
        np.testing.assert_allclose(out["entropy"][layer], entropy, atol=1e-12)
        np.testing.assert_allclose(out["normalized_entropy"][layer], normalized, atol=1e-12)
        np.testing.assert_allclose(out["attention_entropy_absent"][layer], 1 / 15, atol=1e-12)
    unmasked = run_windows(AttentionEntropy, WINDOWED)
    per_image = _reference_entropy(WINDOWED[0].numpy()).reshape(12, -1).mean(1)
    np.testing.assert_allclose(unmasked["entropy"][0], per_image.mean(), atol=1e-12)
    np.testing.assert_allclose(unmasked["entropy_se"][0], standard_error(per_image), atol=1e-12)
    np.testing.assert_allclose(unmasked["normalized_entropy"][0], per_image.mean() / math.log(4), atol=1e-12)


@pytest.mark.parametrize("heads", [(3, 3, 3), (4, 2, 6)], ids=str)
def test_the_softmax_may_have_other_heads_than_the_applied_map(heads):
    masked = shifted_mask()[:1]
    softmaxes = [masked_softmax(1, count, masked, seed)[0] for seed, count in enumerate(heads)]
    layers = [MixedMap(WINDOWED[i], 0, WINDOWS, softmax, masked) for i, softmax in enumerate(softmaxes)]
    out = run_windows(AttentionEntropy, [item.select(0, 4) for item in layers], [item.select(4, 12) for item in layers])
    for layer, softmax in enumerate(softmaxes):
        reference = _reference_entropy(softmax.numpy())
        np.testing.assert_allclose(out["entropy"][layer], reference.mean(), atol=1e-12)
        per_image = reference.reshape(12, -1).mean(1)
        np.testing.assert_allclose(out["entropy_se"][layer], standard_error(per_image), atol=1e-12)
        if len(set(heads)) == 1:
            np.testing.assert_allclose(out["entropy_by_head"][layer], reference.mean((0, 2)), atol=1e-12)
    assert ("entropy_by_head" in out) == (len(set(heads)) == 1)
    alike = run_windows(CrossLayerSimilarity, layers)
    assert_same(alike, run_windows(CrossLayerSimilarity, WINDOWED))


@every_metric
def test_windows_travel_with_the_states(metric_class):
    used, merged = metric_class(windows=WINDOWS), metric_class()
    used.update(WINDOWED)
    merged.merge_state(used)
    assert merged.group.windows == WINDOWS
    assert_same(merged.results(), used.results())


def test_tiles_stay_within_their_bound():
    """A few keys of all windows of four images; never less than one key of each window."""
    maps = torch.rand(2, 5 * WINDOWS, 2, 20, 6)
    layers = [TensorMap(layer, 0, WINDOWS) for layer in maps]
    one_key = maps[:, : 4 * WINDOWS, ..., 0].nbytes
    for tile_bytes in (1, 2 * one_key, 4 * one_key, 1 << 30):
        block, index = next(image_blocks(layers, torch.arange(5)))
        assert index.tolist() == [0, 1, 2, 3]
        seen = [(tile.start, tile.stop, tile.applied.nbytes) for tile in tiles(block, tile_bytes)]
        assert [start for start, _, _ in seen] == [0, *(stop for _, stop, _ in seen[:-1])]
        assert seen[-1][1] == 6
        assert all(size <= max(tile_bytes, one_key) for _, _, size in seen)


def test_tiles_of_some_heads_hold_every_column_once():
    """Where heads may be apart and all of them leave room for few keys."""
    maps = torch.rand(2, 4, 5, 20, 70)
    layers = [TensorMap(layer, 1) for layer in maps]
    one_key = maps[..., 0].nbytes
    for tile_bytes in (1, one_key, 40 * one_key, 1 << 30):
        seen = torch.zeros(5, 70, dtype=torch.int64)
        heads = set()
        for tile in tiles(layers, tile_bytes, heads_apart=True):
            columns = maps[:, :, tile.heads, :, tile.start : tile.stop].mT
            assert torch.equal(tile.applied[:, :, 0], columns)
            seen[tile.heads, tile.start : tile.stop] += 1
            heads.add(tile.applied.shape[3])
        assert (seen == 1).all()
        assert heads == {1: {1}, one_key: {1}, 40 * one_key: {3, 2}, 1 << 30: {5}}[tile_bytes]


@pytest.mark.parametrize("pair_budget", [0, 1 << 30])
def test_images_are_paired_alike_for_few_and_many_layers(pair_budget, monkeypatch):
    expected = run(CrossLayerSimilarity, MAPS, pair_budget=pair_budget)
    monkeypatch.setattr(cross_layer, "FEW_LAYERS", 0)
    out = run(CrossLayerSimilarity, MAPS, pair_budget=pair_budget)
    assert out["image_independent_se"].isfinite().all()
    assert_same(out, expected)


def test_windows_must_share_out_the_batch():
    with pytest.raises(UsageError, match="36 maps cannot be 5 windows of each of several images"):
        AttentionEntropy(windows=5).update(WINDOWED)
    with pytest.raises(UsageError, match=r"windows \[1, 3\]"):
        AttentionEntropy().update([TensorMap(WINDOWED[0]), TensorMap(WINDOWED[1], 0, 3)])


# -- what is fed -----------------------------------------------------------------------------------------------------


@every_metric
def test_maps_as_dictionary_sequence_and_tensor(metric_class):
    layers = [TensorMap(layer, 1) for layer in MAPS]
    expected = run(metric_class, MAPS)
    assert_same(run(metric_class, layers), expected)
    assert_same(run(metric_class, {str(i): layer for i, layer in enumerate(layers)}), expected)
    assert_same(run(metric_class, list(MAPS)), expected)


def test_metrics_that_share_tiles_see_the_same():
    metrics = [
        metric_class(prefix_tokens=1) for metric_class in (AttentionEntropy, CrossLayerSimilarity, CrossHeadSimilarity)
    ]
    feed(metrics, [TensorMap(layer, 1) for layer in MAPS], tile_bytes=3000)
    for metric in metrics:
        assert_same(metric.results(), run(type(metric), MAPS))


@every_metric
def test_wrong_maps(metric_class):
    metric = metric_class()
    metric.update(MAPS)
    with pytest.raises(UsageError, match="it cannot add"):
        metric.update(torch.rand(3, 2, 2, 6, 6))
    with pytest.raises(UsageError, match="agree in shape"):
        metric_class().update([torch.rand(1, 2, 4, 4), torch.rand(1, 2, 5, 5)])
    with pytest.raises(UsageError, match=r"\[L, B, H, Q, K\]"):
        metric_class().update(torch.rand(2, 2, 6, 6))
    with pytest.raises(UsageError, match="at least one layer"):
        metric_class().update([])


def test_blocks_follow_the_index_alone():
    """Not where an update begins, nor neighbours that could not be read."""
    maps = [TensorMap(layer) for layer in torch.rand(2, 7, 1, 3, 3)]
    blocks = [index.tolist() for _, index in image_blocks(maps, torch.tensor([2, 3, 4, 6, 7, 9, 12]))]
    assert blocks == [[2, 3], [4, 6, 7], [9], [12]]


@pytest.mark.parametrize("sizes", [[1, 5, 6], [2, 2, 8]], ids=str)
def test_torn_blocks_change_no_mean(sizes):
    """Only what rests on pairs of images within complete blocks of four: the errors of the image-independent part."""
    whole, torn = run(CrossLayerSimilarity, MAPS), run(CrossLayerSimilarity, *MAPS.split(sizes, dim=1))
    ends = [f"{part}{kind}" for kind in ("_se", "_low", "_high") for part in ("", "_prefix", "_patch")]
    assert_same(torn, whole, but={f"{name}{end}" for name in ("image_independent", "excess") for end in ends})
    assert torn["image_independent_se"].isnan().all() or not torch.equal(
        torn["image_independent_se"], whole["image_independent_se"]
    )


def test_replicates_are_weighted_by_the_index_of_each_image():
    """However images are dealt out, with the index given or counted on."""
    maps = peaked_maps(images=16)
    metric = CrossLayerSimilarity(threshold=0.8)
    metric.update(torch.tensor(maps))
    whole = metric.replicates()
    weights = replicate_weights(torch.arange(16)).numpy()
    m = _reference_similarity(maps)
    for replicate in (0, 7, 999):
        drawn = np.repeat(np.arange(16), weights[:, replicate].astype(int))
        near = m[drawn][:, [0, 1], [1, 2]]  # [b, pair, h, t]
        np.testing.assert_allclose(whole["similarity"][replicate, 1:], near.mean((0, 2, 3)), atol=1e-12)
        above = (near > 0.8).mean((0, 2, 3))
        np.testing.assert_allclose(whole["ratio"][replicate], [above[0], above.mean(), above[1]], atol=1e-12)
    torn, merged = CrossLayerSimilarity(threshold=0.8), CrossLayerSimilarity(threshold=0.8)
    for part in torch.tensor(maps).split([3, 8, 5], dim=1):
        torn.update(part)
    merged.update(torch.tensor(maps[:, 8:]), torch.arange(8, 16))
    other = CrossLayerSimilarity(threshold=0.8)
    other.update(torch.tensor(maps[:, :8]))
    merged.merge_state(other)
    for metric in (torn, merged):
        assert_same(metric.replicates(), whole)


# -- standard errors -------------------------------------------------------------------------------------------------


def _images_with_own_character(rng, images):
    """Maps whose images differ in how strongly they follow what all share: their tokens are far from independent."""
    layers, heads, tokens = 2, 2, 5
    shared = np.random.default_rng(0).normal(size=(layers, 1, heads, tokens, tokens)) * 1.5
    strength = rng.normal(1, 0.4, size=(1, images, 1, 1, 1))
    noise = np.exp(rng.normal(size=(1, images, 1, 1, 1)) * 0.5)
    logits = shared * strength + rng.normal(size=(layers, images, heads, tokens, tokens)) * noise
    return torch.tensor(np.exp(logits)).double()


@pytest.mark.parametrize("pair_budget", [1 << 28, 0])
def test_standard_errors_are_those_of_repeated_experiments(pair_budget):
    rng = np.random.default_rng(3)
    names = ("similarity", "image_independent", "excess", "centred")
    values, errors = [], []
    for _ in range(150):
        out = run_plain(_images_with_own_character(rng, 40), pair_budget)
        values.append([float(out[name][0, 1]) for name in names])
        errors.append([float(out[f"{name}_se"][0, 1]) for name in names])
    spread = np.std(values, axis=0, ddof=1)
    stated = np.sqrt(np.mean(np.square(errors), axis=0))
    # 150 repetitions know a spread to about 6 %; treating the part as constant would be wrong by a factor
    np.testing.assert_allclose(stated / spread, 1, atol=0.25)


def run_plain(maps, pair_budget):
    metric = CrossLayerSimilarity(pair_budget=pair_budget)
    metric.update(maps / maps.sum(-1, keepdim=True))
    return metric.compute()


def test_pairs_within_blocks_by_hand():
    maps = peaked_maps(images=8)
    out = run(CrossLayerSimilarity, torch.tensor(maps), pair_budget=0)
    blocks = [_reference_image_independent(maps[:, start : start + 4]).mean((2, 3)) for start in (0, 4)]
    np.testing.assert_allclose(out["image_independent"], np.mean(blocks, axis=0), atol=1e-12)
    np.testing.assert_allclose(out["image_independent_se"], standard_error(blocks), atol=1e-12)
    assert "image_independent_by_head" not in out


def test_both_ways_agree_on_many_images():
    maps = torch.tensor(peaked_maps(images=64))
    exact, blocks = run(CrossLayerSimilarity, maps), run(CrossLayerSimilarity, maps, pair_budget=0)
    difference = (exact["image_independent"] - blocks["image_independent"]).abs()
    assert (difference <= 4 * blocks["image_independent_se"] + 1e-9).all()
    assert (difference[0, 1] > 0).all()


def test_errors_are_absent_where_they_cannot_be_known():
    few = run(CrossLayerSimilarity, MAPS[:, :4])
    assert few["image_independent_se"].isnan().all()
    assert few["image_independent"].isfinite().all()
    single = run(CrossLayerSimilarity, MAPS[:, :1])
    assert single["similarity_se"].isnan().all()
    assert single["image_independent"].isnan().all()
    assert single["similarity"].isfinite().all()


def test_later_images_are_compared_with_each_other_in_every_fourth_block_only():
    torch.manual_seed(0)
    maps = torch.randn(2, 4, 1, 3, 3).softmax(-1)

    def blocks(budget):
        metric = CrossLayerSimilarity(pair_budget=budget)
        for start in range(0, 4 * 24, 4):
            metric.update(maps, torch.arange(start, start + 4))
        return float(metric.pair_sums[0, 0, 0, 1])

    assert blocks(1 << 20) == 16 + 2  # those at 16 and 20
    assert blocks(0) == 24  # where the part itself is that of pairs within blocks
