"""Attention rollout: attention followed from an output token down through all layers to the patches.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020, arXiv 2005.00928), section 3: maps are averaged
over heads, half an identity stands for the residual connection, rows are normalised, and layers are multiplied,

    R_l = A'_l R_{l-1},    A'_l = rows of (0.5 A_l + 0.5 I), normalised,    R_0 = I.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.look import LayerLook, Look, Token


def rollout(maps: Sequence[NDArray[np.floating]], start: NDArray[np.floating]) -> NDArray[np.float64]:
    """The rollout after each of L layers, seen from some output tokens.

    Args:
        maps: of the layers in order, each ``[T, T]``, non-negative, mean over heads.
        start: weights of the output tokens, ``[T]``, summing to 1; for one token its row of the identity.

    Returns:
        ``[L, T]``, float64: row l is `start` times R of the layers 0..l. Rows sum to 1.
    """
    rows = []
    for depth in range(1, len(maps) + 1):
        row = np.asarray(start, dtype=np.float64)
        for attention in reversed(maps[:depth]):
            # (0.5 A + 0.5 I) with normalised rows, without ever standing in memory; a masked row of A sums to 0
            row = row / (0.5 + 0.5 * attention.sum(1, dtype=np.float64))
            row = 0.5 * row + 0.5 * (row @ attention.astype(np.float64))
        rows.append(row)
    return np.array(rows)


def attention_rollout(look: Look, query: Token) -> tuple[list[LayerLook], NDArray[np.float64]]:
    """The layers that rollout runs through, and the rollout after each of them, ``[L, T]``, seen from a query.

    Raises:
        UsageError: the maps of this model cannot be multiplied, or there is no such query.
    """
    layers = _chain(look)
    return layers, rollout([layer.mean for layer in layers], layers[0].query_weights(query))


def _chain(look: Look) -> list[LayerLook]:
    """Layers that pass the same tokens on, from the first layer of the model; those that pool the last tokens may
    follow."""
    for name, reason in look.left_out.items():
        raise UsageError(_refusal(f"{name} is not among them: {reason}"))
    known = list(look.layers.values())
    chain = [layer for layer in known if layer.kind == "token"]
    if not chain:
        raise UsageError(_refusal("here no layer lets tokens attend to tokens"))
    first = chain[0]
    for layer in known:
        if layer.kind != "token" and layer.number < chain[-1].number:
            raise UsageError(_refusal(f"{layer.name} passes on a single token ({layer.kind} attention)"))
    for layer in chain:
        if layer.queries != layer.keys:
            raise UsageError(_refusal(f"{layer.name} has {layer.queries} queries and {layer.keys} keys"))
        if (layer.keys, layer.prefix_tokens, layer.grid) != (first.keys, first.prefix_tokens, first.grid):
            raise UsageError(_refusal(f"{first.name} has {first.keys} tokens and {layer.name} other {layer.keys}"))
        if not layer.is_probability:
            raise UsageError(
                _refusal(f"those of {layer.name} were mixed after the softmax and are no probabilities")
                + " Look at the maps underneath: attention='softmax'."
            )
    blocks = [layer.block for layer in chain if layer.block is not None]
    for block in blocks:
        if blocks.count(block) > 1:
            raise UsageError(_refusal(f"{block} holds {blocks.count(block)} layers side by side"))
    return chain


def _refusal(why: str) -> str:
    return f"Rollout multiplies the maps of all layers, and {why}."
