"""Follow attention through the operators that a model runs, from the softmax to its product with the values.

What is attention follows from dataflow, not from class names. A dispatch mode sees every operator below autograd and
autocast, so it sees what the kernels see (under autocast, the kernel's dtype), leaves fused kernels, native fast paths
and outputs exactly as they are, and needs no cooperation of the model:

- a fused kernel (`_scaled_dot_product_*_attention*`) brings queries, keys, scale, bias and, on the CPU, each row's
  normaliser;
- the native encoder layer brings its input and its weights, from which queries and keys follow;
- an explicit softmax is followed through reshapes, dropout, head mixing and normalisation to the batched product whose
  operand it is. Scores that came from a product of queries and keys, scaled, biased and mixed, make the map lazy; where
  something happens that is not understood, the tensor that multiplied the values is kept instead;
- two maps that multiplied the same values and whose outputs are added or subtracted are one map;
- a softmax that never reaches a product is reported, so that nothing is missed in silence.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.capture.attention_map import Source
from collapse_probe.capture.axes import Site, arrangement
from collapse_probe.capture.hooks import Running
from collapse_probe.capture.kernels import NATIVE, fused_sighting, is_fused_attention, native_sighting
from collapse_probe.capture.operators import (
    arrives_whole,
    as_number,
    autocast_within,
    keeps_order,
    memory_key,
    run_parts,
    storage_of,
    tensors_in,
    written_storages,
)
from collapse_probe.capture.residual import ResidualFollower
from collapse_probe.capture.scores import ADD, DIVIDE, MULTIPLY, SUBTRACT, Scores, Term
from collapse_probe.capture.sighting import Product, Sighting
from collapse_probe.capture.weights import Weights, stored
from collapse_probe.capture.windows import WindowCut
from collapse_probe.errors import is_out_of_memory

aten = torch.ops.aten

_LOGARITHMS = {aten._log_softmax.default, aten._log_softmax.out, aten.log_softmax.int_out}
_SOFTMAX = {
    aten._softmax.default,
    aten._softmax.out,
    aten.softmax.int_out,
    aten._safe_softmax.default,
    *_LOGARITHMS,
}
_PRODUCTS = {
    **dict.fromkeys((aten.bmm.default, aten.bmm.out, aten.mm.default, aten.mm.out), (0, 1)),
    aten.baddbmm.default: (1, 2),
}


#: Set while a tracer computes something of its own: another tracer around it must not take that for the model's.
_BOOKKEEPING = threading.local()


@contextlib.contextmanager
def followed(residual: ResidualFollower) -> Iterator[None]:
    """Within the block, what runs is not the model's; whatever goes wrong ends the following of this pass, no more."""
    before, _BOOKKEEPING.on = getattr(_BOOKKEEPING, "on", False), True
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        residual.fail(error)
    finally:
        _BOOKKEEPING.on = before


