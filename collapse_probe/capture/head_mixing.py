"""Operators between softmax and values that mix heads: re-attention, talking heads.

An operator that is affine over heads and alike at every (query, key) entry needs no map to be kept: it is folded into a
:class:`HeadMix` and applied to whatever part of the map is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.attention_map import HeadMix
from collapse_probe.capture.operators import as_number, named_arguments

aten = torch.ops.aten

_BATCH_NORMS = {
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.cudnn_batch_norm.default,
    aten._batch_norm_with_update.default,
    aten._batch_norm_no_update.default,
}
_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor}


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
