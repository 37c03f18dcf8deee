"""`capture(model)`: the attention of every layer, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.capture.attention_map import AttentionMap, Combination, TokenLayout
from collapse_probe.capture.axes import Site
from collapse_probe.capture.dataflow import AttentionTracer, followed
from collapse_probe.capture.features import TokenFeatures, head_norms
from collapse_probe.capture.hooks import ModuleStack, Running
from collapse_probe.capture.layout import token_layout
from collapse_probe.capture.meaning import heads, kind, meaning, partition
from collapse_probe.capture.operators import storage_of
from collapse_probe.capture.residual import ResidualFollower
from collapse_probe.capture.sighting import Product, Sighting
from collapse_probe.capture.verification import Verification, product_error, tolerance
from collapse_probe.errors import UsageError, is_out_of_memory

_ATTENTION_CLASS = re.compile(r"attn|attention", re.IGNORECASE)

#: PyTorch's own layers, which take sequences before batches unless told otherwise.
_SEQUENCE_MODELS = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)

#: Kinds of attention whose keys are the tokens of one image.
_KEYS_ARE_TOKENS = ("token", "class", "pooling")

_ACROSS_IMAGES = (
    "its queries and keys are the {} images of the batch: the softmax runs across images, so what the model says of "
    "one depends on the others"
)


class Captured:
    """What a capture has seen of the last forward pass.

    Attributes:
        maps: qualified layer name -> :class:`AttentionMap`, in execution order, detached; a layer that attends twice
            gives ``"name"`` and ``"name#1"``.
        not_captured: layer name -> reason, for layers that attended, or look as if they should have, and have no map.
        verification: what a capture with ``verify=True`` showed of that pass; None without.
        features: name of a block -> :class:`TokenFeatures`, the residual stream after it, in execution order; empty
            without ``features=True``.
        no_features: attention layer, a key of `maps` -> reason why no block with features holds it.
        head_norms: attention layer -> `[B, H]`, the root mean square of each head's output over queries and channels,
            where that was seen: a head whose values are zero has 0. With ``features=True`` only.
    """

    def __init__(self, model: nn.Module, verify: bool = False, features: bool = False) -> None:
        self.maps: dict[str, AttentionMap] = {}
        self.not_captured: dict[str, str] = {}
        self.features: dict[str, TokenFeatures] = {}
        self.no_features: dict[str, str] = {}
        self.head_norms: dict[str, Tensor] = {}
        self.verification = Verification() if verify else None
        self._pass = _Pass()
        self._stale = False
        self._residual = (
            ResidualFollower(lambda: self._stack.running, lambda: self._pass.image_size) if features else None
        )
        watched = (self._entered, self._left) if features else ()
        self._stack = ModuleStack(model, self._begin, self._end, *watched)
        parameters = {storage_of(parameter) for parameter in model.parameters()}
        self._tracer = AttentionTracer(
            self._record, lambda: self._stack.top, self._site, parameters, verify, self._residual
        )

    def __repr__(self) -> str:
        missing = f", {len(self.not_captured)} not captured" if self.not_captured else ""
        return f"Captured({len(self.maps)} maps{missing})"

    def _close(self) -> None:
        """Hooks off, and no reference left from the watchers back to here: a batch of maps would otherwise live on
        until the garbage collector looks for cycles."""
        if self._stack.elsewhere and not self._stack.ran:
            self._name_elsewhere()
        self._stack.detach()
        self._tracer.reset()
        if self._residual is not None:
            self._residual.reset()
        del self._stack, self._tracer, self._residual

    # -- a pass ------------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """A pass begins. What is known is thrown away only when it attends: `forward_head` after a pass does not."""
        self._stale = True
        self._tracer.reset()
        if self._residual is not None:
            self._residual.reset()
        self._pass = _Pass(*_batch(module, [*inputs, *keywords.values()]))

    def _refresh(self) -> None:
        if self._stale:
            self.maps, self.not_captured, self._stale = {}, {}, False
            self.features, self.no_features, self.head_norms = {}, {}, {}
            if self.verification is not None:
                self.verification = Verification()

    def _end(self) -> None:
        tracer, known = self._tracer, self._pass
        for serial, (module, reason) in tracer.unfinished.items():
            if not reason:
                tracer.ran.discard(serial)
                continue
            self._refresh()
            known.seen.add(module)
            self._gap(self._name(module), reason, frozenset({serial}))
        self._name_elsewhere()
        for module, name in self._stack.names.items():
            if (
                _looks_like_attention(module)
                and module in self._stack.ran
                and not any(part in known.seen for part in module.modules())
            ):
                self._refresh()
                self.not_captured[name] = "it ran, and no product of a softmax with values was seen in it"
        if self.verification is not None and not self._stale:
            self._count(self.verification, tracer.ran)
        tracer.reset()
        if self._residual is not None:
            if not self._stale:
                with followed(self._residual):
                    self.features, self.no_features = self._residual.result(self.maps, self._name)
                if self._residual.failure:
                    self.features, self.no_features = self._residual.result(self.maps, self._name)
            self._residual.reset()

    def _entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._residual is not None:
            with followed(self._residual):
                self._residual.enter(module, inputs)

    def _left(self, module: nn.Module, output: Any) -> None:
        if self._residual is not None:
            with followed(self._residual):
                self._residual.leave(module, output)

    def _name_elsewhere(self) -> None:
        """List the outermost modules that ran in other threads."""
        names = {self._name(module) for module in self._stack.elsewhere}
        whole = {self._name(module) for module in self._stack.elsewhere if not self._stack.names[module]}
        for name in whole or {name for name in names if not any(name.startswith(f"{other}.") for other in names)}:
            self._refresh()
            self.not_captured[name] = "it ran in another thread, where it cannot be observed"

    def _count(self, verification: Verification, ran: set[int]) -> None:
        captured = set().union(*self._pass.mapped.values())
        named = self._pass.named - captured
        verification.kernels, verification.captured, verification.named = (
            len(ran),
            len(captured & ran),
            len(named & ran),
        )
        missing = ran - captured - named
        if missing:
            verification.failures.append(f"{len(missing)} softmaxes or attention kernels were overlooked")

    # -- what the tracer reports -------------------------------------------------------------------------------------

    def _name(self, module: nn.Module) -> str:
        return self._stack.names[module] or type(module).__name__

    def _site(self) -> Site:
        running = self._stack.running
        return Site(self._pass.images, heads(running), meaning(running).windows_last)

    def _gap(self, name: str, reason: str, serials: frozenset[int]) -> None:
        self.not_captured[_unused(name, self.maps.keys() | self.not_captured.keys())] = reason
        self._pass.named |= serials

    def _record(self, sighting: Sighting) -> None:
        running, known = self._stack.running, self._pass
        top = running[-1].module  # the tracer is active only while a module runs
        self._refresh()
        known.seen.add(top)
        name = f"{self._name(top)}.{sighting.submodule}" if sighting.submodule else self._name(top)
        if sighting.source is None:
            self._attended(None, "", running)
            return self._gap(name, sighting.reason, sighting.serials)
        if sighting.unbatched and known.image_size and sighting.source.shape[2:] == (known.images, known.images):
            return self._gap(name, _ACROSS_IMAGES.format(known.images), sighting.serials)
        again = self._seen_before(name, sighting)
        if again:
            return self._attended(again, "", running)
        parts: list[str] = []
        if isinstance(sighting.source, Combination):
            parts = [key for key, serials in known.mapped.items() if serials < sighting.serials]
        attention = self._map(parts[0] if parts else "", name, sighting, running)
        for key in parts:
            del self.maps[key], known.mapped[key]
            if self.verification is not None:
                self.verification.errors.pop(key, None)
        self.maps[attention.name] = attention
        known.mapped[attention.name] = sighting.serials
        self._attended(attention.name, attention.kind, running, parts)
        if self._residual is not None:
            self._keep_head_norms(attention, sighting.product, parts)
        if self.verification is not None and sighting.product is not None:
            self._verify(self.verification, attention, sighting.product)
        return None

    def _attended(self, layer: str | None, what: str, running: list[Running], parts: list[str] | None = None) -> None:
        """Tell the follower of the residual stream that attention ran, and the key and kind of its map, if any."""
        if self._residual is None:
            return
        known, said = self._pass, meaning(running)
        sizes = (known.images or 1, 1, 1)
        if layer is not None:
            attention = self.maps[layer]
            sizes = (known.images or attention.images, attention.windows, attention.shape[2])
        gridless = said.shuffled or (said.own_grids and known.image_size is None)
        gridless = gridless or (said.windows_last and what != "gate")  # tokens stand window by window
        with followed(self._residual):
            self._residual.attended(layer, what, sizes, gridless, parts or [])

    def _keep_head_norms(self, attention: AttentionMap, product: Product | None, parts: list[str]) -> None:
        for key in parts:
            self.head_norms.pop(key, None)
        try:
            norms = None if product is None else head_norms(attention, product)
        except Exception as error:  # an output that has no axis of heads
            if is_out_of_memory(error):
                raise
            norms = None
        if norms is not None:
            self.head_norms[attention.name] = norms

    def _seen_before(self, name: str, sighting: Sighting) -> str:
        """The key of this map where it has multiplied other values of the same layer before; empty if it has not."""
        for key, serials in self._pass.mapped.items():
            if serials == sighting.serials and key.partition("#")[0] == name and sighting.origin is None:
                known = self.maps[key]
                return key if known.source is sighting.source and known.mix is sighting.mix else ""
        return ""

    def _map(self, whole_of: str, name: str, sighting: Sighting, running: list[Running]) -> AttentionMap:
        known, source = self._pass, sighting.source
        assert source is not None
        what = kind(sighting, running)
        layout = TokenLayout()
        if what in _KEYS_ARE_TOKENS:
            layout = token_layout([item.module for item in running], source.shape[3], known.image_size)
            said = meaning(running)
            if said.shuffled or (said.own_grids and known.image_size is None):
                layout = TokenLayout(layout.prefix_tokens)
        key = whole_of or _unused(name, self.maps.keys() | self.not_captured.keys())
        words = self._tracer.cut.words(sighting.windows, source.shape[2]) if sighting.windows > 1 else ""
        return AttentionMap(
            key, what, layout, source, sighting.mix, sighting.origin, sighting.windows, partition(running, words)
        )

    def _verify(self, verification: Verification, attention: AttentionMap, product: Product) -> None:
        """Check a map against the model's own product; one that does not agree is none."""
        try:
            error = product_error(attention, product)
        except Exception as broken:  # shapes that do not fit each other, or tensors without values
            if is_out_of_memory(broken):
                raise
            error = math.nan
        verification.errors[attention.name] = error
        if not error <= tolerance(product):
            failure = f"map times values differs from the model's own product by {error:.1e} of its largest entry"
            verification.failures.append(f"{attention.name}: {failure}")
            del self.maps[attention.name]
            self.head_norms.pop(attention.name, None)
            self._gap(attention.name, failure, self._pass.mapped.pop(attention.name))


