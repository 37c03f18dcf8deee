"""Follow attention through the operators that a model runs, from the softmax to its product with the values.

What is attention follows from dataflow, not from class names. A dispatch mode sees every operator below autograd and
autocast, so it sees what the kernels see (under autocast, the kernel's dtype), leaves fused kernels, native fast paths
and outputs exactly as they are, and needs no cooperation of the model:

- a fused kernel (`_scaled_dot_product_*_attention*`) brings queries, keys, scale, bias and, on the CPU, each row's
  normaliser;
- the native encoder layer brings its input and its weights, from which queries and keys follow;
- an explicit softmax is followed through reshapes, dropout, head mixing and normalisation to the batched product whose
  left operand it is. Scores that came from a batched product of queries and keys, scaled and biased, make the map lazy;
  where something happens that is not understood, the tensor that multiplied the values is kept instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.capture.attention_map import HeadMix, QueryKey, Source, Stored
from collapse_probe.capture.head_mixing import head_mix
from collapse_probe.capture.kernels import (
    NATIVE,
    Heads,
    Sighting,
    four_axes,
    fused_sighting,
    is_fused_attention,
    native_sighting,
    shrunk,
)
from collapse_probe.capture.operators import arrives_whole, as_number, memory_key

aten = torch.ops.aten


@dataclass(frozen=True)
class _Scores:
    """Logits on their way to a softmax: `scale * q k^T + bias`, q `[N, Q, D]`, k `[N, D, K]`."""

    shape: tuple[int, ...]
    q: Tensor
    k: Tensor
    scale: float = 1.0
    bias: Tensor | None = None


@dataclass(frozen=True)
class _Weights:
    """A softmax on its way to the values; `lossy` once something was applied that only the tensor itself can tell."""

    shape: tuple[int, ...]
    softmax: Source
    mix: HeadMix | None = None
    lossy: bool = False


_Node = _Scores | _Weights
_Emit = Callable[[Sighting], None]

_SHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
    aten._to_copy.default,
}
_SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
_PRODUCTS = {aten.bmm.default}


class AttentionTracer(TorchDispatchMode):
    """Sees every operator while it is active and reports attention to `emit`.

    Args:
        emit: receives each :class:`Sighting` at the moment of its product with the values.
        active: answers whether the model under observation is running; elsewhere operators pass untouched.
        heads: answers how many heads the module that runs right now has, or None; asked only where heads are folded
            into the batch axis.
    """

    def __init__(self, emit: _Emit, active: Callable[[], bool], heads: Heads) -> None:
        super().__init__()
        self._emit, self._active, self._heads = emit, active, heads
        self._nodes: dict[tuple[Any, ...], tuple[StorageWeakRef, _Node]] = {}

    def reset(self) -> None:
        """Forget every tensor that is being followed."""
        self._nodes.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not self._active():
            return func(*args, **kwargs)
        if arrives_whole(func, args):
            # Under inference mode composite operators arrive whole; run their own parts, which is what they would do.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        node = self._followed(args) if self._nodes else None
        fused = is_fused_attention(func)
        out = func(*args, **kwargs)
        if fused:
            self._emit(fused_sighting(func, args, kwargs, out, self._heads))
        elif func in NATIVE:
            self._emit(native_sighting(func, args, kwargs))
        elif func in _PRODUCTS:
            self._product(node, args, out)
        elif func in _SOFTMAX:
            self._softmax(node, args, out)
        elif node is not None:
            self._step(node, func, args, kwargs, out)
        return out

    # -- following tensors -------------------------------------------------------------------------------------------

    def _followed(self, args: tuple[Any, ...]) -> _Node | None:
        for argument in args:
            if isinstance(argument, Tensor):
                found = self._nodes.get(memory_key(argument))
                if found is not None:
                    return found[1]
        return None

    def _follow(self, tensor: Tensor, node: _Node) -> None:
        self._nodes[memory_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), node)

    def _forget_freed(self) -> None:
        self._nodes = {key: entry for key, entry in self._nodes.items() if not entry[0].expired()}

    # -- the operators that matter -----------------------------------------------------------------------------------

    def _product(self, node: _Node | None, args: tuple[Any, ...], out: Tensor) -> None:
        """A batched product is either queries times keys, or a map times values."""
        left, right = args[0], args[1]
        if isinstance(node, _Weights) and self._nodes.get(memory_key(left), (None, None))[1] is node:
            if tuple(left.shape[-2:]) == node.softmax.shape[2:]:
                self._emit(self._applied(node, left))
            return
        self._forget_freed()
        self._follow(out, _Scores(tuple(out.shape), left.detach(), right.detach()))

    def _softmax(self, node: _Node | None, args: tuple[Any, ...], out: Tensor) -> None:
        logits, dim = args[0], args[1]
        if logits.ndim < 3 or dim % logits.ndim != logits.ndim - 1:
            return
        source: Source
        if isinstance(node, _Scores) and node.shape == tuple(logits.shape):
            source = _query_key(node, self._heads)
        else:
            source = Stored(four_axes(out.detach(), self._heads))
        self._follow(out, _Weights(tuple(out.shape), source))

    def _step(self, node: _Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Anything else that happens to a tensor on its way: understood, or known to be lossy."""
        result = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(result, Tensor):
            return
        if isinstance(node, _Scores):
            following: _Node | None = _scores_step(node, func, args, result)
        else:
            following = _weights_step(node, func, args, kwargs, out)
        if following is not None:
            self._follow(result, following)
        elif func._schema.is_mutable:
            self._nodes.pop(memory_key(result), None)

    def _applied(self, node: _Weights, operand: Tensor) -> Sighting:
        if not node.lossy:
            return Sighting(source=node.softmax, mix=node.mix)
        batch, heads, queries, keys = node.softmax.shape
        applied = operand.detach()
        if applied.numel() == batch * heads * queries * keys:
            applied = applied.reshape(batch, heads, queries, keys)
        return Sighting(source=Stored(four_axes(applied, self._heads).clone()), origin=node.softmax)


