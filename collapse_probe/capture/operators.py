"""PyTorch operators as a dispatch mode sees them: arguments by name, and which tensors are the same memory."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_SHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten._reshape_alias.default,
    aten.expand.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
    aten._to_copy.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}

_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
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
        return math.nan if value.is_meta else float(value.detach())
    return None


def arrives_whole(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this operator is only a sum of others on this device, so that its parts can be seen one by one."""
    if not _has_parts(func):
        return False
    tensors = [tensor for argument in args for tensor in tensors_in(argument)]
    if not tensors or any(tensor.is_nested or tensor.layout is not torch.strided for tensor in tensors):
        return False
    tensor = tensors[0]
    key = (func, tensor.device.type)
    if key not in _COMPOSITE:
        backend = _BACKENDS.get(tensor.device.type, tensor.device.type.upper())
        _COMPOSITE[key] = not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), backend)
    return _COMPOSITE[key]


@functools.cache
def _has_parts(func: Any) -> bool:
    """Whether PyTorch has this operator written as a sum of others, for devices that have no kernel of their own."""
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))
    except RuntimeError:  # operators that the dispatcher does not know, such as those of fake tensors
        return False


def run_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a composite operator through its own kernel, as PyTorch would: not through a Python decomposition, which can
    round differently."""
    return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def tensors_in(argument: Any) -> Iterator[Tensor]:
    """The tensor that an argument is, or those that it lists."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        yield from (item for item in argument if isinstance(item, Tensor))


def written_storages(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[int]:
    """Storages that an operator writes to."""
    named = named_arguments(func, args, kwargs)
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (storage_of(tensor) for tensor in tensors_in(named.get(argument.name)))


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage; its own where it has none (sparse and nested tensors)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def memory_key(tensor: Tensor) -> tuple[Any, ...]:
    """What identifies a tensor's memory and geometry.

    The address of a freed storage can be used again; whoever keeps a key must hold a weak reference to the storage,
    which prevents that.
    """
    if tensor.is_nested or tensor.layout is not torch.strided:
        return (id(tensor),)
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))


def keeps_order(func: Any, args: Any, out: Tensor) -> bool:
    """Whether an operator only arranges the same entries, in the same order, under another shape."""
    if func is aten.permute.default:
        moved = [axis % args[0].ndim for axis in args[1]]
        kept = [axis for axis in moved if args[0].shape[axis] > 1]
        return kept == sorted(kept)
    if func is aten.transpose.int:
        first, last = sorted(axis % args[0].ndim for axis in args[1:3])
        return sum(size > 1 for size in args[0].shape[first : last + 1]) <= 1
    return func in _SHAPES and out.numel() == args[0].numel() and out.is_floating_point()


def swaps_last_axes(func: Any, args: Any) -> bool:
    """Whether an operator makes the last two axes change places."""
    axes = args[0].ndim
    if func is aten.transpose.int:
        return axes >= 2 and {args[1] % axes, args[2] % axes} == {axes - 2, axes - 1}
    if func is aten.permute.default:
        return axes >= 2 and [axis % axes for axis in args[1]] == [*range(axes - 2), axes - 1, axes - 2]
    return func is aten.t.default


def autocast_within(devices: Iterable[str]) -> contextlib.AbstractContextManager[Any]:
    """Lets autocast reach the operators within a kernel, as it does where no dispatch mode is active.

    PyTorch excludes autocast while a mode handles an operator, because its arguments were cast before; what a kernel
    calls by itself was not.

    Args:
        devices: types of device on which autocast is on.
    """
    keys = [_AUTOCAST[device] for device in devices]
    if not keys:
        return contextlib.nullcontext()
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in keys:
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(included, excluded)