@dataclass
class _Pass:
    """What is known of the running pass.

    Attributes:
        images: images in the batch; None where the inputs do not tell.
        image_size: height and width of the images, where they are images.
        seen: modules in which attention was seen.
        mapped: layer -> the softmaxes and kernels in its map.
        named: those that are listed with a reason.
    """

    images: int | None = None
    image_size: tuple[int, int] | None = None
    seen: set[nn.Module] = field(default_factory=set)
    mapped: dict[str, frozenset[int]] = field(default_factory=dict)
    named: set[int] = field(default_factory=set)


@contextlib.contextmanager
def capture(model: nn.Module, verify: bool = False, features: bool = False) -> Iterator[Captured]:
    """Capture every layer's attention map while the block lasts; outputs stay bit for bit what they were.

    Maps are exact: what multiplied the values, up to the kernel's own rounding. A layer whose map cannot be known is
    listed in ``captured.not_captured`` with the reason. Fused attention stays on; no mode or flag of the model changes.

    Args:
        model: any torch model with softmax attention. A model compiled with `torch.compile` is run eagerly inside the
            block, with a warning, because compiled code cannot be observed.
        verify: check every map against the model's own product with the values, and that every softmax and attention
            kernel that ran is captured or named: see ``captured.verification``. A map that does not agree is listed in
            ``captured.not_captured`` instead. Costs about two more computations of attention, and
            keeps the values of the last layers alive.
        features: follow the residual stream, and keep the token features after every block with attention, and how
            large what its branches add is: see ``captured.features`` and, for layers without, ``captured.no_features``.
            Keeps a copy of `[B, T, C]` for each block.

    Yields:
        A :class:`Captured` whose maps belong to the last forward pass of the model in this thread.

    Raises:
        UsageError: `model` is not an `nn.Module`.

    Example:
        >>> import torch, timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> with capture(model) as captured:
        ...     _ = model(torch.zeros(1, 3, 224, 224))
        >>> captured.maps["blocks.1.attn"].shape
        (1, 3, 197, 197)
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"capture() takes an nn.Module, not {type(model).__name__}. Load it with load_model() first.")
    captured = Captured(model, verify, features)
    with contextlib.ExitStack() as stack:
        if _is_compiled(model):
            warnings.warn("The model is compiled; it runs eagerly while its attention is captured.", stacklevel=3)
        # Parts that compile themselves (flex_attention in Hugging Face models) would not be seen either.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        captured._stack.attach()
        stack.callback(captured._close)
        stack.enter_context(captured._tracer)
        yield captured


def _batch(module: nn.Module, inputs: list[Any]) -> tuple[int | None, tuple[int, int] | None]:
    """How many images a pass is given, and their height and width where they are images."""
    tensors = [tensor for item in inputs for tensor in _tensors(item) if tensor.ndim and not tensor.is_nested]
    first = next((tensor for tensor in tensors if tensor.ndim >= 3), tensors[0] if tensors else None)
    if first is None:
        return None, None
    if first.ndim == 4:
        return first.shape[0], (first.shape[2], first.shape[3])
    if first.ndim == 2:  # one sequence, or several vectors
        return None, None
    sequence_first = isinstance(module, _SEQUENCE_MODELS) and any(
        getattr(part, "batch_first", True) is False for part in module.modules()
    )
    return first.shape[1 if sequence_first and first.ndim == 3 else 0], None


def _tensors(item: Any) -> list[Tensor]:
    if isinstance(item, Mapping):
        return [tensor for value in item.values() for tensor in _tensors(value)]
    return [item] if isinstance(item, Tensor) else []


def _is_compiled(model: nn.Module) -> bool:
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _looks_like_attention(module: nn.Module) -> bool:
    """An innermost module that calls itself attention and has weights to attend with."""
    if not _ATTENTION_CLASS.search(type(module).__name__):
        return False
    if any(_ATTENTION_CLASS.search(type(child).__name__) for child in module.modules() if child is not module):
        return False
    return next(module.parameters(), None) is not None


def _unused(name: str, taken: Any) -> str:
    if name not in taken:
        return name
    number = 1
    while f"{name}#{number}" in taken:
        number += 1
    return f"{name}#{number}"