def _scores_step(node: _Scores, func: Any, args: tuple[Any, ...], out: Tensor) -> _Scores | None:
    shape = tuple(out.shape)
    if func in _SHAPES:
        return replace(node, shape=shape) if shape[-2:] == node.shape[-2:] else None
    if shape != node.shape or len(args) < 2:
        return None
    other = args[1]
    if func in (aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar):
        factor = as_number(other)
        if factor is None or as_number(args[0]) is not None:
            return None
        factor = 1 / factor if func in (aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar) else factor
        return replace(node, scale=node.scale * factor, bias=None if node.bias is None else node.bias * factor)
    if func in (aten.add.Tensor, aten.add_.Tensor) and isinstance(other, Tensor):
        bias = other if tuple(args[0].shape) == node.shape else args[0]
        if not 2 <= bias.ndim <= 4 or len(shape) != 4:
            return None
        bias = shrunk(bias)
        return replace(node, bias=bias if node.bias is None else node.bias + bias)
    return None


def _weights_step(
    node: _Weights, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Weights | None:
    result = out[0] if isinstance(out, (tuple, list)) else out
    shape = tuple(result.shape)
    if func in _SHAPES and shape[-2:] == node.shape[-2:]:
        return replace(node, shape=shape)
    if func is aten.native_dropout.default and not (args[2] and args[1] > 0):
        return replace(node, shape=shape)
    mix = None if node.lossy or len(node.shape) != 4 else head_mix(node.shape, func, args, kwargs, out)
    if mix is not None:
        return replace(node, shape=shape, mix=mix if node.mix is None else node.mix.then(mix))
    # Anything that keeps every entry, or at least the map's own two axes, may still be on its way to the values.
    if result.numel() == math.prod(node.softmax.shape) or shape[-2:] == node.softmax.shape[2:]:
        return replace(node, shape=shape, lossy=True)
    return None


def _query_key(node: _Scores, heads: Heads) -> QueryKey:
    """Own copies of queries and keys with the heads where they belong."""
    q, k = node.q, node.k.mT
    if len(node.shape) == 4:
        batch, count = node.shape[:2]
        q, k = q.reshape(batch, count, *q.shape[1:]), k.reshape(batch, count, *k.shape[1:])
    else:
        q, k = four_axes(q, heads), four_axes(k, heads)
    contiguous = torch.contiguous_format
    return QueryKey(q.clone(memory_format=contiguous), k.clone(memory_format=contiguous), node.scale, node.bias)
