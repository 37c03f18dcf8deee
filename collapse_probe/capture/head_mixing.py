"""Operators before or after a softmax that mix heads: re-attention, talking heads.

An operator that is affine over heads and alike at every (query, key) entry needs no map to be kept: it is folded into a
:class:`HeadMix` and applied to whatever part of the map is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.attention_map import HeadMix
from collapse_probe.capture.operators import as_number, keeps_order, named_arguments

aten = torch.ops.aten

_BATCH_NORMS = {
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.cudnn_batch_norm.default,
    aten._batch_norm_with_update.default,
    aten._batch_norm_no_update.default,
}
_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar}


@dataclass(frozen=True)
class Mixing:
    """What was applied over the heads of a followed tensor, and where its heads are.

    Attributes:
        mix: the affine map over heads, or None where nothing was applied.
        heads_last: whether the heads stand behind queries and keys, where a linear layer mixes them.
    """

    mix: HeadMix | None = None
    heads_last: bool = False

    def moved(self, func: Any, args: Any, out: Tensor) -> Mixing | None:
        """After an operator that brings the heads to the end or back; None for any other."""
        if func is aten.permute.default and args[0].ndim == 4:
            axes = [axis % 4 for axis in args[1]]
            if axes == ([0, 3, 1, 2] if self.heads_last else [0, 2, 3, 1]):
                return replace(self, heads_last=not self.heads_last)
        if self.heads_last and keeps_order(func, args, out) and out.shape[-1:] == args[0].shape[-1:]:
            return self
        return None

    def step(
        self, position: int, shape: tuple[int, ...], func: Any, args: Any, kwargs: dict[str, Any], out: Any
    ) -> Mixing | None:
        """After an operator that mixes heads, whose argument at `position` is followed; None for any other."""
        found = None
        if self.heads_last:
            found = _linear_over_last(position, func, args, kwargs)
        elif position == 0 and len(shape) == 4:
            found = head_mix(shape, func, args, kwargs, out)
        if found is None:
            return None
        return replace(self, mix=found if self.mix is None else self.mix.then(found))


def _linear_over_last(position: int, func: Any, args: Any, kwargs: dict[str, Any]) -> HeadMix | None:
    """A linear layer, or its bias alone, over the last axis."""
    if kwargs:
        return None
    if position == 0 and (func is aten.mm.default or (func is aten.bmm.default and args[0].shape[0] == 1)):
        weight = _wide(args[1]).reshape(args[1].shape[-2:]).T
        return HeadMix(weight, torch.zeros_like(weight[:, 0]))
    if position == 1 and func is aten.addmm.default and len(args) == 3 and args[0].ndim == 1:
        return HeadMix(_wide(args[2]).T, _wide(args[0]))
    if position == 0 and func in (aten.add.Tensor, aten.add_.Tensor) and isinstance(args[1], Tensor):
        bias = args[1]
        if bias.ndim == 1 and bias.shape == args[0].shape[-1:]:
            wide = _wide(bias)
            return HeadMix(torch.eye(len(wide), dtype=wide.dtype, device=wide.device), wide)
    return None


def head_mix(
    shape: tuple[int, ...], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> HeadMix | None:
    """What an operator does to a map of this shape `[B, H, Q, K]`, or None where it is not a mix of heads."""
    if func is aten.convolution.default:
        return _convolution(shape, named_arguments(func, args, kwargs), out)
    if func in _BATCH_NORMS:
        return _batch_norm(named_arguments(func, args, kwargs), out)
    if func in _SCALINGS:
        factor = as_number(args[1])
        if factor is not None:
            weight = torch.eye(shape[1], dtype=torch.float64, device=_wide_device(args[0])) * factor
            return HeadMix(weight, torch.zeros_like(weight[0]))
    return None


def _convolution(shape: tuple[int, ...], named: dict[str, Any], out: Tensor) -> HeadMix | None:
    """A 1x1 convolution over heads."""
    weight, bias = named["weight"], named["bias"]
    pointwise = tuple(weight.shape[2:]) == (1, 1) and tuple(out.shape[2:]) == shape[2:]
    if named["groups"] != 1 or named["transposed"] or not pointwise:
        return None
    weight = _wide(weight).flatten(1)
    return HeadMix(weight, torch.zeros_like(weight[:, 0]) if bias is None else _wide(bias))


def _batch_norm(named: dict[str, Any], out: Any) -> HeadMix:
    """A batch norm over heads: by the batch's own statistics in training, by the running ones otherwise."""
    if named.get("training", False):
        mean, inverse = _wide(out[1]), _wide(out[2])
    else:
        eps = named["eps"] if "eps" in named else named["epsilon"]
        mean, inverse = _wide(named["running_mean"]), (_wide(named["running_var"]) + eps).rsqrt()
    factor = inverse if named["weight"] is None else inverse * _wide(named["weight"])
    shift = -mean * factor if named["bias"] is None else _wide(named["bias"]) - mean * factor
    return HeadMix(factor.diag(), shift)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide_device(tensor), torch.float64)


def _wide_device(tensor: Tensor) -> torch.device:
    """Where float64 exists: MPS has none."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device
