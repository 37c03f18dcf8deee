"""One layer's attention for one batch: lazy, exact, cheap to keep.

A map `A[b, h, i, j]` says how much query token i draws from key token j. What is kept is what is small: queries and
keys (or, where the model itself materialised something that cannot be followed, that tensor). Rows and columns are
produced on demand, in float32 or wider whatever the model's dtype.

Shapes: B images, H heads, Q query tokens, K key tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

#: Rows of logits that `log_normalizer` holds at once, in elements: bounds its memory on long sequences.
_CHUNK_ELEMENTS = 1 << 24

#: A key whose bias is lower than its row's largest by more than this is masked: exp(-50) is lost in any sum.
_MASKED_BELOW = 50


@dataclass(frozen=True)
class TokenLayout:
    """What the key tokens are: leading prefix tokens (class token, registers), then patches on a grid.

    Attributes:
        prefix_tokens: number of leading tokens that are not patches.
        grid: height and width of the patch grid, or None where it is not known.
    """

    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None


class Source(Protocol):
    """Anything that can produce parts of a `[B, H, Q, K]` map."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor: ...
    def columns(self, start: int, stop: int) -> Tensor: ...
    def rows(self, start: int, stop: int) -> Tensor: ...
    def select(self, start: int, stop: int) -> Source: ...
    def select_heads(self, start: int, stop: int) -> Source | None: ...
    def clone(self) -> Source: ...
    def admissible_keys(self) -> Tensor | None: ...


