"""Follow attention through the operators that a model runs, from the softmax to its product with the values.

What is attention follows from dataflow, not from class names. A dispatch mode sees every operator below autograd and
autocast, so it sees what the kernels see (under autocast, the kernel's dtype), leaves fused kernels, native fast paths
and outputs exactly as they are, and needs no cooperation of the model:

- a fused kernel (`_scaled_dot_product_*_attention*`) brings queries, keys, scale, bias and, on the CPU, each row's
  normaliser;
- the native encoder layer brings its input and its weights, from which queries and keys follow;
- an explicit softmax is followed through reshapes, dropout, head mixing and normalisation to the batched product whose
  left operand it is. Scores that came from a batched product of queries and keys, scaled and biased, make the map lazy;
  where something happens that is not understood, the tensor that multiplied the values is kept instead;
- a softmax that never reaches a product is reported, so that nothing is missed in silence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
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
from collapse_probe.capture.operators import (
    arrives_whole,
    as_number,
    memory_key,
    run_parts,
    storage_of,
    tensors_in,
    written_storages,
)

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
    """A softmax on its way to the values.

    Attributes:
        serial: which softmax.
        shape: of the tensor that is followed.
        softmax: the softmax itself, an own copy or its ingredients.
        mix: what was applied over heads.
        transposed: whether queries and keys have changed places.
        lossy: whether something was applied that only the tensor itself can tell.
    """

    serial: int
    shape: tuple[int, ...]
    softmax: Source
    mix: HeadMix | None = None
    transposed: bool = False
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
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
_SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
_PRODUCTS = {aten.bmm.default}
_MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor}
_DIVIDE = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar}
_ADD = {aten.add.Tensor, aten.add_.Tensor}


class AttentionTracer(TorchDispatchMode):
    """Sees every operator while it is active and reports attention to `emit`.

    Following never changes what runs: an operator is called once, as it came, and whatever goes wrong in following it
    becomes a reported gap.

    Args:
        emit: receives each :class:`Sighting` at the moment of its product with the values.
        where: the running module of the model under observation, or None; elsewhere operators pass untouched.
        heads: answers how many heads that module has, or None; asked only where heads are folded into the batch axis.
    """

    supports_higher_order_operators = True

    def __init__(self, emit: _Emit, where: Callable[[], nn.Module | None], heads: Heads) -> None:
        super().__init__()
        self._emit, self._where, self._heads = emit, where, heads
        self._nodes: dict[tuple[Any, ...], tuple[StorageWeakRef, _Node]] = {}
        self._serials = itertools.count()
        self.unfinished: dict[int, tuple[nn.Module, str]] = {}

    def reset(self) -> None:
        """Forget every tensor that is being followed."""
        self._nodes.clear()
        self.unfinished.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._where() is None:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            out = func(*args, **kwargs)
            if "attention" in str(func):
                self._emit(Sighting(reason=f"{func} is a kernel of its own that shows neither logits nor map"))
            return out
        if arrives_whole(func, args):
            # Under inference mode composite operators arrive whole; run their own parts, which is what they would do.
            with self:
                return run_parts(func, args, kwargs)
        found = self._followed(args) if self._nodes else None
        out = func(*args, **kwargs)
        try:
            self._observe(found, func, args, kwargs, out)
        except Exception as error:
            self._nodes.clear()
            self._emit(Sighting(reason=f"its operators could not be followed ({type(error).__name__}: {error})"))
        return out

    def _observe(self, found: tuple[_Node, int] | None, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        node, position = found or (None, 0)
        if is_fused_attention(func):
            self._emit(fused_sighting(func, args, kwargs, out, self._heads))
        elif func in NATIVE:
            self._emit(native_sighting(func, args, kwargs))
        elif func in _PRODUCTS and self._product(args[0], args[1], out):
            pass
        elif func in _SOFTMAX:
            self._softmax(node, args[0], args[1], out)
        else:
            following = None if node is None else _step(node, position, func, args, kwargs, out)
            if func._schema.is_mutable and self._nodes:
                self._invalidate(written_storages(func, args, kwargs))
            if following is not None:
                self._follow(out[0] if isinstance(out, (tuple, list)) else out, following)

    # -- following tensors -------------------------------------------------------------------------------------------

    def _node(self, tensor: Tensor) -> _Node | None:
        entry = self._nodes.get(memory_key(tensor))
        return None if entry is None else entry[1]

    def _followed(self, args: tuple[Any, ...]) -> tuple[_Node, int] | None:
        """The first followed tensor among the arguments and where it stands; -1 within a list."""
        for position, argument in enumerate(args):
            for tensor in tensors_in(argument):
                node = self._node(tensor)
                if node is not None:
                    return node, position if tensor is argument else -1
        return None

    def _follow(self, tensor: Tensor, node: _Node) -> None:
        self._nodes[memory_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), node)

    def _forget_freed(self) -> None:
        self._nodes = {key: entry for key, entry in self._nodes.items() if not entry[0].expired()}

    def _invalidate(self, written: Iterable[int]) -> None:
        """Memory was written to, perhaps through a view: scores made of it are no longer known, weights are lossy."""
        written = set(written)
        nodes: dict[tuple[Any, ...], tuple[StorageWeakRef, _Node]] = {}
        for key, (reference, node) in self._nodes.items():
            if isinstance(node, _Weights):
                nodes[key] = (reference, replace(node, lossy=True) if key[0] in written else node)
            elif not written & {key[0], storage_of(node.q), storage_of(node.k)}:
                nodes[key] = (reference, node)
        self._nodes = nodes

    # -- the operators that matter -----------------------------------------------------------------------------------

    def _product(self, left: Tensor, right: Tensor, out: Tensor) -> bool:
        """A batched product is a map times values, queries times keys, or something that happens to either."""
        for operand, applied in ((left, left), (right, right.mT)):
            node = self._node(operand)
            if isinstance(node, _Weights) and tuple(applied.shape[-2:]) == node.softmax.shape[2:]:
                self.unfinished.pop(node.serial, None)
                straight = node.transposed == (operand is right) and not node.lossy
                self._emit(Sighting(node.softmax, node.mix) if straight else self._kept(node, applied))
                return True
        if isinstance(self._node(left), _Weights) or isinstance(self._node(right), _Weights):
            return False
        self._forget_freed()
        self._follow(out, _Scores(tuple(out.shape), left.detach(), right.detach()))
        return True

    def _softmax(self, node: _Node | None, logits: Tensor, dim: int, out: Tensor) -> None:
        if logits.ndim < 3:
            return
        serial, module = next(self._serials), self._where()
        assert module is not None
        axis = dim % logits.ndim
        self.unfinished[serial] = (
            module,
            f"a softmax over axis {axis} of {list(logits.shape)} was not seen to multiply values",
        )
        if axis != logits.ndim - 1:
            return
        source: Source | None = None
        if isinstance(node, _Scores) and node.shape == tuple(logits.shape):
            source = _query_key(node, self._heads)
        if source is None:  # an own copy, because what comes next may write to it
            source = Stored(four_axes(out.detach(), self._heads).clone())
        self._follow(out, _Weights(serial, tuple(out.shape), source))

    def _kept(self, node: _Weights, operand: Tensor) -> Sighting:
        """The operand itself is kept, because only it can tell what multiplied the values."""
        applied = operand.detach()
        if applied.numel() == math.prod(node.softmax.shape):
            applied = applied.reshape(node.softmax.shape)
        applied = four_axes(applied, self._heads).clone(memory_format=torch.contiguous_format)
        return Sighting(Stored(applied), origin=node.softmax)


def _step(node: _Node, position: int, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> _Node | None:
    """What becomes of a followed tensor under an operator, or None where it is lost."""
    result = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(result, Tensor):
        return None
    if isinstance(node, _Scores):
        return _scores_step(node, position, func, args, kwargs, result)
    return _weights_step(node, position, func, args, kwargs, out)


def _scores_step(
    node: _Scores, position: int, func: Any, args: Any, kwargs: dict[str, Any], out: Tensor
) -> _Scores | None:
    shape = tuple(out.shape)
    if position == 0 and _keeps_order(func, args, out):
        return replace(node, shape=shape)
    if shape != node.shape or position not in (0, 1) or len(args) < 2:
        return None
    other = args[1 - position]
    if func in _MULTIPLY or (func in _DIVIDE and position == 0 and not kwargs):
        factor = as_number(other)
        if factor is None:
            return None
        factor = 1 / factor if func in _DIVIDE else factor
        return replace(node, scale=node.scale * factor, bias=None if node.bias is None else node.bias * factor)
    if func in _ADD and isinstance(other, Tensor) and kwargs.get("alpha", 1) == 1:
        own_axes = shape[-2:] == (node.q.shape[-2], node.k.shape[-1])
        if not 2 <= other.ndim <= 4 or len(shape) != 4 or not own_axes or not other.is_floating_point():
            return None
        bias = shrunk(other)
        return replace(node, bias=bias if node.bias is None else node.bias + bias)
    return None


def _weights_step(
    node: _Weights, position: int, func: Any, args: Any, kwargs: dict[str, Any], out: Any
) -> _Weights | None:
    result = out[0] if isinstance(out, (tuple, list)) else out
    shape = tuple(result.shape)
    if position == 0:
        if _keeps_order(func, args, result):
            return replace(node, shape=shape)
        if func is aten.transpose.int and {args[1] % len(shape), args[2] % len(shape)} == {
            len(shape) - 2,
            len(shape) - 1,
        }:
            return replace(node, shape=shape, transposed=not node.transposed)
        if func is aten.native_dropout.default and not (args[2] and args[1] > 0):
            return replace(node, shape=shape)
        plain = not node.lossy and not node.transposed and node.shape == node.softmax.shape
        mix = head_mix(node.shape, func, args, kwargs, out) if plain else None
        if mix is not None:
            return replace(node, shape=shape, mix=mix if node.mix is None else node.mix.then(mix))
    # Anything that keeps every entry, or at least the map's own two axes, may still be on its way to the values.
    axes = node.softmax.shape[2:]
    if result.numel() == math.prod(node.softmax.shape) or shape[-2:] in (axes, axes[::-1]):
        return replace(node, shape=shape, lossy=True)
    return None


def _keeps_order(func: Any, args: Any, out: Tensor) -> bool:
    """Whether an operator only arranges the same entries, in the same order, under another shape."""
    if func is aten.permute.default:
        moved = [axis % args[0].ndim for axis in args[1]]
        kept = [axis for axis in moved if args[0].shape[axis] > 1]
        return kept == sorted(kept)
    return func in _SHAPES and out.numel() == args[0].numel()


def _query_key(node: _Scores, heads: Heads) -> QueryKey | None:
    """Own copies of queries and keys with the heads where they belong; None where the scores were expanded since."""
    q, k = node.q, node.k.mT
    if node.shape[-2:] != (q.shape[1], k.shape[1]) or math.prod(node.shape[:-2]) != q.shape[0]:
        return None
    if len(node.shape) == 4:
        batch, count = node.shape[:2]
        q, k = q.reshape(batch, count, *q.shape[1:]), k.reshape(batch, count, *k.shape[1:])
    elif node.bias is not None:
        return None
    else:
        q, k = four_axes(q, heads), four_axes(k, heads)
    contiguous = torch.contiguous_format
    return QueryKey(q.clone(memory_format=contiguous), k.clone(memory_format=contiguous), node.scale, node.bias)
