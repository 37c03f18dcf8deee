"""`capture(model)`: the attention of every layer, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.capture.attention_map import AttentionMap, Source, TokenLayout
from collapse_probe.capture.dataflow import AttentionTracer
from collapse_probe.capture.hooks import ModuleStack
from collapse_probe.capture.kernels import Sighting
from collapse_probe.capture.layout import is_channel_attention, token_layout
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
        self._images: int | None = None
        self._image_size: tuple[int, int] | None = None
        self._seen: set[nn.Module] = set()
        self._stale = False
        self._stack = ModuleStack(model, self._begin, self._end)
        self._tracer = AttentionTracer(self._record, lambda: self._stack.top, self._heads)

    def __repr__(self) -> str:
        missing = f", {len(self.not_captured)} not captured" if self.not_captured else ""
        return f"Captured({len(self.maps)} maps{missing})"

    def _close(self) -> None:
        """Hooks off, and no reference left from the watchers back to here: a batch of maps would otherwise live on
        until the garbage collector looks for cycles."""
        self._stack.detach()
        self._tracer.reset()
        del self._stack, self._tracer

    def _begin(self, inputs: tuple[Any, ...]) -> None:
        """A pass begins. What is known is thrown away only when it attends: `forward_head` after a pass does not."""
        self._stale = True
        self._tracer.reset()
        first = next((item for item in inputs if isinstance(item, Tensor) and not item.is_nested), None)
        self._images = None if first is None or not first.ndim else first.shape[0]
        self._image_size = (first.shape[-2], first.shape[-1]) if first is not None and first.ndim == 4 else None

    def _refresh(self) -> None:
        if self._stale:
            self.maps, self.not_captured, self._seen, self._stale = {}, {}, set(), False

    def _end(self) -> None:
        for module, reason in self._tracer.unfinished.values():
            self._refresh()
            self._seen.add(module)
            self.not_captured[_unused(self._name(module), self.not_captured)] = reason
        self._tracer.reset()
        for module, name in self._stack.names.items():
            if not _looks_like_attention(module):
                continue
            if module in self._stack.elsewhere:
                self._refresh()
                self.not_captured[name] = "it ran in another thread, where it cannot be observed"
            elif module in self._stack.ran and not self._seen_within(module):
                self._refresh()
                self.not_captured[name] = "it ran, and no product of a softmax with values was seen in it"

    def _seen_within(self, module: nn.Module) -> bool:
        return any(part in self._seen for part in module.modules())

    def _name(self, module: nn.Module) -> str:
        return self._stack.names[module] or type(module).__name__

    def _record(self, sighting: Sighting) -> None:
        top = self._stack.top
        assert top is not None  # the tracer is active only while a module runs
        self._refresh()
        self._seen.add(top)
        name = f"{self._name(top)}.{sighting.submodule}" if sighting.submodule else self._name(top)
        key = _unused(name, self.maps.keys() | self.not_captured.keys())
        if sighting.source is None:
            self.not_captured[key] = sighting.reason
            return
        source, origin = (self._unfolded(item) for item in (sighting.source, sighting.origin))
        assert source is not None
        running = self._stack.running
        owner = next((item for item in reversed(running) if hasattr(item, "num_prefix_tokens")), running[0])
        layout = token_layout(owner, source.shape[3], self._image_size)
        kind = self._kind(source, owner, layout)
        if kind not in ("token", "class"):
            layout = TokenLayout()
        self.maps[key] = AttentionMap(key, kind, layout, source, sighting.mix, origin)

    def _unfolded(self, source: Source | None) -> Source | None:
        """The same map with images on the batch axis, where a fused kernel was given them folded into the heads."""
        if source is None or not self._images or source.shape[0] != 1 or source.shape[1] % self._images:
            return source
        return source.unfold_images(self._images)

    def _kind(self, source: Source, owner: nn.Module, layout: TokenLayout) -> str:
        batch, _, queries, keys = source.shape
        if self._images and batch != self._images:
            return "window"
        if queries != keys:
            return "class" if queries == 1 else "cross"
        return "channel" if is_channel_attention(source, owner, layout) else "token"

    def _heads(self) -> int | None:
        for name in ("num_heads", "n_heads", "heads", "n_head", "nhead", "num_attention_heads"):
            heads = getattr(self._stack.top, name, None)
            if isinstance(heads, int):
                return heads
        return None


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
        stack.callback(captured._close)
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
