"""Every metric of the suite with its reference: a new metric is one more line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from _conformance import PATCH_SIZE, TOKENS, Case, Maps, Mean, Stream
from _reference import _reference_cross_head, _reference_entropy
from _reference_tokens import (
    _reference_feature_similarity,
    _reference_gram,
    _reference_high_to_low,
    _reference_hsic,
    _reference_log_amplitudes,
    _reference_median_norm,
    _reference_norms,
    _reference_rank_residual,
    _reference_token_similarity,
    _reference_typical,
)

from collapse_probe.metrics import (
    AttentionEntropy,
    AttentionSinks,
    BranchShare,
    CenteredKernelAlignment,
    CrossHeadSimilarity,
    CrossLayerSimilarity,
    FeatureSimilarity,
    FeatureSpectrum,
    HeadDivergence,
    LowPass,
    MapRank,
    MeanAttentionDistance,
    RankResidual,
    TokenNorms,
    TokenSimilarity,
    TotalVariationSimilarity,
)
from collapse_probe.metrics.functional.norms import HIGH_NORM_RATIO

SHARE = (0.0, 1.0)
COSINE = (-1.0, 1.0)
ANY = (-math.inf, math.inf)
COUNT = (0.0, math.inf)


def _smaller_side(sizes: dict[str, int]) -> float:
    return min(sizes["Q"], sizes["K"] // sizes["W"])


def _log_keys(sizes: dict[str, int]) -> float:
    return math.log(sizes["K"] / sizes["W"])


# -- references as readings ------------------------------------------------------------------------------------------


def _pooled(values: np.ndarray) -> Mean:
    """Each image's mean over all axes but the first (images) and the last (layers), weighted by how many there are."""
    values = values.reshape(len(values), -1, values.shape[-1])
    present = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return Mean(np.where(present, values, 0.0).sum(1) / present.sum(1), present.sum(1))


