# mypy: ignore-errors
"""What runs on the device, in Triton's language, whose types are not Python's. Needs triton; :mod:`.launch` starts it.

Layers are reached through a table of 64-bit integers, one row per entry of :data:`.layers.ROWS` and one column per
layer, so that one program reads tensors that were never stacked. Sizes in capitals are known when a program is
compiled; those of a tile are powers of two, and what lies beyond the true sizes is masked.

A column of the map is `a = exp(scale q k - log_normalizer)` over all queries. It is produced chunk by chunk of queries
and never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that are the same number by chance shall not make for another program.
_SIZES = ("images", "heads", "layers", "queries", "start", "stop")


@triton.jit
def _tokens(table, FIRST: tl.constexpr, layers, layer, there, image, head, ALIGN: tl.constexpr):
    """Where a head's queries (or keys) begin in each layer, and how far apart they are, in elements."""
    row = table + FIRST * layers + layer
    start = tl.multiple_of(tl.load(row, there, other=0), ALIGN)
    by_image = tl.multiple_of(tl.load(row + layers, there, other=0), ALIGN)
    by_head = tl.multiple_of(tl.load(row + 2 * layers, there, other=0), ALIGN)
    by_token = tl.multiple_of(tl.load(row + 3 * layers, there, other=0), ALIGN)
    return start + image * by_image + head * by_head, by_token