@dataclass
class QueryKey:
    """A softmax over `scale * q k^T + bias`, kept as its ingredients.

    Attributes:
        q: queries `[B, H, Q, D]`.
        k: keys `[B, H, K, D]`.
        scale: factor of the products.
        bias: additive logits `[P, H, Q, K]`, minus infinity where a key is masked; axes may be of length 1. P is 1, W
            (every image repeats the biases of its windows) or B.
        causal: query i sees keys 0..i only (aligned top left, as `F.scaled_dot_product_attention` does).
        log_normalizer: `[B, H, Q]`, log of the sum of exponentials of each row, where a kernel returned it.
        premix: what the model applies over the heads of the logits, bias included, before the softmax.
        windows: W, maps per image on the first axis.
    """

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None
    causal: bool = False
    log_normalizer: Tensor | None = None
    premix: HeadMix | None = None
    windows: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, _ = self.q.shape
        return batch, heads, queries, self.k.shape[2]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    def select(self, start: int, stop: int) -> QueryKey:
        bias, normalizer = self.bias, self.log_normalizer
        if bias is not None and bias.shape[0] not in (1, self.windows):
            bias = bias[start:stop]
        return replace(
            self,
            q=self.q[start:stop],
            k=self.k[start:stop],
            bias=bias,
            log_normalizer=None if normalizer is None else normalizer[start:stop],
        )

    def select_heads(self, start: int, stop: int) -> QueryKey | None:
        """The same map for heads start..stop-1; None where the logits mix heads."""
        if self.premix is not None:
            return None
        bias, normalizer = self.bias, self.log_normalizer
        return replace(
            self,
            q=self.q[:, start:stop],
            k=self.k[:, start:stop],
            bias=bias if bias is None or bias.shape[1] == 1 else bias[:, start:stop],
            log_normalizer=None if normalizer is None else normalizer[:, start:stop],
        )

    def clone(self) -> QueryKey:
        normalizer = self.log_normalizer
        return replace(
            self,
            q=self.q.clone(),
            k=self.k.clone(),
            bias=None if self.bias is None else self.bias.clone(),
            log_normalizer=None if normalizer is None else normalizer.clone(),
        )

    def admissible_keys(self) -> Tensor | None:
        """How many keys each query may attend to, broadcastable to `[B, H, Q]`; None where that is all of them."""
        _, _, queries, keys = self.shape
        allowed = self._allowed(slice(0, queries), slice(0, keys), self.q)
        if allowed is None:
            return None
        # Masks need not be minus infinity: timm's Swin adds -100, others the smallest number of the dtype.
        least = (allowed.amax(-1, keepdim=True) - _MASKED_BELOW).clamp(min=torch.finfo(allowed.dtype).min)
        admitted = allowed > least
        if admitted.all():
            return None
        counts = admitted.expand(*allowed.shape[:-1], keys).sum(-1)
        return counts if counts.shape[0] == 1 else counts.repeat(self.shape[0] // counts.shape[0], 1, 1)

    def columns(self, start: int, stop: int) -> Tensor:
        """Probabilities of keys start..stop-1: `[B, H, Q, stop-start]`."""
        batch, heads, queries, _ = self.shape
        out = torch.empty(batch, heads, stop - start, queries, dtype=self.dtype, device=self.device)
        return self.write_columns(start, stop, out).mT

    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write the columns key by key into a contiguous `out` `[B, H, stop-start, Q]`."""
        queries = self.shape[2]
        allowed = self._allowed(slice(0, queries), slice(start, stop), out)
        flat = out.view(-1, stop - start, queries)
        if self.premix is not None:
            q, k = self._computed(self.q).flatten(0, 1), self._computed(self.k[:, :, start:stop]).flatten(0, 1)
            torch.baddbmm(flat.new_zeros(()), k, q.mT, beta=0, alpha=self.scale, out=flat)
            logits = out if allowed is None else _plus(out, allowed.mT)
            return torch.sub(self.premix(logits), self._log_normalizer()[:, :, None], out=out).exp_()
        torch.bmm(self._keys_and_one[:, start:stop], self._normalised_queries.mT, out=flat)
        if allowed is not None:
            _periodic(out, allowed).add_(allowed.mT)
        return out.exp_()

    @cached_property
    def _normalised_queries(self) -> Tensor:
        """Queries `[B H, Q, D + 1]` whose products with keys, a one behind each, are logits less the row's normaliser:
        subtracting it afterwards would go over every logit once more."""
        q, normalizer = self._computed(self.q) * self.scale, self._log_normalizer()[..., None]
        return torch.cat([q, -normalizer], -1).flatten(0, 1)

    @cached_property
    def _keys_and_one(self) -> Tensor:
        k = self._computed(self.k)
        return torch.cat([k, torch.ones_like(k[..., :1])], -1).flatten(0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Probabilities of queries start..stop-1: `[B, H, stop-start, K]`."""
        return _softmax(self._logits(start, stop))

    def _logits(self, start: int, stop: int) -> Tensor:
        logits = self._computed(self.q[:, :, start:stop]) @ self._computed(self.k).mT * self.scale
        allowed = self._allowed(slice(start, stop), slice(0, self.k.shape[2]), logits)
        logits = logits if allowed is None else _plus(logits, allowed)
        return logits if self.premix is None else self.premix(logits)

    def _allowed(self, queries: slice, keys: slice, like: Tensor) -> Tensor | None:
        """Additive logits (bias and causal mask) for a part of the map, broadcastable to `[B, H, q, k]`."""
        bias = self.bias
        if bias is not None:
            bias = bias if bias.shape[-2] == 1 else bias[..., queries, :]
            bias = (bias if bias.shape[-1] == 1 else bias[..., keys]).to(like.dtype)
        if not self.causal:
            return bias
        row = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
        column = torch.arange(keys.start, keys.stop, device=like.device)
        future = torch.zeros(1, 1, row.shape[0], column.shape[0], dtype=like.dtype, device=like.device)
        future.masked_fill_(column > row, -torch.inf)
        return future if bias is None else bias + future

    def _log_normalizer(self) -> Tensor:
        if self.log_normalizer is None:
            batch, heads, queries, keys = self.shape
            step = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * keys))
            parts = [self._logits(start, min(start + step, queries)).logsumexp(-1) for start in range(0, queries, step)]
            self.log_normalizer = torch.cat(parts, dim=-1)
        # A fully masked row has no normaliser; fused kernels answer zeros there, and so do we.
        return self._computed(self.log_normalizer.masked_fill(self.log_normalizer == -torch.inf, torch.inf))

    def _computed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


