"""The least that cross-layer similarity of queries and keys can cost."""

from __future__ import annotations

from typing import NamedTuple


class Floors(NamedTuple):
    """What the similarities of one image cannot do without.

    Attributes:
        bytes: read once: queries, keys and float32 row normalisers of every layer.
        operations: additions and multiplications: logits, and products of all unordered pairs of layers, a layer with
            itself among them. Exponentials are not counted.
    """

    bytes: int
    operations: int


def floors(layers: int, heads: int, queries: int, keys: int, dim: int, element_bytes: int) -> Floors:
    """Floors of M for one image.

    Args:
        layers: L.
        heads: H of each layer.
        queries: Q of each head.
        keys: K of each head.
        dim: channels of a head.
        element_bytes: bytes of an entry of queries and keys: 2 in half precision.
    """
    read = layers * heads * ((queries + keys) * dim * element_bytes + 4 * queries)
    logits = 2 * layers * dim
    products = layers * (layers + 1)
    return Floors(read, heads * queries * keys * (logits + products))
