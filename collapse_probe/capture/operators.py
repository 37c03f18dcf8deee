"""PyTorch operators as a dispatch mode sees them: arguments by name, and which tensors are the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BACKENDS = {"meta": "Meta"}
_COMPOSITE: dict[tuple[Any, str], bool] = {}


def named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in, however they were passed."""
    schema = func._schema.arguments
    named = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    named.update({argument.name: value for argument, value in zip(schema, args, strict=False)})
    named.update(kwargs)
    return named


def as_number(value: Any) -> float | None:
    """A Python number or a scalar tensor as a float; None for anything else."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Tensor) and value.ndim == 0:
        return float(value)
    return None


def arrives_whole(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this operator is only a sum of others on this device, so that its parts can be seen one by one."""
    tensor = next((argument for argument in args if isinstance(argument, Tensor)), None)
    if tensor is None or tensor.is_nested or tensor.layout is not torch.strided:
        return False
    key = (func, tensor.device.type)
    if key not in _COMPOSITE:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        own = has(func.name(), _BACKENDS.get(tensor.device.type, tensor.device.type.upper()))
        _COMPOSITE[key] = has(func.name(), "CompositeImplicitAutograd") and not own
    return _COMPOSITE[key]


def memory_key(tensor: Tensor) -> tuple[Any, ...]:
    """What identifies a tensor's memory and geometry.

    The address of a freed storage can be used again; whoever keeps a key must hold a weak reference to the storage,
    which prevents that.
    """
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors have no storage of their own
        return (id(tensor),)
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