def _over(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean over some axes of what is there."""
    present = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(present, values, 0.0).sum(axes) / present.sum(axes)


def _entropy(stream: Maps) -> dict[str, object]:
    layers = []
    for maps in stream.maps:
        lost = ~np.isfinite(maps).all(-1) | ~maps.any(-1)
        rows = _reference_entropy(np.where(lost[..., None], 0.0, maps))
        layers.append(np.where(lost, math.nan, rows))
    rows = np.stack(layers, -1)  # [B W, H, Q, L]
    per_image = rows.reshape(stream.images, -1, *rows.shape[1:])
    largest = math.log(stream.maps.shape[-1]) or math.nan
    by_head = _over(rows, (0, 2)).T
    return {
        "entropy": _pooled(per_image),
        "normalized_entropy": _pooled(per_image / largest),
        "entropy_by_head": by_head,
        "normalized_entropy_by_head": by_head / largest,
        "attention_entropy_absent": np.isnan(rows).mean((0, 1, 2)),
    }


def _cross_head(stream: Maps) -> dict[str, object]:
    with np.errstate(invalid="ignore"):
        layers = np.stack([_reference_cross_head(maps) for maps in stream.columns], -1)  # [B, H, H, K, L]
    different = ~np.eye(layers.shape[1], dtype=bool)
    if stream.maps.shape[3] == 1:  # columns of one number
        layers = np.full_like(layers, math.nan)
    pooled = _pooled(layers[:, different])
    unit = _units(stream.columns)  # [L, B, H, Q, K]
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = unit - unit.mean(3, keepdims=True)
        variation = np.sqrt((deviation**2).sum(3))
        varied = np.where((variation >= 1e-4) & (stream.maps.shape[3] > 1), variation, math.nan)[:, :, :, None]
        centred = np.einsum("lbgqk,lbhqk->bghkl", deviation / varied, deviation / varied)
    defined = different.any() and stream.maps.shape[3] > 1
    effective, counted = _effective_heads(stream)
    return {
        "cross_head_similarity": pooled,
        "centred_cross_head_similarity": _pooled(centred[:, different]),
        "head_diversity": Mean(1 - pooled.values, pooled.weights),
        "cross_head_matrix": np.moveaxis(_over(layers, (0, 3)), -1, 0),
        "cross_head_similarity_absent": np.isnan(layers[:, different]).mean((0, 1, 2))
        if defined
        else np.full(layers.shape[-1], math.nan),
        "effective_heads": Mean(effective),
        "effective_heads_absent": 1 - counted,
    }


def _effective_heads(stream: Maps) -> tuple[np.ndarray, np.ndarray]:
    """Exponential of the spectral entropy of the heads' cosines, `[B, L]`, and the share of heads that have any."""
    layers, _, heads = stream.maps.shape[:3]
    by_image = stream.maps.reshape(layers, stream.images, stream.windows, heads, -1)
    out, counted = np.full((stream.images, layers), math.nan), np.zeros((stream.images, layers))
    for b, layer in itertools.product(range(stream.images), range(layers)):
        flat = np.moveaxis(by_image[layer, b], 0, 1).reshape(heads, -1)
        flat = flat[np.isfinite(flat).all(1) & flat.any(1)]
        counted[b, layer] = len(flat) / heads
        if len(flat):
            unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
            shares = np.linalg.eigvalsh(unit @ unit.T) / len(flat)
            out[b, layer] = math.exp(-math.fsum(v * math.log(v) for v in shares if v > 0))
    return out, counted.mean(0)


def _units(columns: np.ndarray) -> np.ndarray:
    """Columns `[..., Q, K]` of norm 1, NaN where they are zero or not finite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = columns / np.abs(columns).max(-2, keepdims=True)
        return scaled / np.sqrt((scaled**2).sum(-2, keepdims=True))


def _cross_layer(stream: Maps) -> dict[str, object]:
    columns = stream.columns
    if columns.shape[3] == 1:  # columns of one number
        twice = _cross_layer(replace(stream, maps=np.repeat(stream.maps, 2, 3)))
        return {name: _absent(name, value) for name, value in twice.items()}
    unit = _units(columns)
    with np.errstate(invalid="ignore"):
        m = np.einsum("pbhqt,rbhqt->bprht", unit, unit)
        deviation = unit - unit.mean(3, keepdims=True)
        variation = np.sqrt((deviation**2).sum(3))
        varied = np.where(variation >= 1e-4, variation, math.nan)[:, :, :, None]
        c = np.einsum("pbhqt,rbhqt->bprht", deviation / varied, deviation / varied)
        different = ~np.eye(stream.images, dtype=bool)
        crossed = np.einsum("pbhqt,rchqt->bcprht", unit, unit)[different]
        there = np.isfinite(crossed)
        independent = np.where(there, crossed, 0.0).sum(0) / there.sum(0)
    exists = np.isfinite(np.diagonal(m, axis1=1, axis2=2))  # [B, H, K, L]
    both = np.einsum("bhkp,bhkq->bpqhk", exists.astype(float), exists.astype(float))
    pairs = there.sum(0).astype(float)
    finite = np.isfinite(columns).all(3)
    place = np.arange(stream.windows * stream.maps.shape[-1]) % stream.maps.shape[-1]
    parts = {"": place >= 0}
    if 0 < stream.prefix_tokens < stream.maps.shape[-1]:
        parts |= {"_prefix": place < stream.prefix_tokens, "_patch": place >= stream.prefix_tokens}
    out: dict[str, object] = {}
    for end, keys in parts.items():
        similarity = _pooled_pairs(m[..., keys])
        out[f"similarity{end}"] = similarity
        out[f"centred{end}"] = _pooled_pairs(c[..., keys])
        with np.errstate(invalid="ignore"):
            out[f"centred{end}_absent"] = 1 - np.isfinite(c[..., keys]).sum((0, 3, 4)) / both[..., keys].sum((0, 3, 4))
            part = np.nansum((independent * pairs)[..., keys], (2, 3)) / pairs[..., keys].sum((2, 3))
        out[f"image_independent{end}"] = part
        out[f"excess{end}"] = similarity.mean_and_error()[0] - part
        out[f"relative_variation{end}"] = _pooled(np.moveaxis(variation[..., keys], 0, -1))
    with np.errstate(invalid="ignore"):
        out["image_independent_by_head"] = np.nansum(independent * pairs, 3) / pairs.sum(3)
        out["image_independent_by_token"] = np.nansum(independent * pairs, 2) / pairs.sum(2)
    edges = np.linspace(-1, 1, 401)
    return out | {
        "relative_variation_by_head": _over(variation, (1, 3)),
        "similarity_by_head": _over(m, (0, 4)),
        "similarity_by_token": _over(m, (0, 3)),
        "centred_by_head": _over(c, (0, 4)),
        "centred_by_token": _over(c, (0, 3)),
        "histogram": [
            [np.histogram(np.clip(v[np.isfinite(v)], -1, 1), edges)[0] for v in row] for row in np.moveaxis(m, 0, -1)
        ],
        "zero_columns": (finite & ~np.moveaxis(exists, -1, 0)).sum((1, 2, 3)),
        "nonfinite_columns": (~finite).sum((1, 2, 3)),
    }


def _absent(name: str, value: object) -> object:
    """Nothing but what counts columns."""
    if name.endswith("_columns"):
        return value
    if isinstance(value, Mean):
        return Mean(np.full_like(value.values, math.nan))
    return np.full(np.shape(value), 0.0 if name == "histogram" else math.nan)


def _pooled_pairs(values: np.ndarray) -> Mean:
    """Each image's mean over heads and keys, from `[B, L, L, H, K]`."""
    present = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return Mean(np.where(present, values, 0.0).sum((3, 4)) / present.sum((3, 4)), present.sum((3, 4)))


def _cross_layer_blocks(stream: Maps) -> dict[str, object]:
    """The same with the image-independent part over the pairs of images within complete blocks of four."""
    out = {name: value for name, value in _cross_layer(stream).items() if not name.startswith("image_independent")}
    similarity = {name: out[name] for name in out if name.startswith("similarity") and "_by_" not in name}
    kept = [np.flatnonzero(stream.index // 4 == block) for block in np.unique(stream.index // 4)]
    kept = [block for block in kept if len(block) == 4]
    place = np.arange(stream.windows * stream.maps.shape[-1]) % stream.maps.shape[-1]
    for name, value in similarity.items():
        end = name.removeprefix("similarity")
        own_part = {"": place >= 0, "_prefix": place < stream.prefix_tokens, "_patch": place >= stream.prefix_tokens}
        parts, owns = [], []
        for block in kept:
            unit = _units(stream.columns[:, block][..., own_part[end]])
            with np.errstate(invalid="ignore"):
                crossed = np.einsum("pbhqt,rchqt->bcprht", unit, unit)[~np.eye(4, dtype=bool)]
            parts.append(_over(crossed, (0, -2, -1)))
            owns.append(value.values[block].mean(0))
        valid = np.isfinite(parts) & np.isfinite(owns) if kept else np.zeros((0, *value.values.shape[1:]), dtype=bool)
        each, own = (np.where(valid, item, 0.0) if kept else valid.astype(float) for item in (parts, owns))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = each.sum(0) / valid.sum(0)
            out[f"image_independent{end}"] = mean
            out[f"excess{end}"] = value.mean_and_error()[0] - mean
            for reading, values in (("image_independent", each), ("excess", own - each)):
                centre = values.sum(0) / valid.sum(0)
                squares = (valid * (values - centre) ** 2).sum(0)
                count = np.where(valid.sum(0) > 1, valid.sum(0), math.nan)
                out[f"{reading}{end}_se"] = np.sqrt(squares / (count - 1) / count)
    return out


# -- maps, head by head ----------------------------------------------------------------------------------------------

Head = Callable[[np.ndarray], dict[str, float]]


def _by_map(stream: Maps, of_head: Head) -> dict[str, np.ndarray]:
    """Numbers of single heads' maps `[Q, K]`, `[B, W, H, L]` each."""
    layers, _, heads, _, _ = stream.maps.shape
    out: dict[str, np.ndarray] = {}
    for layer, b, w, h in itertools.product(range(layers), range(stream.images), range(stream.windows), range(heads)):
        for name, value in of_head(stream.maps[layer, b * stream.windows + w, h]).items():
            place = out.setdefault(name, np.full((stream.images, stream.windows, heads, layers), math.nan))
            place[b, w, h, layer] = value
    return out


def _map_rows(maps: np.ndarray) -> np.ndarray:
    """Rows that count: none of a map that is not finite, and no zero rows."""
    return maps[maps.any(-1)] if np.isfinite(maps).all() else maps[:0]


def _sinks(stream: Maps) -> dict[str, object]:
    prefix, keys = stream.prefix_tokens, stream.maps.shape[-1]
    both = 0 < prefix < keys
    names = ["sink_share", "sink_strength", "constant_rows"]
    if both:
        names += ["prefix_attention", "sink_share_prefix", "sink_share_patch"]

    def of_head(maps: np.ndarray) -> dict[str, float]:
        rows = _map_rows(maps)
        if not len(rows):
            return dict.fromkeys(names, math.nan)
        received = [math.fsum(rows[:, k]) / len(rows) for k in range(keys)]
        energy = math.fsum(v * v for v in rows.ravel()) / len(rows)
        values = [float(max(received) > 0.3), max(received), math.fsum(a * a for a in received) / energy]
        if both:
            values += [
                math.fsum(received[:prefix]), float(max(received[:prefix]) > 0.3), float(max(received[prefix:]) > 0.3),
            ]  # fmt: skip
        return dict(zip(names, values, strict=True))

    found = _by_map(stream, of_head)
    received = np.full((stream.maps.shape[0], stream.windows, keys), math.nan)
    for layer, w in itertools.product(range(len(received)), range(stream.windows)):
        maps = stream.maps[layer, w :: stream.windows].reshape(-1, *stream.maps.shape[-2:])
        kept = [_map_rows(item).mean(0) for item in maps if len(_map_rows(item))]
        received[layer, w] = np.mean(kept, 0) if kept else math.nan
    return {name: _pooled(value) for name, value in found.items()} | {
        "sink_share_by_head": _over(found["sink_share"], (0, 1)).T,
        "constant_rows_by_head": _over(found["constant_rows"], (0, 1)).T,
        "attention_received_by_token": received.reshape(len(received), -1),
        "attention_sinks_absent": np.isnan(found["sink_share"]).mean((0, 1, 2)),
    }


def _map_rank(stream: Maps) -> dict[str, object]:
    def of_head(maps: np.ndarray) -> dict[str, float]:
        if not np.isfinite(maps).all() or not maps.any():
            return {"effective_rank": math.nan, "stable_rank": math.nan}
        values = np.linalg.svd(maps / np.abs(maps).max(), compute_uv=False)
        shares = [value / values.sum() for value in values]
        entropy = -math.fsum(share * math.log(share) for share in shares if share > 0)
        return {"effective_rank": math.exp(entropy), "stable_rank": (values**2).sum() / values.max() ** 2}

    found = _by_map(stream.select(np.flatnonzero(stream.index < 8)), of_head)
    out: dict[str, object] = {name: _pooled(value) for name, value in found.items()}
    out |= {f"{name}_by_head": _over(value, (0, 1)).T for name, value in found.items()}
    return out | {"map_rank_absent": np.isnan(found["stable_rank"]).mean((0, 1, 2))}


def _attention_distance(stream: Maps) -> dict[str, object]:
    assert stream.grid is not None
    width, prefix = stream.grid[1], stream.prefix_tokens
    patches = stream.maps.shape[-1] - prefix

    def reach(values: np.ndarray, query: int, size: tuple[float, float]) -> float:
        total = math.fsum(values[prefix:]) if np.isfinite(values).all() else 0.0
        if total <= 0:
            return math.nan
        down, right = divmod(query, width)
        return math.fsum(
            weight * math.hypot((j // width - down) * size[0], (j % width - right) * size[1]) / total
            for j, weight in enumerate(values[prefix:])
        )

    def rows(size: tuple[float, float]) -> np.ndarray:  # [L, B, H, i]
        queries = range(patches)
        return np.array(
            [[[[reach(head[prefix + i], i, size) for i in queries] for head in image] for image in layer]
             for layer in stream.maps]
        )  # fmt: skip

    in_patches = rows((1.0, 1.0))
    return {
        "attention_distance": _pooled(np.moveaxis(in_patches, 0, -1)),
        "attention_distance_pixels": _pooled(np.moveaxis(rows(PATCH_SIZE), 0, -1)),
        "attention_distance_by_head": _over(in_patches, (1, 3)),
        "attention_distance_absent": np.isnan(in_patches).mean((1, 2, 3)),
    }


def _rows_of_finite_heads(stream: Maps) -> np.ndarray:
    """The maps `[L, B, W, H, Q, K]` with NaN for every row of a map that is not finite, and for zero rows."""
    finite = np.isfinite(stream.maps).all((-1, -2), keepdims=True)
    maps = np.where(finite, stream.maps, math.nan)
    maps = np.where(np.nan_to_num(maps).any(-1, keepdims=True), maps, math.nan)
    layers, _, *rest = maps.shape
    return maps.reshape(layers, stream.images, stream.windows, *rest)


def _head_divergence(stream: Maps) -> dict[str, object]:
    maps = _rows_of_finite_heads(stream)
    layers, images, windows, heads, queries, _ = maps.shape

    def entropy(values: np.ndarray) -> float:
        return -math.fsum(v * math.log(v) for v in values if v > 0)

    out = np.full((images, windows, queries, heads, heads, layers), math.nan)
    for layer, b, w, q in itertools.product(range(layers), range(images), range(windows), range(queries)):
        for g, h in itertools.product(range(heads), repeat=2):
            one, other = maps[layer, b, w, g, q], maps[layer, b, w, h, q]
            if np.isfinite(one).all() and np.isfinite(other).all():
                mixed = entropy((one + other) / 2)
                out[b, w, q, g, h, layer] = mixed - (entropy(one) + entropy(other)) / 2
    upper = np.triu(np.ones((heads, heads), dtype=bool), 1)
    return {
        "head_divergence": _pooled(out[..., upper, :]),
        "head_divergence_matrix": np.moveaxis(_over(out, (0, 1, 2)), -1, 0),
        "head_divergence_absent": np.isnan(maps[..., 0]).mean((1, 2, 3, 4)),
    }


def _total_variation(stream: Maps) -> dict[str, object]:
    maps = _rows_of_finite_heads(stream)
    layers, images = maps.shape[:2]
    out = np.full((images, layers, layers, 1, maps[0, 0, ..., 0].size), math.nan)
    for b, p, q in itertools.product(range(images), range(layers), range(layers)):
        out[b, p, q, 0] = [
            1 - math.fsum(row) / 2 for row in np.abs(maps[p, b] - maps[q, b]).reshape(-1, maps.shape[-1])
        ]
    return {
        "tv_similarity": _pooled_pairs(out),
        "total_variation_similarity_absent": np.isnan(maps[..., 0]).mean((1, 2, 3, 4)),
    }


# -- tokens, image by image ------------------------------------------------------------------------------------------

OneImage = Callable[[np.ndarray], float]


def _per_image(stream: Stream, one: OneImage) -> Mean:
    """The mean over images of a number of each one's features `[T, C]`; none of those that are not finite."""
    values = np.full((stream.images, len(stream.tokens)), math.nan)
    for b, layer in itertools.product(range(stream.images), range(len(stream.tokens))):
        features = stream.tokens[layer, b]
        if np.isfinite(features).all():
            values[b, layer] = one(features)
    return Mean(values)


def _lost(mean: Mean) -> np.ndarray:
    return np.isnan(mean.values).mean(0)


def _typical(stream: Stream, features: np.ndarray) -> list[int]:
    return _reference_typical(features, stream.prefix_tokens, HIGH_NORM_RATIO)


def _rank_residual(stream: Stream) -> dict[str, object]:
    def ratio(number: int, typical: bool) -> OneImage:
        def one(features: np.ndarray) -> float:
            features = features[_typical(stream, features)] if typical else features
            return _reference_rank_residual(features)[number] if features.any() else math.nan

        return one

    out: dict[str, object] = {}
    for number, kind in enumerate(("", "_frobenius")):
        for typical in (False, True):
            out[f"rank_residual{kind}{'_typical' * typical}"] = _per_image(stream, ratio(number, typical))
    return out | {"rank_residual_absent": _lost(out["rank_residual"])}


def _token_similarity(stream: Stream) -> dict[str, object]:
    prefix = stream.prefix_tokens

    def one(features: np.ndarray, kept: list[int]) -> float:
        rows = features[[t for t in kept if t >= prefix]]
        return _reference_token_similarity(rows) if rows.any(-1).sum() > 1 else math.nan

    every = _per_image(stream, lambda features: one(features, list(range(len(features)))))
    zero = (stream.tokens[:, :, prefix:] == 0).all(-1)
    left = (~zero & np.isfinite(every.values).T[..., None]).mean((1, 2))
    return {
        "token_similarity": every,
        "token_similarity_typical": _per_image(stream, lambda features: one(features, _typical(stream, features))),
        "zero_tokens": zero.sum((1, 2)),
        "token_similarity_absent": 1 - left,
    }


def _token_norms(stream: Stream) -> dict[str, object]:
    prefix = stream.prefix_tokens

    def reading(of: Callable[[np.ndarray, float], float]) -> Mean:
        def one(features: np.ndarray) -> float:
            median = _reference_median_norm(features, prefix)
            return of(np.array(_reference_norms(features)), median) if median > 0 else math.nan

        return _per_image(stream, one)

    tokens = stream.tokens.shape[2]
    by_token = [reading(lambda norms, median, t=t: norms[t] / median).mean_and_error()[0] for t in range(tokens)]
    out = {
        "outlier_share": reading(lambda norms, median: float(np.mean(norms[prefix:] > HIGH_NORM_RATIO * median))),
        "largest_norm_ratio": reading(lambda norms, median: max(norms[prefix:]) / median),
        "prefix_norm_ratio": reading(lambda norms, median: max(norms[:prefix]) / median if prefix else math.nan),
        "median_norm": reading(lambda _, median: median),
    }
    return out | {
        "norm_ratio_by_token": np.stack(by_token, -1),
        "nonfinite_tokens": (~np.isfinite(stream.tokens).all(-1)).sum((1, 2)),
        "token_norms_absent": _lost(out["median_norm"]),
    }


def _low_pass(stream: Stream) -> dict[str, object]:
    ratio = _per_image(stream, lambda x: _reference_high_to_low(x) if x.mean(0).any() else math.nan)
    return {"high_to_low_ratio": ratio, "low_pass_absent": _lost(ratio)}


def _feature_spectrum(stream: Stream) -> dict[str, object]:
    assert stream.grid is not None
    prefix, count = stream.prefix_tokens, math.ceil(min(stream.grid) / 2)
    means = [
        _per_image(
            stream,
            lambda x, f=f: _reference_log_amplitudes(x[prefix:], stream.grid)[f] if x[prefix:].any() else math.nan,
        )
        for f in range(count)
    ]
    return {
        "relative_log_amplitude_by_frequency": np.stack([mean.mean_and_error()[0] for mean in means], -1),
        "high_frequency_log_amplitude": means[-1],
        "feature_spectrum_absent": _lost(means[-1]),
    }


def _branch_share(stream: Stream) -> dict[str, object]:
    finite = np.isfinite(stream.shares)
    out: dict[str, object] = {"branch_share_absent": 1 - finite.all(0).mean((1, 2))}
    for name, shares, there in zip(("attention", "mlp"), stream.shares, finite, strict=True):
        with np.errstate(invalid="ignore"):
            means = np.where(there, shares, 0.0).sum(-1) / there.sum(-1)
        out[f"{name}_branch_share"] = Mean(means.T, there.sum(-1).T)
    return out


def _feature_similarity(stream: Stream) -> dict[str, object]:
    layers, images = stream.tokens.shape[:2]
    values, weights = np.full((2, images, layers, layers), math.nan)
    exists = np.isfinite(stream.tokens).all((-1, -2))[..., None] & stream.tokens.any(-1)  # [L, B, T]
    for b, p, q in itertools.product(range(images), range(layers), range(layers)):
        weights[b, p, q] = (exists[p, b] & exists[q, b]).sum()
        if weights[b, p, q]:
            values[b, p, q] = _reference_feature_similarity(stream.tokens[[p, q], b])[0, 1]
    return {
        "feature_similarity": Mean(values, weights),
        "feature_similarity_to_last": Mean(values[..., -1], weights[..., -1]),
        "feature_similarity_absent": 1 - exists.mean((1, 2)),
    }


def _cka(stream: Stream) -> dict[str, object]:
    layers, images = stream.tokens.shape[:2]
    finite = np.isfinite(stream.tokens).all((-1, -2))
    chunks = [np.flatnonzero(stream.index // 8 == chunk) for chunk in np.unique(stream.index // 8)]
    value, error = np.full((2, layers, layers), math.nan)
    for p, q in itertools.product(range(layers), repeat=2):
        terms = []
        for chunk in chunks:
            kept = [b for b in chunk if finite[p, b] and finite[q, b]]
            if len(kept) >= 4:
                one, other = (_reference_gram(stream.tokens[side, kept].reshape(len(kept), -1)) for side in (p, q))
                terms.append((_reference_hsic(one, other), _reference_hsic(one, one), _reference_hsic(other, other)))
        both, own, own_other = np.mean(terms, 0) if terms else (0.0, 0.0, 0.0)
        if own > 0 and own_other > 0:
            value[p, q] = both / math.sqrt(own * own_other)
            parts = [c / both - a / own / 2 - b / own_other / 2 for c, a, b in terms]
            if len(terms) > 1:
                error[p, q] = abs(value[p, q]) * np.std(parts, ddof=1) / math.sqrt(len(terms))
    used = [sum(n for c in chunks if (n := finite[layer, c].sum()) >= 4) for layer in range(layers)]
    return {
        "cka": value,
        "cka_se": error,
        "cka_images_left_out": sum(len(chunk) for chunk in chunks if len(chunk) < 4),
        "cka_absent": 1 - np.array(used) / images,
    }


_CROSS_LAYER_BOUNDS = {
    "similarity*": COSINE,
    "centred*_absent": SHARE,
    "centred*": COSINE,
    "image_independent*_low": ANY,
    "image_independent*_high": ANY,
    "image_independent*": COSINE,
    "excess*_low": ANY,
    "excess*_high": ANY,
    "excess*": (-2.0, 2.0),
    "relative_variation*": SHARE,
    "histogram": COUNT,
    "*_columns": COUNT,
}
_CROSS_LAYER_EXACT = {
    "uniform": {"similarity": 1.0, "centred": math.nan, "centred_absent": 1.0, "relative_variation": 0.0},
    "equal_rows": {"similarity": 1.0, "centred": math.nan, "relative_variation": 0.0},
    "identical_layers": {"similarity": 1.0, "centred": 1.0},
}

CASES = [
    Case(
        AttentionSinks,
        _sinks,
        {"sink_*": SHARE, "constant_rows*": SHARE, "prefix_attention": SHARE, "attention_received_by_token": SHARE},
        exact={
            "uniform": {"sink_share": 0.0, "sink_strength": 1 / TOKENS, "constant_rows": 1.0},
            "one_hot": {"sink_share": 1.0, "sink_strength": 1.0, "sink_share_prefix": 0.0, "constant_rows": 1.0},
            "permutation": {"sink_share": 0.0, "constant_rows": 1 / TOKENS},
        },
    ),
    Case(
        MapRank,
        _map_rank,
        {"*_rank*": (1.0, _smaller_side)},
        exact={
            "uniform": {"*_rank": 1.0},
            "equal_rows": {"*_rank": 1.0},
            "one_hot": {"*_rank": 1.0},
            "permutation": {"*_rank*": float(TOKENS)},
        },
    ),
    Case(
        MeanAttentionDistance,
        _attention_distance,
        {"attention_distance_pixels": COUNT, "attention_distance*": COUNT},
        exact={"identity": {"attention_distance": 0.0, "attention_distance_pixels": 0.0}},
    ),
    Case(
        HeadDivergence,
        _head_divergence,
        {"head_divergence*": (0.0, math.log(2))},
        exact={"uniform": {"head_divergence": 0.0}, "identical_heads": {"head_divergence*": 0.0}},
    ),
    Case(
        TotalVariationSimilarity,
        _total_variation,
        {"tv_similarity": SHARE},
        exact={
            "uniform": {"tv_similarity": 1.0},
            "identical_layers": {"tv_similarity": 1.0},
        },
    ),
    Case(
        RankResidual,
        _rank_residual,
        {"rank_residual_frobenius*": SHARE, "rank_residual*": COUNT},
        exact={"identical_tokens": {"rank_residual": 0.0, "rank_residual_frobenius*": 0.0}},
    ),
    Case(
        TokenSimilarity,
        _token_similarity,
        {"token_similarity*": COSINE, "zero_tokens": COUNT},
        exact={
            "identical_tokens": {"token_similarity*": 1.0, "token_similarity_absent": 0.0},
            "orthogonal_tokens": {"token_similarity": 0.0},
        },
    ),
    Case(
        TokenNorms,
        _token_norms,
        {"outlier_share": SHARE, "largest_norm_ratio": (1.0, math.inf), "*": COUNT},
        exact={"identical_tokens": {"outlier_share": 0.0, "*_ratio*": 1.0}},
    ),
    Case(LowPass, _low_pass, {"*": COUNT}, exact={"identical_tokens": {"high_to_low_ratio": 0.0}}),
    Case(FeatureSpectrum, _feature_spectrum, {"*": ANY}),
    Case(BranchShare, _branch_share, {"*": COUNT}),
    Case(
        FeatureSimilarity,
        _feature_similarity,
        {"feature_similarity*": COSINE},
        exact={
            "identical_layers": {"feature_similarity": 1.0, "feature_similarity_to_last": 1.0},
            "scaled_layers": {"feature_similarity": 1.0},
        },
    ),
    Case(
        CenteredKernelAlignment,
        _cka,
        {"cka": ANY, "cka_images_left_out": COUNT},
        axes={"cka_images_left_out": ""},
        rounding=("identical_images",),
        exact={
            "identical_layers": {"cka": 1.0},
            "scaled_layers": {"cka": 1.0},
            "identical_images": {"cka": math.nan},
            "three_images": {"cka": math.nan, "cka_absent": 1.0},
        },
    ),
    Case(
        AttentionEntropy,
        _entropy,
        {"entropy*": (0.0, _log_keys), "normalized_entropy*": SHARE},
        exact={
            "uniform": {"normalized_entropy*": 1.0},
            "one_hot": {"entropy*": 0.0},
            "permutation": {"entropy*": 0.0},
        },
    ),
    Case(
        CrossHeadSimilarity,
        _cross_head,
        {"*cross_head*": COSINE, "head_diversity": (0.0, 2.0), "effective_heads": (1.0, lambda sizes: sizes["H"])},
        exact={
            "uniform": {"head_diversity": 0.0, "centred_cross_head_similarity": math.nan, "effective_heads": 1.0},
            "identical_heads": {"head_diversity": 0.0, "centred_cross_head_similarity": 1.0, "effective_heads": 1.0},
            "single_head": {"cross_head_similarity": math.nan, "effective_heads": 1.0},
        },
    ),
    Case(
        CrossLayerSimilarity,
        _cross_layer,
        _CROSS_LAYER_BOUNDS,
        exact=_CROSS_LAYER_EXACT,
        axes={"image_independent_by_head": "L L H", "image_independent_by_token": "L L K"},
        steps=("histogram",),
        unreferenced=("image_independent*_se", "excess*_se", "*_low", "*_high"),
        absent="nonfinite_columns",
    ),
    Case(
        CrossLayerSimilarity,
        _cross_layer_blocks,
        _CROSS_LAYER_BOUNDS,
        exact=_CROSS_LAYER_EXACT,
        options={"pair_budget": 0},
        steps=("histogram",),
        unreferenced=("*_low*", "*_high*"),
        absent="nonfinite_columns",
    ),
]
