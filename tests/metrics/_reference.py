"""Naive float64 references: plain loops over NumPy arrays, sharing no code with what they check."""

from __future__ import annotations

import itertools
import math

import numpy as np


def _reference_cosine(a, b):
    """Cosine of two vectors after dividing each by its largest entry; NaN for a zero vector."""
    if np.max(np.abs(a)) == 0 or np.max(np.abs(b)) == 0:
        return math.nan
    a = a / np.max(np.abs(a))
    b = b / np.max(np.abs(b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _reference_variation(a):
    if np.max(np.abs(a)) == 0:
        return math.nan
    a = a / np.max(np.abs(a))
    return math.sqrt(sum((a - a.mean()) ** 2) / sum(a**2))


def _reference_similarity(maps):
    """M[b, p, q, h, t] from maps [L, B, H, Q, K] (DeepViT, equation 2)."""
    layers, images, heads, _, keys = maps.shape
    out = np.full((images, layers, layers, heads, keys), math.nan)
    for b, p, q, h, t in itertools.product(range(images), range(layers), range(layers), range(heads), range(keys)):
        out[b, p, q, h, t] = _reference_cosine(maps[p, b, h, :, t], maps[q, b, h, :, t])
    return out


def _reference_centred(maps, min_variation=1e-4):
    layers, images, heads, _, keys = maps.shape
    out = np.full((images, layers, layers, heads, keys), math.nan)
    for b, p, q, h, t in itertools.product(range(images), range(layers), range(layers), range(heads), range(keys)):
        one, other = maps[p, b, h, :, t], maps[q, b, h, :, t]
        if min(_reference_variation(one), _reference_variation(other)) >= min_variation:
            out[b, p, q, h, t] = _reference_cosine(one - one.mean(), other - other.mean())
    return out


def _reference_image_independent(maps):
    """Mean over ordered pairs of different images: [L, L, H, K], by comparing every pair."""
    layers, images, heads, _, keys = maps.shape
    out = np.full((layers, layers, heads, keys), math.nan)
    for p, q, h, t in itertools.product(range(layers), range(layers), range(heads), range(keys)):
        values = [
            _reference_cosine(maps[p, b, h, :, t], maps[q, c, h, :, t])
            for b in range(images)
            for c in range(images)
            if b != c
        ]
        values = [value for value in values if not math.isnan(value)]
        if values:
            out[p, q, h, t] = sum(values) / len(values)
    return out


def _reference_cross_head(attention):
    """[B, H, H, K] from one layer's map [B, H, Q, K]."""
    images, heads, _, keys = attention.shape
    out = np.full((images, heads, heads, keys), math.nan)
    for b, g, h, t in itertools.product(range(images), range(heads), range(heads), range(keys)):
        out[b, g, h, t] = _reference_cosine(attention[b, g, :, t], attention[b, h, :, t])
    return out


def _reference_entropy(attention):
    """[B, H, Q] in nats from [B, H, Q, K]."""
    images, heads, queries, _ = attention.shape
    out = np.zeros((images, heads, queries))
    for b, h, i in itertools.product(range(images), range(heads), range(queries)):
        out[b, h, i] = -sum(a * math.log(a) for a in attention[b, h, i] if a > 0)
    return out


def _reference_columns(maps, windows):
    """Maps [L, B W, H, Q, K] with the columns of an image's windows side by side: [L, B, H, Q, W K]."""
    layers, batch, heads, queries, keys = maps.shape
    out = np.full((layers, batch // windows, heads, queries, windows * keys), math.nan)
    for b, w, k in itertools.product(range(batch // windows), range(windows), range(keys)):
        out[:, b, :, :, w * keys + k] = maps[:, b * windows + w, :, :, k]
    return out


def peaked_maps(layers=3, images=8, heads=2, queries=7, keys=7, seed=0, negative=False):
    """Non-degenerate maps [L, B, H, Q, K]: peaked softmax rows with a part shared by images and by layers."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(1, 1, heads, queries, keys))
    logits = 1.5 * shared + rng.normal(size=(layers, images, heads, queries, keys)) * 1.2
    maps = np.exp(logits - logits.max(-1, keepdims=True))
    maps /= maps.sum(-1, keepdims=True)
    return maps - 0.1 if negative else maps
