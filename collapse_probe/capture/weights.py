"""Attention weights on their way from the softmax to their product with the values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.attention_map import Source, Stored
from collapse_probe.capture.axes import Arrangement, Site, arrangement
from collapse_probe.capture.head_mixing import Mixing
from collapse_probe.capture.operators import keeps_order, swaps_last_axes
from collapse_probe.capture.scores import richer_lead

aten = torch.ops.aten


@dataclass(frozen=True)
class Weights:
    """A tensor that came from a softmax.

    Attributes:
        shape: of the tensor that is followed.
        lead: its leading axes, with as little folded as was seen.
        serials: the softmaxes in it (several where a model adds maps).
        softmax: the softmax itself, `[B W, H, Q, K]`: an own copy or its ingredients.
        contraction: how many entries of a query and a key each logit summed over; None where the logits did not come
            from a product of queries and keys.
        mixing: what was applied over heads.
        transposed: whether queries and keys have changed places.
        lossy: whether something was applied that only the tensor itself can tell.
        logarithm: whether these are log-probabilities still.
    """

    shape: tuple[int, ...]
    lead: tuple[int, ...]
    serials: frozenset[int]
    softmax: Source
    contraction: int | None
    mixing: Mixing = field(default_factory=Mixing)
    transposed: bool = False
    lossy: bool = False
    logarithm: bool = False

    @property
    def axes(self) -> tuple[int, int]:
        """(Q, K)."""
        return self.softmax.shape[2], self.softmax.shape[3]

    def joined(self, others: list[Weights]) -> Weights:
        """These weights after an operator that brought others into them."""
        serials = self.serials.union(*(other.serials for other in others))
        return self if serials == self.serials else replace(self, serials=serials, lossy=True)

    def step(self, position: int, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Weights | None:
        """What becomes of these weights, the argument at `position`, under an operator; None where they are lost."""
        result = out[0] if isinstance(out, (tuple, list)) else out
        shape = tuple(result.shape)
        if self.logarithm:
            if func in (aten.exp.default, aten.exp_.default):
                return replace(self, logarithm=False)
            return replace(self, shape=shape) if position == 0 and keeps_order(func, args, result) else None
        exact = self._exactly(position, shape, func, args, result) or self._mixed(
            position, shape, func, args, kwargs, out
        )
        if exact is not None:
            return exact
        # Anything that keeps every entry, or at least the map's own two axes, may still be on its way to the values.
        if len(shape) >= 2 and shape[-2:] in (self.axes, self.axes[::-1]):
            return replace(self, shape=shape, lead=shape[:-2], lossy=True)
        if result.numel() == math.prod(self.shape):
            return replace(self, shape=shape, lossy=True)
        return None

    def _exactly(self, position: int, shape: tuple[int, ...], func: Any, args: Any, out: Tensor) -> Weights | None:
        if position != 0:
            return None
        mixing = self.mixing.moved(func, args, out)
        if mixing is not None:
            return replace(self, shape=shape, mixing=mixing)
        if func is aten.native_dropout.default and not (args[2] and args[1] > 0):
            return replace(self, shape=shape)
        if self.mixing.heads_last:
            return None
        if keeps_order(func, args, out):
            transposed = self.transposed
            if 1 in self.axes and self.axes != self.axes[::-1] and shape[-2:] in (self.axes, self.axes[::-1]):
                # A single query, or key, may change places with the others without any entry moving.
                transposed = shape[-2:] != self.axes
            return replace(self, shape=shape, lead=richer_lead(self.lead, shape, self.axes), transposed=transposed)
        if swaps_last_axes(func, args) and tuple(args[0].shape[-2:]) in (self.axes, self.axes[::-1]):
            return replace(self, shape=shape, transposed=not self.transposed)
        return None

    def _mixed(
        self, position: int, shape: tuple[int, ...], func: Any, args: Any, kwargs: dict[str, Any], out: Any
    ) -> Weights | None:
        if self.lossy or self.transposed or self.contraction is None:
            return None
        before = self.softmax.shape if self.mixing.mix is None else (1, len(self.mixing.mix.bias))
        if not self.mixing.heads_last and (len(self.shape) != 4 or self.shape[1] != before[1]):
            return None
        if math.prod(self.shape) // before[1] != math.prod(self.softmax.shape) // self.softmax.shape[1]:
            return None
        mixing = self.mixing.step(position, self.shape, func, args, kwargs, out)
        if mixing is None:
            return None
        return replace(self, shape=shape, lead=self.lead if mixing.heads_last else shape[:-2], mixing=mixing)

    def multiplies(self, applied: Tensor) -> bool:
        """Whether this operand of a product, seen as queries by keys, is the map.

        A gate that was changed is not followed so far: what it was multiplied with need not be a map.
        """
        whole = not self.mixing.heads_last and not self.logarithm and not (self.lossy and self.contraction is None)
        return whole and tuple(applied.shape[-2:]) == self.axes

    def multiplies_grouped(self, applied: Tensor) -> bool:
        """Whether a left operand holds the queries of several heads as one axis, and their maps one below the other."""
        queries, keys = self.axes
        rows, columns = applied.shape[-2:]
        alone = self.transposed or self.mixing.heads_last or self.logarithm or self.mixing.mix is not None
        if alone or columns != keys or rows <= queries or rows % queries or self.contraction is None:
            return False
        return math.prod(self.lead) * queries == math.prod(applied.shape[:-1]) and self.lead[-1:] == (rows // queries,)

    def merged_lead(self, group: int) -> tuple[int, ...]:
        """The leading axes where the last one, of query heads on one key head, is part of the heads before it."""
        return (*self.lead[:-2], self.lead[-2] * group) if len(self.lead) > 1 else self.lead

    def straight(self, right: bool) -> bool:
        """Whether the operand is exactly the softmax, mixed or not; `right` where it is a product's right operand."""
        return not self.lossy and self.transposed == right

    def arrangement(self, operand: Tensor, site: Site) -> Arrangement:
        """Of the leading axes of an operand that these weights are."""
        count = math.prod(operand.shape[:-2])
        return arrangement(self.lead if math.prod(self.lead) == count else tuple(operand.shape[:-2]), site)


def stored(tensor: Tensor, axes: Arrangement) -> Stored:
    """An own copy of a tensor with these leading axes."""
    return Stored(axes(tensor.detach()).clone(memory_format=torch.contiguous_format))