@triton.jit
def _normalizers(table, layers, layer, there, pair, queries):
    """Where a head's normalisers begin in each layer, and the layers' scales."""
    row = table + 8 * layers + layer
    start = tl.load(row, there, other=0) + pair.to(tl.int64) * queries
    return start, tl.load(row + layers, there, other=0).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _products(
    tokens,
    q,
    q_apart,
    k,
    k_apart,
    there,
    query,
    queries,
    key,
    stop,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Products of queries and keys `[rows, query, key]`, 0 for those that are not there."""
    asked = there[:, None] & (query < queries)[None, :]
    known = there[:, None] & (key < stop)[None, :]
    at_query = tokens + q[:, None] + query[None, :] * q_apart[:, None]
    at_key = tokens + k[:, None] + key[None, :] * k_apart[:, None]
    logits = tl.zeros([there.shape[0], query.shape[0], key.shape[0]], tl.float32)
    for first in range(0, DIM, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        if DIM % DEPTH == 0:
            left = tl.load(at_query[:, :, None] + depth[None, None, :], asked[:, :, None], other=0.0)
            right = tl.load(at_key[:, None, :] + depth[None, :, None], known[:, None, :], other=0.0)
        else:
            within = depth < DIM
            left_there, right_there = (
                asked[:, :, None] & within[None, None, :],
                known[:, None, :] & within[None, :, None],
            )
            left = tl.load(at_query[:, :, None] + depth[None, None, :], left_there, other=0.0)
            right = tl.load(at_key[:, None, :] + depth[None, :, None], right_there, other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        logits = tl.dot(left, right, logits, input_precision=PRECISION)
    return logits


@triton.jit
def _probabilities(
    tokens,
    normalizers,
    q,
    q_apart,
    k,
    k_apart,
    normalizer,
    scale,
    there,
    query,
    queries,
    key,
    stop,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Entries `[rows, query, key]` of the maps; 0 for rows and queries that are not there, anything for such keys."""
    logits = _products(
        tokens, q, q_apart, k, k_apart, there, query, queries, key, stop, DIM, DEPTH, PRECISION, WIDEN
    )  # fmt: skip
    asked = there[:, None] & (query < queries)[None, :]
    less = tl.load(normalizers + normalizer[:, None] + query[None, :], asked, other=float("inf"))
    less = tl.where(less == float("-inf"), float("inf"), less)  # a fully masked row has no normaliser: zeros
    return tl.exp(tl.fma(logits, scale[:, None, None], -less[:, :, None]))


@triton.jit(do_not_specialize=_SIZES)
def products_program(
    table,
    tokens,
    normalizers,
    products,
    level,
    variation,
    mean,
    inverse,
    exists,
    finite,
    heads,
    layers,
    queries,
    start,
    stop,
    magnify,
    smallest,
    ALIGN: tl.constexpr,
    DIM: tl.constexpr,
    LAYERS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    GRAM: tl.constexpr,
):
    """The layers' Gram matrices for a few keys of one head of one image.

    One pass over the queries: columns are shifted by their mean over the first chunk, and what the true mean differs
    from it is taken from the products at the end. No product is larger than queries / QUERIES of what is left.
    """
    blocks = tl.cdiv(stop - start, KEYS)
    pair = tl.program_id(0) // blocks
    layer = tl.arange(0, LAYERS)
    there = layer < layers
    key = start + (tl.program_id(0) % blocks) * KEYS + tl.arange(0, KEYS)
    image, head = pair // heads, pair % heads
    q, q_apart = _tokens(table, 0, layers, layer, there, image, head, ALIGN)
    k, k_apart = _tokens(table, 4, layers, layer, there, image, head, ALIGN)
    normalizer, scale = _normalizers(table, layers, layer, there, pair, queries)

    shift = tl.zeros([LAYERS, KEYS], tl.float32)
    total = tl.zeros([LAYERS, KEYS], tl.float32)
    peak = tl.zeros([LAYERS, KEYS], tl.float32)
    gram = tl.zeros([KEYS, LAYERS, LAYERS], tl.float32)
    for first in range(0, queries, QUERIES):
        query = first + tl.arange(0, QUERIES)
        column = _probabilities(
            tokens, normalizers, q, q_apart, k, k_apart, normalizer, scale, there, query, queries, key, stop,
            DIM, DEPTH, PRECISION, WIDEN,
        )  # fmt: skip
        column *= magnify  # a power of two: squares of small columns stay within float32
        peak = tl.maximum(peak, tl.max(column, 1))
        if first == 0:
            shift = tl.sum(column, 1) / tl.minimum(queries, QUERIES)
        shifted = tl.where((query < queries)[None, :, None], column - shift[:, None, :], 0.0)
        total += tl.sum(shifted, 1)
        gram = tl.dot(tl.permute(shifted, (2, 0, 1)), tl.permute(shifted, (2, 1, 0)), gram, input_precision=GRAM)

    beyond = tl.trans(total / queries)  # the mean less the shift: [KEYS, LAYERS], as everything below
    centre = tl.trans(shift) + beyond
    gram -= (beyond * queries)[:, :, None] * beyond[:, None, :]
    same = layer[:, None] == layer[None, :]
    spread = tl.maximum(tl.sum(tl.where(same[None, :, :], gram, 0.0), 2), 0.0)
    whole = tl.abs(centre) < float("inf")  # False for NaN, too
    found = whole & (tl.trans(peak) >= smallest) & there[None, :]
    norm = tl.sqrt(tl.where(found, spread + queries * centre * centre, 1.0))
    scaled = tl.where(found, 1.0 / norm, 0.0)
    both = found[:, :, None] & found[:, None, :]
    gram = tl.where(both, gram * scaled[:, :, None] * scaled[:, None, :], 0.0)

    at = (pair * (stop - start).to(tl.int64) + key - start)[:, None] * layers + layer[None, :]
    inside = (key < stop)[:, None] & there[None, :]
    tl.store(level + at, tl.where(found, centre * tl.sqrt(queries.to(tl.float32)) * scaled, 0.0), inside)
    tl.store(variation + at, tl.where(found, tl.sqrt(spread) * scaled, 0.0), inside)
    tl.store(mean + at, tl.where(found, centre / magnify, 0.0), inside)
    tl.store(inverse + at, scaled * magnify, inside)
    tl.store(exists + at, found.to(tl.uint8), inside)
    tl.store(finite + at, whole.to(tl.uint8), inside)
    at = at[:, :, None] * layers + layer[None, None, :]
    tl.store(products + at, gram, inside[:, :, None] & there[None, None, :])


@triton.jit
def _unit(mean, inverse, column, query, queries, at, inside):
    """Deviations `(a - mean) / |a|`, zero for absent columns; `at` says where a layer's and key's numbers lie."""
    centre, scaled = tl.load(mean + at, inside, other=0.0), tl.load(inverse + at, inside, other=0.0)
    used = (query < queries)[None, :, None] & (scaled > 0.0)[:, None, :]
    return tl.where(used, (column - centre[:, None, :]) * scaled[:, None, :], 0.0)


@triton.jit(do_not_specialize=_SIZES)
def images_program(
    table,
    tokens,
    normalizers,
    mean,
    inverse,
    partial,
    images,
    heads,
    layers,
    queries,
    start,
    stop,
    ALIGN: tl.constexpr,
    DIM: tl.constexpr,
    LAYERS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    GRAM: tl.constexpr,
):
    """Products of two images' deviations, summed over STEPS * KEYS keys of one head and all queries."""
    head = tl.program_id(1)
    one, other = tl.full([], 0, tl.int32), tl.program_id(2) + 1
    while other >= images:
        one += 1
        other += one + 1 - images
    layer = tl.arange(0, LAYERS)
    there = layer < layers
    q, q_apart = _tokens(table, 0, layers, layer, there, one, head, ALIGN)
    k, k_apart = _tokens(table, 4, layers, layer, there, one, head, ALIGN)
    normalizer, scale = _normalizers(table, layers, layer, there, one * heads + head, queries)
    q_other, _ = _tokens(table, 0, layers, layer, there, other, head, ALIGN)
    k_other, _ = _tokens(table, 4, layers, layer, there, other, head, ALIGN)
    normalizer_other, _ = _normalizers(table, layers, layer, there, other * heads + head, queries)
    apart = (other - one) * heads.to(tl.int64) * (stop - start) * layers  # from one image's numbers to the other's

    gram = tl.zeros([LAYERS, LAYERS], tl.float32)
    first_key = start + tl.program_id(0) * STEPS * KEYS
    for block in range(first_key, tl.minimum(stop, first_key + STEPS * KEYS), KEYS):
        key = block + tl.arange(0, KEYS)
        at = ((one * heads + head).to(tl.int64) * (stop - start) + key - start)[None, :] * layers + layer[:, None]
        inside = there[:, None] & (key < stop)[None, :]
        for first in range(0, queries, QUERIES):
            query = first + tl.arange(0, QUERIES)
            column = _probabilities(
                tokens, normalizers, q, q_apart, k, k_apart, normalizer, scale, there, query, queries, key, stop,
                DIM, DEPTH, PRECISION, WIDEN,
            )  # fmt: skip
            left = tl.reshape(_unit(mean, inverse, column, query, queries, at, inside), [LAYERS, QUERIES * KEYS])
            column = _probabilities(
                tokens, normalizers, q_other, q_apart, k_other, k_apart, normalizer_other, scale, there, query,
                queries, key, stop, DIM, DEPTH, PRECISION, WIDEN,
            )  # fmt: skip
            right = _unit(mean, inverse, column, query, queries, at + apart, inside)
            right = tl.trans(tl.reshape(right, [LAYERS, QUERIES * KEYS]))
            gram = tl.dot(left, right, gram, input_precision=GRAM)
    place = (tl.program_id(2) * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)
    at = (place.to(tl.int64) * layers + layer)[:, None] * layers + layer[None, :]
    tl.store(partial + at, gram, there[:, None] & there[None, :])


@triton.jit(do_not_specialize=_SIZES)
def sums_program(
    table,
    tokens,
    normalizers,
    mean,
    inverse,
    sums,
    by_layer,
    by_head,
    by_key,
    images,
    heads,
    layers,
    queries,
    start,
    stop,
    ALIGN: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add the deviations of all images to a part of the float64 sums of one layer and head."""
    blocks = tl.cdiv(stop - start, KEYS)
    key = start + (tl.program_id(0) % blocks) * KEYS + tl.arange(0, KEYS)
    query = (tl.program_id(0) // blocks) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1)
    layer = tl.program_id(2) + tl.zeros([1], tl.int32)
    there = layer < layers
    inside = (key < stop)[:, None] & (query < queries)[None, :]
    target = sums + tl.program_id(2).to(tl.int64) * by_layer + head.to(tl.int64) * by_head
    target += (key - start).to(tl.int64)[:, None] * by_key + query[None, :]
    total = tl.load(target, inside, other=0.0)
    for group in range(0, images, GROUP):
        # A few images in float32, then one addition in float64, which is slow on some devices.
        few = tl.zeros([KEYS, QUERIES], tl.float32)
        for image in range(group, tl.minimum(group + GROUP, images)):
            pair = image * heads + head
            q, q_apart = _tokens(table, 0, layers, layer, there, image, head, ALIGN)
            k, k_apart = _tokens(table, 4, layers, layer, there, image, head, ALIGN)
            normalizer, scale = _normalizers(table, layers, layer, there, pair, queries)
            column = _probabilities(
                tokens, normalizers, q, q_apart, k, k_apart, normalizer, scale, there, query, queries, key, stop,
                DIM, DEPTH, PRECISION, WIDEN,
            )  # fmt: skip
            at = (pair * (stop - start).to(tl.int64) + key - start) * layers + tl.program_id(2)
            unit = _unit(mean, inverse, column, query, queries, at[None, :], (key < stop)[None, :])
            few += tl.trans(tl.reshape(unit, [QUERIES, KEYS]))
        total += few
    tl.store(target, total, inside)


@triton.jit(do_not_specialize=("heads", "layers", "queries", "keys"))
def normalizers_program(
    table,
    tokens,
    normalizers,
    heads,
    layers,
    queries,
    keys,
    ALIGN: tl.constexpr,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The log of the sum of exponentials of some rows of one layer's logits, in one pass over the keys."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    pair = tl.program_id(1)
    layer = tl.program_id(2) + tl.zeros([1], tl.int32)
    there = layer < layers
    q, q_apart = _tokens(table, 0, layers, layer, there, pair // heads, pair % heads, ALIGN)
    k, k_apart = _tokens(table, 4, layers, layer, there, pair // heads, pair % heads, ALIGN)
    target, scale = _normalizers(table, layers, layer, there, pair, queries)
    highest = tl.full([1, QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([1, QUERIES], tl.float32)
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        logits = _products(
            tokens, q, q_apart, k, k_apart, there, query, queries, key, keys, DIM, DEPTH, PRECISION, WIDEN
        ) * scale[:, None, None]  # fmt: skip
        logits = tl.where((key < keys)[None, None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 2))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, :, None]), 2)
        highest = higher
    at = normalizers + target[:, None] + query[None, :]
    tl.store(at, highest + tl.log(total), (query < queries)[None, :])