@dataclass
class Stored:
    """A map that the model materialised and that cannot be followed back to queries and keys: `[B, H, Q, K]`."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, keys = self.tensor.shape
        return batch, heads, queries, keys

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.tensor.dtype, torch.float32)

    def select(self, start: int, stop: int) -> Stored:
        return Stored(self.tensor[start:stop])

    def select_heads(self, start: int, stop: int) -> Stored:
        return Stored(self.tensor[:, start:stop])

    def clone(self) -> Stored:
        return Stored(self.tensor.clone())

    def admissible_keys(self) -> None:
        """Masks of a map that was only seen as a whole are not known."""

    def columns(self, start: int, stop: int) -> Tensor:
        return self.tensor[..., start:stop].to(self.dtype)

    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor:
        return out.copy_(self.tensor[..., start:stop].mT)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[:, :, start:stop].to(self.dtype)


@dataclass
class Combination:
    """A weighted sum of maps of equal shape: differential attention applies `P1 - lambda P2`."""

    sources: tuple[Source, ...]
    factors: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.sources[0].shape

    @property
    def device(self) -> torch.device:
        return self.sources[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    def select(self, start: int, stop: int) -> Combination:
        return Combination(tuple(item.select(start, stop) for item in self.sources), self.factors)

    def select_heads(self, start: int, stop: int) -> Combination | None:
        parts = [item.select_heads(start, stop) for item in self.sources]
        known = tuple(item for item in parts if item is not None)
        return Combination(known, self.factors) if len(known) == len(parts) else None

    def clone(self) -> Combination:
        return Combination(tuple(item.clone() for item in self.sources), self.factors)

    def admissible_keys(self) -> Tensor | None:
        return self.sources[0].admissible_keys()

    def columns(self, start: int, stop: int) -> Tensor:
        return self._sum([item.columns(start, stop) for item in self.sources])

    def rows(self, start: int, stop: int) -> Tensor:
        return self._sum([item.rows(start, stop) for item in self.sources])

    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor:
        return out.copy_(self.columns(start, stop).mT)

    def _sum(self, parts: list[Tensor]) -> Tensor:
        total = parts[0] * self.factors[0]
        for part, factor in zip(parts[1:], self.factors[1:], strict=True):
            total.add_(part, alpha=factor)
        return total


@dataclass(frozen=True)
class HeadMix:
    """An affine map over heads applied to every (query, key) entry: `out[o] = sum_h weight[o, h] a[h] + bias[o]`.

    Re-attention (DeepViT, arXiv 2103.11886: a 1x1 convolution over heads, then batch norm, then a scale) and talking
    heads are of this form, so the applied map needs no memory of its own.
    """

    weight: Tensor
    bias: Tensor

    def then(self, other: HeadMix) -> HeadMix:
        """This mix followed by another."""
        return HeadMix(other.weight @ self.weight, other.weight @ self.bias + other.bias)

    def __call__(self, part: Tensor) -> Tensor:
        """Mix a part of a map `[B, H, x, y]` -> `[B, O, x, y]`."""
        part = part.contiguous()
        weight, bias = (item.to(part.dtype).to(part.device) for item in (self.weight, self.bias))
        mixed = torch.baddbmm(bias[:, None], weight.expand(part.shape[0], -1, -1), part.flatten(2))
        return mixed.view(part.shape[0], weight.shape[0], *part.shape[2:])


#: Kinds of attention. Only the first three are about tokens of one image that ask tokens of the same image.
KINDS = {
    "token": "every token of the image asks; keys are its tokens, or fewer where the layer pools them",
    "window": "tokens ask within their window; several maps per image",
    "class": "one query per image, a class token",
    "pooling": "a pooling head: learnt or averaged queries ask the tokens",
    "cross": "queries come from another sequence than keys",
    "channel": "channels ask channels",
    "gate": "a softmax that weights values without comparing queries with keys",
}


@dataclass(frozen=True)
class AttentionMap:
    """One layer's attention for one batch, `[B, H, Q, K]`, lazy and exact.

    The map is the one that multiplied the values. Where a model mixes after its softmax (re-attention, talking heads)
    :attr:`softmax` is the map underneath, and :attr:`is_probability` is False: entries may be negative and rows need
    not sum to 1.

    Attributes:
        name: qualified name of the layer in its model.
        kind: what asks what, one of :data:`KINDS`.
        layout: what the key tokens are.
        source: where the numbers come from.
        mix: what the model applies to the softmax before the product with the values, if it mixes heads.
        origin: the softmax underneath, where `source` is a stored map that came from it in another way.
        windows: maps per image: tokens of different windows do not see each other.
        partition: how the windows were cut, where a model cuts them in more than one way (``"shifted"``, ``"grid"``…).
    """

    name: str
    kind: str
    layout: TokenLayout
    source: Source
    mix: HeadMix | None = None
    origin: Source | None = field(default=None, repr=False)
    windows: int = 1
    partition: str = ""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K); with W windows per image, B counts windows: images times W, an image's windows side by side."""
        batch, heads, queries, keys = self.source.shape
        return batch, heads if self.mix is None else self.mix.weight.shape[0], queries, keys

    @property
    def images(self) -> int:
        """How many images the batch held."""
        return self.shape[0] // self.windows

    @property
    def is_probability(self) -> bool:
        """Whether rows are probabilities: non-negative and, unless fully masked, summing to 1."""
        return self.mix is None and self.origin is None

    @property
    def device(self) -> torch.device:
        """Where the map is computed."""
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        """What its parts are computed in: float32 or wider."""
        return self.source.dtype

    @property
    def prefix_tokens(self) -> int:
        """How many leading key tokens are not patches."""
        return self.layout.prefix_tokens

    @property
    def softmax(self) -> AttentionMap:
        """The softmax map underneath; the map itself where nothing was applied after the softmax."""
        return replace(self, source=self.origin or self.source, mix=None, origin=None)

    def queries_and_keys(self) -> tuple[Tensor, Tensor, Tensor | None, float] | None:
        """Queries `[B, H, Q, D]`, keys `[B, H, K, D]`, the log of each row's sum of exponentials `[B, H, Q]` where a
        kernel returned it, and the factor of their products; None where the map is more than a softmax of these, or
        stays within windows."""
        source = self.source
        if not isinstance(source, QueryKey) or not self.is_probability or self.windows > 1:
            return None
        if source.bias is not None or source.causal or source.premix is not None:
            return None
        return source.q, source.k, source.log_normalizer, source.scale

    def materialize(self) -> Tensor:
        """The whole map, `[B, H, Q, K]`, float32 or wider."""
        return self.rows(0, self.shape[2])

    def columns(self, start: int, stop: int) -> Tensor:
        """Key columns start..stop-1: `[B, H, Q, stop-start]`, float32 or wider.

        Raises:
            IndexError: the range does not lie within 0..K.
        """
        _check_range("columns", start, stop, self.shape[3])
        with torch.autocast(self.device.type, enabled=False):
            return self._mixed(self.source.columns(start, stop))

    def rows(self, start: int, stop: int) -> Tensor:
        """Query rows start..stop-1: `[B, H, stop-start, K]`, float32 or wider.

        Raises:
            IndexError: the range does not lie within 0..Q.
        """
        _check_range("rows", start, stop, self.shape[2])
        with torch.autocast(self.device.type, enabled=False):
            return self._mixed(self.source.rows(start, stop))

    def write_columns(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write key columns start..stop-1, key by key, into a contiguous `out` `[B, H, stop-start, Q]`.

        Returns:
            The columns of the softmax underneath in the same order: `out` itself where nothing was applied to it.

        Raises:
            IndexError: the range does not lie within 0..K.
        """
        _check_range("columns", start, stop, self.shape[3])
        if self.origin is not None:
            self.source.write_columns(start, stop, out)
            return self.origin.columns(start, stop).mT
        if self.mix is None:
            return self.source.write_columns(start, stop, out)
        softmax = self.source.columns(start, stop).mT
        out.copy_(self.mix(softmax))
        return softmax

    def admissible_keys(self) -> Tensor | None:
        """How many keys each query of the softmax may attend to, broadcastable to `[B, H, Q]`; None for all of them."""
        return (self.origin or self.source).admissible_keys()

    def select(self, start: int, stop: int) -> AttentionMap:
        """The same layer for images start..stop-1."""
        start, stop = start * self.windows, stop * self.windows
        origin = None if self.origin is None else self.origin.select(start, stop)
        return replace(self, source=self.source.select(start, stop), origin=origin)

    def select_heads(self, start: int, stop: int) -> AttentionMap | None:
        """The same layer for heads start..stop-1; None where the model mixes heads, before its softmax or after it."""
        source = self.source.select_heads(start, stop) if self.is_probability else None
        return None if source is None else replace(self, source=source)

    def clone(self) -> AttentionMap:
        """The same map in memory of its own: parts of a batch would keep all of it alive."""
        return replace(self, source=self.source.clone(), origin=None if self.origin is None else self.origin.clone())

    def _mixed(self, part: Tensor) -> Tensor:
        return part if self.mix is None else self.mix(part)


def concatenate(maps: Sequence[AttentionMap]) -> AttentionMap:
    """One layer's maps of consecutive batches as one map of all their images."""
    first = maps[0]
    if len(maps) == 1:
        return first
    if not all(_same_mix(item.mix, first.mix) for item in maps):  # batch statistics: each batch mixes in its own way
        applied = Stored(torch.cat([item.materialize() for item in maps]))
        softmaxes = _concatenate_sources([item.softmax.source for item in maps])
        return replace(first, source=applied, mix=None, origin=softmaxes)
    origins = [item.origin for item in maps if item.origin is not None]
    return replace(
        first,
        source=_concatenate_sources([item.source for item in maps]),
        origin=_concatenate_sources(origins) if origins else None,
    )


def _concatenate_sources(sources: Sequence[Source]) -> Source:
    combined = [source for source in sources if isinstance(source, Combination)]
    if len(combined) == len(sources) and len({source.factors for source in combined}) == 1:
        parts = zip(*(source.sources for source in combined), strict=True)
        return replace(combined[0], sources=tuple(_concatenate_sources(part) for part in parts))
    query_keys = [source for source in sources if isinstance(source, QueryKey)]
    settings = {(source.scale, source.causal) for source in query_keys}
    alike = len(settings) <= 1 and all(_same_mix(source.premix, query_keys[0].premix) for source in query_keys)
    if len(query_keys) < len(sources) or not alike:
        return Stored(torch.cat([source.rows(0, source.shape[2]) for source in sources]))
    normalizers = [source.log_normalizer for source in query_keys if source.log_normalizer is not None]
    return replace(
        query_keys[0],
        q=torch.cat([source.q for source in query_keys]),
        k=torch.cat([source.k for source in query_keys]),
        bias=_concatenate_biases(query_keys),
        log_normalizer=torch.cat(normalizers) if len(normalizers) == len(sources) else None,
    )


def _concatenate_biases(sources: Sequence[QueryKey]) -> Tensor | None:
    biases = [source.bias for source in sources]
    first = biases[0]
    if all(bias is None for bias in biases):
        return None
    if (
        first is not None
        and first.shape[0] in (1, sources[0].windows)
        and all(bias is not None and torch.equal(bias, first) for bias in biases)
    ):
        return first  # one for all, or one for each window, which every image repeats
    return torch.cat([_full_bias(source) for source in sources])


def _full_bias(source: QueryKey) -> Tensor:
    """The bias with every axis spelled out; zeros where there is none."""
    if source.bias is None:
        return source.q.new_zeros(()).expand(source.shape)
    return source.bias.repeat(source.shape[0] // source.bias.shape[0], 1, 1, 1).expand(source.shape)


def _same_mix(one: HeadMix | None, other: HeadMix | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias))


def _periodic(tensor: Tensor, repeated: Tensor) -> Tensor:
    """A view whose first axis counts repetitions of what is as long as the first axis of `repeated`."""
    period = repeated.shape[0]
    return tensor.view(-1, period, *tensor.shape[1:])


def _plus(logits: Tensor, allowed: Tensor) -> Tensor:
    return (_periodic(logits, allowed) + allowed).flatten(0, 1)


def _softmax(logits: Tensor) -> Tensor:
    # A fully masked row softmaxes to NaN; fused kernels answer zeros, and so do we.
    masked = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.softmax(-1).masked_fill(masked, 0.0)


def _check_range(what: str, start: int, stop: int, size: int) -> None:
    if not 0 <= start <= stop <= size:
        raise IndexError(f"{what}({start}, {stop}) is out of range: this map has {size} {what}")
