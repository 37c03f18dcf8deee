"""Attention maps of a running model, exact and lazy, with fused attention left on."""

import contextlib
import sys
import types

from torch import nn

from collapse_probe.capture.attention_map import AttentionMap, HeadMix, QueryKey, Stored, TokenLayout, concatenate
from collapse_probe.capture.context import Captured, capture
from collapse_probe.capture.groups import NOT_COMPARED, layer_groups

__all__ = [
    "NOT_COMPARED",
    "AttentionMap",
    "Captured",
    "HeadMix",
    "QueryKey",
    "Stored",
    "TokenLayout",
    "capture",
    "concatenate",
    "layer_groups",
]


class _CallablePackage(types.ModuleType):
    """Lets `collapse_probe.capture(model)` work: importing this package puts it, a module, under the function's
    name."""

    def __call__(self, model: nn.Module) -> contextlib.AbstractContextManager[Captured]:
        return capture(model)


sys.modules[__name__].__class__ = _CallablePackage
