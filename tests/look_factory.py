"""Synthetic looks with plausible maps, for everything that draws one."""

from __future__ import annotations

import numpy as np

from collapse_probe.look import LayerLook, Look


def make_look(
    layers: int = 12,
    heads: int = 3,
    grid: tuple[int, int] = (7, 7),
    prefix: int = 1,
    class_token: bool = True,
    signed: bool = False,
    seed: int = 0,
) -> Look:
    """Token attention whose columns become one pattern in later layers, over a picture of two discs."""
    draw = np.random.default_rng(seed)
    tokens = prefix + grid[0] * grid[1]
    shared = draw.random((heads, tokens, tokens)) ** 6 + 0.02
    found: dict[str, LayerLook] = {}
    maps = []
    for number in range(layers):
        weight = number / max(layers - 1, 1)
        own = draw.random((heads, tokens, tokens)) ** 6 + 0.02
        attention = weight * shared + (1 - weight) * own
        attention /= attention.sum(-1, keepdims=True)
        maps.append((attention - signed * 1.2 / tokens).astype(np.float32))
    names = [f"blocks.{number}.attn" for number in range(layers)]
    for number, name in enumerate(names):
        found[name] = LayerLook(
            name, number, "token", heads, prefix, grid, prefix, grid, class_token, not signed,
            mean=maps[number].mean(0), maps=dict(enumerate(maps[number])),
            previous=names[number - 1] if number else None,
            similarity=_cosines(maps[number - 1], maps[number]) if number else None, block=f"blocks.{number}",
        )  # fmt: skip
    return Look(picture(), found, {}, names)


def picture(height: int = 56, width: int = 56) -> np.ndarray:
    """Two discs on a gradient, in colour."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    image = np.stack([0.3 + 0.5 * rows, 0.4 + 0.3 * columns, 0.7 - 0.4 * rows], -1)
    image[(rows - 0.3) ** 2 + (columns - 0.35) ** 2 < 0.03] = (0.9, 0.3, 0.2)
    image[(rows - 0.7) ** 2 + (columns - 0.7) ** 2 < 0.02] = (0.95, 0.9, 0.5)
    return image.astype(np.float32)


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))
