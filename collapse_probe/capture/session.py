"""`capture(model)`: the attention of every layer, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.capture.attention_map import AttentionMap, TokenLayout
from collapse_probe.capture.dataflow import AttentionTracer
from collapse_probe.capture.hooks import ModuleStack
from collapse_probe.capture.kernels import Sighting
from collapse_probe.capture.layout import token_layout
from collapse_probe.errors import UsageError

_ATTENTION_CLASS = re.compile(r"attn|attention", re.IGNORECASE)


class Captured:
    """What a capture has seen of the last forward pass.

    Attributes:
        maps: qualified layer name -> :class:`AttentionMap`, in execution order, detached; a layer that attends twice
            gives ``"name"`` and ``"name#1"``.
        not_captured: layer name -> reason, for layers that attended, or look as if they should have, and have no map.
    """

    def __init__(self, model: nn.Module) -> None:
        self.maps: dict[str, AttentionMap] = {}
        self.not_captured: dict[str, str] = {}
        self._model = model
        self._images: int | None = None
        self._image_size: tuple[int, int] | None = None
        self._seen: set[str] = set()
        self._stack = ModuleStack(model, self._begin, self._end)
        self._tracer = AttentionTracer(self._record, lambda: self._stack.top is not None, self._heads)

    def __repr__(self) -> str:
        missing = f", {len(self.not_captured)} not captured" if self.not_captured else ""
        return f"Captured({len(self.maps)} maps{missing})"

    def _begin(self, inputs: tuple[Any, ...]) -> None:
        self.maps, self.not_captured, self._seen = {}, {}, set()
        first = next((item for item in inputs if isinstance(item, Tensor)), None)
        self._images = None if first is None else first.shape[0]
        self._image_size = (first.shape[-2], first.shape[-1]) if first is not None and first.ndim == 4 else None

    def _end(self) -> None:
        self._tracer.reset()
        for module, name in self._stack.names.items():
            if module in self._stack.calls and _looks_like_attention(module) and not self._seen_within(name):
                self.not_captured[name] = "it ran, and no product of a softmax with values was seen in it"

    def _seen_within(self, name: str) -> bool:
        return any(seen == name or seen.startswith(f"{name}.") or not name for seen in self._seen)

    def _record(self, sighting: Sighting) -> None:
        top = self._stack.top
        assert top is not None  # the tracer is active only while a module runs
        name = self._stack.names[top] or type(self._model).__name__
        name = f"{name}.{sighting.submodule}" if sighting.submodule else name
        self._seen.add(self._stack.names[top])
        key = _unused(name, self.maps.keys() | self.not_captured.keys())
        if sighting.source is None:
            self.not_captured[key] = sighting.reason
            return
        batch, _, queries, keys = sighting.source.shape
        layout = token_layout(self._model, keys, self._image_size)
        kind = self._kind(batch, queries, keys)
        if kind == "window":
            layout = TokenLayout()
        self.maps[key] = AttentionMap(key, kind, layout, sighting.source, sighting.mix, sighting.origin)

    def _kind(self, batch: int, queries: int, keys: int) -> str:
        if self._images and batch != self._images:
            return "window"
        if queries == keys:
            return "token"
        return "class" if queries == 1 else "cross"

    def _heads(self) -> int | None:
        heads = getattr(self._stack.top, "num_heads", None)
        return heads if isinstance(heads, int) else None


@contextlib.contextmanager
def capture(model: nn.Module) -> Iterator[Captured]:
    """Capture every layer's attention map while the block lasts; outputs stay bit for bit what they were.

    Maps are exact: what multiplied the values, up to the kernel's own rounding. A layer whose map cannot be known is
    listed in ``captured.not_captured`` with the reason. Fused attention stays on; no mode or flag of the model changes.

    Args:
        model: any torch model with softmax attention. A model compiled with `torch.compile` is run eagerly inside the
            block, with a warning, because compiled code cannot be observed.

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
    captured = Captured(model)
    with contextlib.ExitStack() as stack:
        if _is_compiled(model):
            warnings.warn("The model is compiled; it runs eagerly while its attention is captured.", stacklevel=3)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        captured._stack.attach()
        stack.callback(captured._stack.detach)
        stack.enter_context(captured._tracer)
        yield captured


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
