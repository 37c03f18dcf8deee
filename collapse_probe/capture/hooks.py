"""Where in the model we are: a stack of running modules, kept by hooks that live exactly as long as they are needed.

The hooks are PyTorch's global module hooks, filtered to the modules of one model: hooks on an encoder layer or its
children would switch PyTorch's fused encoder kernel off and so change the very outputs that are to be observed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModuleStack:
    """The modules of one model that are running in this thread, outermost first.

    Args:
        model: the model to watch.
        on_start: called with the inputs of the outermost module when a forward pass begins.
        on_end: called when that pass has ended, also by an exception.
    """

    def __init__(
        self, model: nn.Module, on_start: Callable[[tuple[Any, ...]], None], on_end: Callable[[], None]
    ) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.ran: set[nn.Module] = set()
        self.elsewhere: set[nn.Module] = set()
        self.running: list[nn.Module] = []
        self._model, self._on_start, self._on_end = model, on_start, on_end
        self._first: nn.Module | None = None
        self._thread = threading.get_ident()
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Start watching."""
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def detach(self) -> None:
        """Stop watching; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self.running.clear()

    @property
    def top(self) -> nn.Module | None:
        """The innermost module that is running, or None outside the model."""
        return self.running[-1] if self.running else None

    def _watched(self, module: nn.Module) -> bool:
        # Gradient checkpointing runs blocks again within backward: that is no new pass.
        if module not in self.names or torch._C._current_graph_task_id() != -1:
            return False
        if threading.get_ident() != self._thread:
            self.elsewhere.add(module)
            return False
        return True

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._watched(module):
            return
        if module is self._model:
            self.running.clear()  # what an interrupt left behind: post-hooks do not run then
        # A pass begins with the model itself or, where only parts are called (`forward_features`), with the part that
        # began the last one.
        if not self.running and (module is self._model or self._first in (None, self._model, module)):
            self._first = module
            self.ran.clear()
            self._on_start(inputs)
        self.running.append(module)
        self.ran.add(module)

    def _leave(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        if not self._watched(module) or module not in self.running:
            return
        # Inner modules that were left by an exception have no post-hook of their own in every PyTorch version.
        while self.running.pop() is not module:
            pass
        if not self.running:
            self._on_end()
