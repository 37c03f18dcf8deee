"""What the tracer reports: one map, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from collapse_probe.capture.attention_map import Combination, HeadMix, QueryKey, Source, Stored
from collapse_probe.capture.axes import Arrangement


@dataclass(frozen=True)
class Product:
    """A map's product with the values, as the model computed it.

    Attributes:
        values: `[*lead, K, D]`.
        output: `[*lead, Q, D]`.
        axes: of the leading axes.
        finish: what a kernel does after map times values, `[B, H, Q, D]`, to arrive at its output, if anything.
    """

    values: Tensor
    output: Tensor
    axes: Arrangement
    finish: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Sighting:
    """Attention that was seen: the softmax, what was applied after it, or why it could not be kept.

    Attributes:
        serials: the softmaxes or kernels that went into it.
        source: the map, or the softmax to which `mix` is applied; None where it could not be kept.
        mix: what the model applies over heads after the softmax.
        origin: the softmax underneath, where `source` is not made of it by `mix`.
        windows: maps per image.
        contraction: how many entries of a query and a key each logit summed over; None for a gate, whose logits are no
            products of queries and keys.
        unbatched: whether queries and keys had no leading axes at all.
        product: what the model computed from it, to check against.
        reason: why it could not be kept.
        submodule: where below the running module it happened, if a kernel stands for several modules.
    """

    serials: frozenset[int] = frozenset()
    source: Source | None = None
    mix: HeadMix | None = None
    origin: Source | None = None
    windows: int = 1
    contraction: int | None = None
    unbatched: bool = False
    product: Product | None = field(default=None, repr=False)
    reason: str = ""
    submodule: str = ""

    @property
    def softmax(self) -> Source | None:
        """The softmax underneath."""
        return self.origin or self.source

    def combined(self, own: float, other: Sighting, factor: float, output: Tensor) -> Sighting | None:
        """The map `own * self + factor * other` of two that multiplied the same values (differential attention)."""
        if self.source is None or other.source is None or self.mix is not None or other.mix is not None:
            return None
        if self.source.shape != other.source.shape or self.softmax is None or other.softmax is None:
            return None
        source = Combination((self.source, other.source), (own, factor))
        product = None if self.product is None else replace(self.product, output=output.view(self.product.output.shape))
        return replace(
            self,
            serials=self.serials | other.serials,
            source=source,
            origin=_side_by_side(self.softmax, other.softmax, self.source.shape[1]),
            product=product,
        )


def _side_by_side(one: Source, other: Source, heads: int) -> Source:
    """The softmaxes of two maps as the heads of one source, those of each head next to each other."""

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat([part.unflatten(1, (heads, -1)) for part in parts], 2).flatten(1, 2)

    if isinstance(one, QueryKey) and isinstance(other, QueryKey) and _settings(one) == _settings(other):
        normalizers = [item.log_normalizer for item in (one, other) if item.log_normalizer is not None]
        normalizer = joined(*normalizers) if len(normalizers) == 2 else None
        return replace(one, q=joined(one.q, other.q), k=joined(one.k, other.k), log_normalizer=normalizer)
    return Stored(joined(*(item.rows(0, item.shape[2]) for item in (one, other))))


def _settings(source: QueryKey) -> tuple[float, bool] | int:
    """What two maps must share to lie side by side; unique where they cannot."""
    plain = source.bias is None and source.premix is None
    return (source.scale, source.causal) if plain else id(source)
