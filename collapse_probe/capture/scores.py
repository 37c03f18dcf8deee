"""Logits on their way from the product of queries and keys to the softmax.

What is known of them is `scale * q k^T + bias`, mixed over heads where a model does so (talking heads). An operator
that is not understood leaves only the knowledge that these numbers came from queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.attention_map import QueryKey
from collapse_probe.capture.axes import Arrangement
from collapse_probe.capture.head_mixing import Mixing
from collapse_probe.capture.operators import as_number, keeps_order, named_arguments, storage_of

aten = torch.ops.aten

MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar}
DIVIDE = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar}
ADD = {aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar}
SUBTRACT = {aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar, aten.sub_.Scalar}
_FILL = {aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}

#: A bias of its own for every image is kept only where the map itself would take so many times as much memory.
_WORTH_IT = 8

#: A logit filled with this or less is masked: its probability is exactly zero in every dtype.
_MASKED = -1e4


@dataclass(frozen=True)
class Term:
    """A tensor that was added to, or multiplied with, logits whose leading axes were `lead` at that moment."""

    tensor: Tensor
    lead: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """A tensor that came from a product of queries and keys.

    Attributes:
        shape: of the tensor that is followed.
        lead: its leading axes, with as little folded as was seen.
        axes: (Q, K) of the product.
        contraction: how many entries of a query and a key each product summed over.
        q, k: `[N, Q, D]` and `[N, D, K]`; None where the numbers are no longer known.
        scale: number by which products were multiplied.
        factors: tensors by which they were multiplied (temperatures), alike for all queries and keys of a head.
        biases: what was added.
        mixing: what was applied over heads after that.
    """

    shape: tuple[int, ...]
    lead: tuple[int, ...]
    axes: tuple[int, int]
    contraction: int
    q: Tensor | None
    k: Tensor | None
    scale: float = 1.0
    factors: tuple[Term, ...] = ()
    biases: tuple[Term, ...] = ()
    mixing: Mixing = field(default_factory=Mixing)

    @property
    def known(self) -> bool:
        """Whether the numbers are still known, not only where they came from."""
        return self.q is not None

    def without_numbers(self, shape: tuple[int, ...] | None = None) -> Scores:
        """Only where they came from; queries and keys are let go."""
        shape = self.shape if shape is None else shape
        return Scores(shape, shape[:-2], self.axes, self.contraction, None, None)

    def rests_on(self, storages: set[int]) -> bool:
        """Whether the queries or keys lie in this memory."""
        return self.q is not None and self.k is not None and bool(storages & {storage_of(self.q), storage_of(self.k)})

    def step(self, position: int, func: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> Scores | None:
        """What becomes of these scores, the argument at `position`, under an operator; None where they are lost."""
        shape = tuple(out.shape)
        if self.known:
            after = self._arranged(position, func, args, out) or self._changed(position, func, args, kwargs, out)
            if after is not None:
                return after
        if func is aten.cat.default and position == -1 and len(shape) >= 2:  # further logits: sinks, memory
            return replace(self.without_numbers(shape), axes=(shape[-2], shape[-1]))
        same_entries = out.numel() == math.prod(self.shape) or shape[-2:] in (self.axes, self.axes[::-1])
        return self.without_numbers(shape) if same_entries and len(shape) >= 2 else None

    def _arranged(self, position: int, func: Any, args: Any, out: Tensor) -> Scores | None:
        if position != 0:
            return None
        mixing = self.mixing.moved(func, args, out)
        if mixing is not None:
            return replace(self, shape=tuple(out.shape), mixing=mixing)
        if not self.mixing.heads_last and keeps_order(func, args, out):
            shape = tuple(out.shape)
            # A view that folds queries or keys away holds the same entries, and is no map until they are back.
            return replace(self, shape=shape, lead=richer_lead(self.lead, shape, self.axes))
        return None

    def _changed(self, position: int, func: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> Scores | None:
        if self.mixing.mix is not None or func not in MULTIPLY:
            step = self.mixing.step(position, self.shape, func, args, kwargs, out)
            if step is not None:
                return replace(self, shape=tuple(out.shape), mixing=step)
        if tuple(out.shape) != self.shape or self.shape[-2:] != self.axes:
            return None  # queries or keys are folded otherwise at the moment
        if self.mixing.mix is not None or self.mixing.heads_last:
            return None  # what comes after mixing is not kept apart
        if position not in (0, 1) or len(args) < 2:
            return None
        other = args[1 - position]
        if func in MULTIPLY or (func in DIVIDE and position == 0 and not kwargs):
            return self._scaled(other, func in DIVIDE)
        if func in ADD or (func in SUBTRACT and position == 0):
            alpha = kwargs.get("alpha", 1)
            if position == 1 and alpha != 1:
                return None  # the scores are what it multiplies
            return self._added(other, -1 if func in SUBTRACT else 1, alpha)
        if func in _FILL and position == 0:
            named = named_arguments(func, args, kwargs)
            return self._filled(named["mask"], named["value"])
        if func is aten.where.self and position == 1:
            return self._filled(~args[0], args[2])
        return None

    def _scaled(self, other: Any, divide: bool) -> Scores | None:
        number = as_number(other)
        if number is not None:
            number = 1 / number if divide else number
            biases = tuple(Term(term.tensor * number, term.lead) for term in self.biases)
            return replace(self, scale=self.scale * number, biases=biases)
        if not isinstance(other, Tensor) or self.biases or len(self.shape) < 3 or not other.is_floating_point():
            return None
        if other.ndim < 2 or tuple(other.shape[-2:]) != (1, 1):
            return None
        factor = other.detach().reciprocal() if divide else other.detach().clone()
        return replace(self, factors=(*self.factors, Term(factor, self.shape[:-2])))

    def _added(self, other: Any, sign: int, alpha: float) -> Scores | None:
        if isinstance(other, (int, float)):
            return self  # a softmax does not see what all its logits share
        if not isinstance(other, Tensor) or not other.is_floating_point() or other.ndim > len(self.shape):
            return None
        if other.ndim == 0:
            return self
        bias = other.detach() if sign * alpha == 1 else other.detach() * (sign * alpha)
        return self._with_bias(_compact(bias))

    def _with_bias(self, bias: Tensor) -> Scores:
        return replace(self, biases=(*self.biases, Term(bias, self.shape[:-2])))

    def _filled(self, mask: Tensor, value: Any) -> Scores | None:
        number = as_number(value)
        if number is None or number > _MASKED or mask.ndim > len(self.shape):
            return None
        compact = _compact(mask)
        zeros = torch.zeros(compact.shape, dtype=torch.float32, device=compact.device)
        return self._with_bias(zeros.masked_fill_(compact, number))

    # -- at the softmax ----------------------------------------------------------------------------------------------

    def query_key(self, axes: Arrangement, transposed: bool) -> QueryKey | None:
        """Own copies of queries and keys as `[B W, H, Q, D]`; None where the numbers are not known any more, or where
        what was added would take as much memory as the map itself.

        Args:
            axes: of the leading axes of these scores.
            transposed: whether the softmax runs over what the product called queries.
        """
        if self.q is None or self.k is None or self.mixing.heads_last:
            return None
        q, k = self.q, self.k.mT
        tail = (q.shape[-2], k.shape[-2])
        if self.shape[-2:] != tail or math.prod(self.lead) != math.prod(q.shape[:-2]):
            return None
        mix = self.mixing.mix
        if mix is not None and (
            transposed or axes.heads_axis != len(self.lead) - 1 or mix.weight.shape != (axes.heads, axes.heads)
        ):
            return None
        q, k = (
            axes(q).clone(memory_format=torch.contiguous_format),
            axes(k).clone(memory_format=torch.contiguous_format),
        )
        for term in self.factors:
            q = _times(q, _spread(term, axes, (1, 1)))
        bias = self._bias(axes, tail)
        if bias is not None and bias.shape[0] not in (1, axes.windows):
            entries = math.prod(self.lead) * math.prod(tail)
            if _WORTH_IT * bias.numel() > entries:
                return None
        if transposed:
            q, k, bias = k, q, None if bias is None else bias.mT.contiguous()
        if bias is not None and masks_whole_rows(bias):
            return None
        return QueryKey(q, k, self.scale, bias, premix=self.mixing.mix, windows=axes.windows)

    def _bias(self, axes: Arrangement, tail: tuple[int, int]) -> Tensor | None:
        total: Tensor | None = None
        for term in self.biases:
            bias = _spread(term, axes, tail)
            if self.q is not None:
                bias = bias.to(torch.promote_types(bias.dtype, self.q.dtype))
            total = bias if total is None else _plus(total, bias)
        return total


def masks_whole_rows(bias: Tensor) -> bool:
    """Whether every key of some row is masked: what a softmax makes of it hangs on rounding, and is kept as it is."""
    return not bias.is_meta and bool((bias.amax(-1) < -1e3).any())


def _spread(term: Term, axes: Arrangement, tail: tuple[int, int]) -> Tensor:
    """A term as `[P, H, x, y]`: see :meth:`Arrangement.broadcast`."""
    tensor = term.tensor.expand(term.lead + tail)
    if term.lead != axes.lead:
        tensor = tensor.reshape(axes.lead + tail)
    return axes.broadcast(tensor, tail)


def _plus(one: Tensor, other: Tensor) -> Tensor:
    """Sum of two terms whose first axes repeat with periods that divide each other."""
    period = max(one.shape[0], other.shape[0])
    one, other = (item.repeat(period // item.shape[0], 1, 1, 1) if item.shape[0] > 1 else item for item in (one, other))
    return one + other


def _times(q: Tensor, factor: Tensor) -> Tensor:
    period = factor.shape[0]
    return (q.unflatten(0, (-1, period)) * factor).flatten(0, 1).to(q.dtype)


def richer_lead(lead: tuple[int, ...], shape: tuple[int, ...], axes: tuple[int, int]) -> tuple[int, ...]:
    """The leading axes as they were known, or those of a new shape where that folds less."""
    whole = shape[-2:] in (axes, axes[::-1])
    return shape[:-2] if whole and len(shape) - 2 > len(lead) else lead


def _compact(tensor: Tensor) -> Tensor:
    """An own copy in which axes that were only expanded are kept once."""
    tensor = tensor.detach()
    for axis in range(tensor.ndim):
        if tensor.stride(axis) == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.clone()