@dataclass(frozen=True)
class _Output:
    """What came out of a product with the values, times a number: it may meet another map's output.

    Attributes:
        shape: of the tensor that is followed.
        sighting: the map.
        values: what tells the values from others, beginning with their storage.
        alive: keep the addresses in it from being used again.
        factor: the number.
    """

    shape: tuple[int, ...]
    sighting: Sighting
    values: tuple[Any, ...]
    alive: tuple[StorageWeakRef, ...]
    factor: float = 1.0

    def rests_on(self, storages: set[int]) -> bool:
        """Whether the values lie in this memory."""
        return self.values[0] in storages

    def step(self, position: int, func: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> _Output | None:
        """After an operator that scales or reshapes; None after any other."""
        if func in MULTIPLY or (func in DIVIDE and position == 0):
            factor = as_number(args[1 - position])
            if factor is None or kwargs:
                return None
            return replace(self, factor=self.factor / factor if func in DIVIDE else self.factor * factor)
        if position == 0 and keeps_order(func, args, out):
            return replace(self, shape=tuple(out.shape))
        return None


_Node = Scores | Weights | _Output
_Followed = list[tuple[_Node, int]]
_Emit = Callable[[Sighting], None]


class AttentionTracer(TorchDispatchMode):
    """Sees every operator while it is active and reports attention to `emit`.

    Following never changes what runs: an operator is called once, as it came, and whatever goes wrong in following it
    becomes a reported gap.

    Args:
        emit: receives each :class:`Sighting` at the moment of its product with the values.
        where: the running module of the model under observation, or None; elsewhere operators pass untouched.
        site: answers what is known of the place where attention runs.
        parameters: storages of the model's parameters; products with them are linear layers.
        keep_values: whether a map that consists of several is reported with its product, for which values must live on.
        residual: follows the residual stream, where features are asked for.

    Attributes:
        ran: serial numbers of all softmaxes and attention kernels that ran, counted before any is looked at.
        unfinished: softmax -> (module, what is known of it), for those that have not multiplied values so far.
        cut: how the running features were cut into windows last.
    """

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """That this mode only watches: `flex_attention` compiles itself and refuses to where other modes are active."""
        return True

    def __init__(
        self,
        emit: _Emit,
        where: Callable[[], Running | None],
        site: Callable[[], Site],
        parameters: set[int],
        keep_values: bool = False,
        residual: ResidualFollower | None = None,
    ) -> None:
        super().__init__()
        self._residual = residual
        self._keep_values = keep_values
        self._emit, self._where, self._site, self._parameters = emit, where, site, parameters
        self._nodes: dict[tuple[Any, ...], tuple[StorageWeakRef, _Node]] = {}
        # Weak references keep addresses from being used again, so that what was copied can be told.
        self._copies: dict[int, tuple[StorageWeakRef, StorageWeakRef, tuple[Any, ...]]] = {}
        self._serials = itertools.count()
        self.ran: set[int] = set()
        self.unfinished: dict[int, tuple[nn.Module, str]] = {}
        self.cut = WindowCut()

    def reset(self) -> None:
        """Forget everything of the last pass."""
        for record in (self._nodes, self._copies, self.ran, self.unfinished):
            record.clear()
        self.cut = WindowCut()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        running = self._where()
        if running is None or getattr(_BOOKKEEPING, "on", False):
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            out = func(*args, **kwargs)
            if "attention" in str(func):
                reason = f"{func} is a kernel of its own that shows neither logits nor map"
                self._emit(Sighting(frozenset({self._ran()}), reason=reason))
            return out
        if arrives_whole(func, args):
            # Under inference mode composite operators arrive whole; run their own parts, which is what they would do.
            with self:
                return run_parts(func, args, kwargs)
        attends = is_fused_attention(func) or func in NATIVE or func in _SOFTMAX
        serial = self._ran() if attends else None
        found = self._followed(args) if self._nodes else []
        summed = None
        if self._residual is not None:
            with followed(self._residual):
                summed = self._residual.before(func, args, kwargs)
        with autocast_within(running.autocast if func in NATIVE else ()):
            out = func(*args, **kwargs)
        _BOOKKEEPING.on = True
        try:
            self._observe(serial, found, func, args, kwargs, out)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._nodes.clear()
            reason = f"its operators could not be followed ({type(error).__name__}: {error})"
            self._emit(Sighting(frozenset() if serial is None else frozenset({serial}), reason=reason))
        finally:
            _BOOKKEEPING.on = False
        if self._residual is not None:
            with followed(self._residual):
                self._residual.after(func, args, kwargs, out, summed)
        return out

    def _running(self) -> Running:
        running = self._where()
        assert running is not None  # operators are looked at only while a module runs
        return running

    def _ran(self) -> int:
        serial = next(self._serials)
        self.ran.add(serial)
        return serial

    def _observe(
        self, serial: int | None, found: _Followed, func: Any, args: Any, kwargs: dict[str, Any], out: Any
    ) -> None:
        if func._schema.is_mutable and self._nodes and (serial is not None or func in _PRODUCTS):
            self._invalidate(written_storages(func, args, kwargs))
        if serial is not None:
            if is_fused_attention(func):
                sighting = fused_sighting(serial, func, args, kwargs, out, self._site())
                self._seen(sighting, args[2] if len(args) > 2 else kwargs.get("value"), out[0])
            elif func in NATIVE:
                with autocast_within(self._running().autocast):
                    sighting = native_sighting(serial, func, args, kwargs, out, self._site())
                self._emit(sighting)
            else:
                self._softmax(serial, func, found, args[0], args[1], out)
            return
        if func in _PRODUCTS and self._product(found, func, args, kwargs, out):
            return
        self.cut.see(func, args)
        if func is aten.clone.default:
            self._copied(args[0], out)
        following = self._step(found, func, args, kwargs, out)
        if func._schema.is_mutable and self._nodes:
            self._invalidate(written_storages(func, args, kwargs))
        if following is not None:
            self._follow(out[0] if isinstance(out, (tuple, list)) else out, following)

    # -- following tensors -------------------------------------------------------------------------------------------

    def _node(self, tensor: Tensor) -> _Node | None:
        entry = self._nodes.get(memory_key(tensor))
        return None if entry is None else entry[1]

    def _followed(self, args: tuple[Any, ...]) -> _Followed:
        """The followed tensors among the arguments and where they stand; -1 within a list."""
        found: _Followed = []
        for position, argument in enumerate(args):
            for tensor in tensors_in(argument):
                node = self._node(tensor)
                if node is not None:
                    found.append((node, position if tensor is argument else -1))
        return found

    def _follow(self, tensor: Tensor, node: _Node) -> None:
        self._nodes[memory_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), node)

    def _forget_freed(self) -> None:
        self._nodes = {key: entry for key, entry in self._nodes.items() if not entry[0].expired()}
        self._copies = {key: entry for key, entry in self._copies.items() if not entry[0].expired()}

    def _copied(self, tensor: Tensor, copy: Tensor) -> None:
        own, source = (StorageWeakRef(item.untyped_storage()) for item in (copy, tensor))
        self._copies[storage_of(copy)] = own, source, memory_key(tensor)

    def _content(self, tensor: Tensor) -> tuple[tuple[Any, ...], tuple[StorageWeakRef, ...]]:
        """What tells a tensor's content from others, its memory or that of which it is a copy; and what keeps those
        addresses from being used again."""
        entry, own = self._copies.get(storage_of(tensor)), StorageWeakRef(tensor.untyped_storage())
        if entry is None or entry[0].expired():
            return memory_key(tensor), (own,)
        _, source, key = entry
        return (key[0], key, memory_key(tensor)[1:]), (own, source)  # this view of a copy of that

    def _invalidate(self, written: Iterable[int]) -> None:
        """Memory was written to, perhaps through a view: what was made of it is no longer known by its ingredients."""
        storages = set(written)
        self._copies = {key: entry for key, entry in self._copies.items() if key not in storages}
        nodes: dict[tuple[Any, ...], tuple[StorageWeakRef, _Node]] = {}
        for key, (reference, node) in self._nodes.items():
            own = key[0] in storages
            if isinstance(node, Weights):
                nodes[key] = (reference, replace(node, lossy=True) if own else node)
            elif isinstance(node, Scores):
                nodes[key] = (reference, node.without_numbers() if own or node.rests_on(storages) else node)
            elif not own and not node.rests_on(storages):
                nodes[key] = (reference, node)
        self._nodes = nodes

    def _step(self, found: _Followed, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> _Node | None:
        """What becomes of followed tensors under an operator; None where they are lost."""
        result = out[0] if isinstance(out, (tuple, list)) and out else out
        if not found or not isinstance(result, Tensor):
            return None
        if func is aten.copy_.default:  # what was there is gone, what is copied goes on
            copied = next((node for node, position in found if position == 1), None)
            return copied if copied is not None and copied.shape == tuple(result.shape) else None
        outputs = [node for node, _ in found if isinstance(node, _Output)]
        if len(outputs) == 2:
            return self._met(outputs[0], outputs[1], func, kwargs, result)
        weights = [(node, position) for node, position in found if isinstance(node, Weights)]
        if not weights:
            node, position = found[0]
            return node.step(position, func, args, kwargs, result)
        # A map of tokens outranks a gate that it meets.
        (first, position), *others = sorted(weights, key=lambda item: item[0].contraction is None)
        after = first.step(position, func, args, kwargs, out)
        return None if after is None else after.joined([other for other, _ in others])

    # -- the operators that matter -----------------------------------------------------------------------------------

    def _product(self, found: _Followed, func: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> bool:
        """A product is a map times values, queries times keys, or something that happens to either."""
        left, right = (args[position] for position in _PRODUCTS[func])
        for operand, applied in ((left, left), (right, right.mT)):
            node = self._node(operand)
            if isinstance(node, Weights) and node.multiplies(applied):
                values, output = (right, out) if operand is left else (left.mT, out.mT)
                if func is aten.baddbmm.default:
                    output = (output - args[0] * kwargs.get("beta", 1)) / kwargs.get("alpha", 1)
                self._applied(node, applied, operand is right, values, output)
                return True
            if isinstance(node, Weights) and operand is left and node.multiplies_grouped(applied):
                self._applied_grouped(node, applied, right, out)
                return True
        if any(isinstance(node, Weights) or (isinstance(node, Scores) and node.mixing.heads_last) for node, _ in found):
            return False
        if left.ndim == 2 and self._parameters & {storage_of(left), storage_of(right)}:
            return False
        self._forget_freed()
        self._follow(out, self._scores(func, args, kwargs, left.detach(), right.detach(), out))
        return True

    @staticmethod
    def _scores(func: Any, args: Any, kwargs: dict[str, Any], left: Tensor, right: Tensor, out: Tensor) -> Scores:
        shape = tuple(out.shape)
        scores = Scores(shape, shape[:-2], (shape[-2], shape[-1]), left.shape[-1], left, right)
        if func is aten.baddbmm.default:
            beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
            biases = () if beta == 0 else (Term(args[0].detach() * beta, shape[:-2]),)
            return replace(scores, scale=float(alpha), biases=biases)
        return scores

    def _applied(self, node: Weights, applied: Tensor, right: bool, values: Tensor, output: Tensor) -> None:
        """Weights multiplied values: a map."""
        for serial in node.serials:
            self.unfinished.pop(serial, None)
        axes = node.arrangement(applied, self._site())
        sighting = Sighting(
            node.serials,
            node.softmax,
            node.mixing.mix,
            windows=axes.windows,
            contraction=node.contraction,
            unbatched=applied.ndim == 2,
            product=Product(values.detach(), output.detach(), axes),
        )
        aligned = node.softmax.shape[0] == axes.images * axes.windows
        if not node.straight(right) or not aligned:
            # Only the operand itself can tell what multiplied the values.
            origin = None if node.straight(right) and node.mixing.mix is None else node.softmax
            sighting = replace(sighting, source=stored(applied, axes), mix=None, origin=origin)
            if origin is not None and not aligned:
                reason = "its heads were taken apart after the softmax, and the map was changed: they cannot be told"
                sighting = Sighting(node.serials, reason=reason)
        self._seen(sighting, values, output)

    def _applied_grouped(self, node: Weights, applied: Tensor, values: Tensor, output: Tensor) -> None:
        """Weights multiplied the values of one key head for several query heads, whose queries stand as one axis."""
        for serial in node.serials:
            self.unfinished.pop(serial, None)
        queries, keys = node.axes
        group = applied.shape[-2] // queries
        lead = node.merged_lead(group)
        axes = arrangement(lead, self._site())
        kept = stored(applied.reshape(*lead, queries, keys), axes)
        values = values.detach()[..., None, :, :].expand(*values.shape[:-2], group, *values.shape[-2:])
        product = Product(values.flatten(0, -3), output.detach().reshape(-1, queries, output.shape[-1]), axes)
        softmax = stored(node.softmax.rows(0, queries).reshape(*lead, queries, keys), axes) if node.lossy else None
        sighting = Sighting(node.serials, kept, None, softmax, axes.windows, node.contraction, product=product)
        self._emit(sighting)

    def _seen(self, sighting: Sighting, values: Any, output: Tensor) -> None:
        self._emit(sighting)
        if isinstance(values, Tensor) and sighting.source is not None and sighting.contraction is not None:
            known = sighting if self._keep_values else replace(sighting, product=None)
            self._follow(output, _Output(tuple(output.shape), known, *self._content(values)))

    def _met(self, one: _Output, other: _Output, func: Any, kwargs: dict[str, Any], out: Tensor) -> _Output | None:
        """Two outputs were added or subtracted: one map, if both multiplied the same values."""
        if one.sighting.serials & other.sighting.serials:
            return None
        if func not in ADD | SUBTRACT or kwargs or one.values != other.values or one.shape != other.shape:
            return None
        sign = -1.0 if func in SUBTRACT else 1.0
        combined = one.sighting.combined(one.factor, other.sighting, sign * other.factor, out.detach())
        if combined is None:
            return None
        self._emit(combined)
        return _Output(tuple(out.shape), combined, one.values, one.alive)

    def _softmax(self, serial: int, func: Any, found: _Followed, logits: Tensor, dim: int, out: Tensor) -> None:
        module = self._running().module
        axis = dim % max(1, logits.ndim)
        scores = next((node for node, _ in found if isinstance(node, Scores)), None)
        row = scores is None and logits.ndim < 3  # one row for each image
        if row:
            reason = ""  # a classifier's probabilities, unless they meet values
        elif scores is None:
            reason = f"a softmax over axis {axis} of {list(logits.shape)} that compares no queries with keys: a gate"
        else:
            reason = f"a softmax over axis {axis} of {list(logits.shape)} was not seen to multiply values"
        self.unfinished[serial] = (module, reason)
        transposed = axis == logits.ndim - 2
        if row and transposed:
            return
        if logits.ndim < 2 or axis < logits.ndim - 2 or (scores is not None and scores.mixing.heads_last):
            return
        shape = tuple(logits.shape)
        whole = scores is not None and scores.known and scores.shape == shape and shape[-2:] == scores.axes
        fits = scores is not None and whole and math.prod(scores.lead) == math.prod(shape[:-2])
        lead = scores.lead if scores is not None and fits else shape[:-2]
        axes = arrangement(lead, self._site())
        source: Source | None = None
        if scores is not None and whole:
            source = scores.query_key(axes, transposed)
        logarithm = func in _LOGARITHMS
        if row:
            lead, axes, out = shape[:1], arrangement(shape[:1], Site(shape[0])), out[:, None]
        if source is None:  # an own copy, because what comes next may write to it
            probabilities = out.exp() if logarithm else out
            source = stored(probabilities.mT if transposed else probabilities, axes)
        weights = Weights(
            shape,
            lead,
            frozenset({serial}),
            source,
            None if scores is None else scores.contraction,
            transposed=transposed,
            logarithm=logarithm,
        )
        self._follow(out, weights)


def _see_flex_attention() -> None:
    """Older versions of PyTorch (2.6, 2.7) ask for a rule before an operator of higher order runs under a mode."""
    if hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        return
    from torch._higher_order_ops.flex_attention import flex_attention

    def rule(mode: AttentionTracer, *args: Any, **kwargs: Any) -> Any:
        return mode.__torch_dispatch__(flex_attention, (), args, kwargs)

    flex_attention.py_impl(AttentionTracer)(rule)


_see_flex_attention()
