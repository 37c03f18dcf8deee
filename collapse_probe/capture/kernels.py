"""From what attention kernels are given to maps: queries, keys, scale, bias, normaliser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.attention_map import HeadMix, QueryKey, Source
from collapse_probe.capture.operators import named_arguments

aten = torch.ops.aten

#: Kernels of PyTorch's native fast path, which compute queries and keys inside.
NATIVE = {aten._native_multi_head_attention.default, aten._transformer_encoder_layer_fwd.default}

#: Answers how many heads the running module has; asked only where heads are folded into the batch axis.
Heads = Callable[[], "int | None"]


@dataclass(frozen=True)
class Sighting:
    """Attention that was seen: the softmax, what was applied after it, or why it could not be kept."""

    source: Source | None = None
    mix: HeadMix | None = None
    origin: Source | None = None
    reason: str = ""
    submodule: str = ""


def is_fused_attention(func: Any) -> bool:
    """Whether an operator is one of the kernels behind `F.scaled_dot_product_attention`."""
    name = func._schema.name
    return name.startswith("aten::_scaled_dot_product_") and not name.endswith("_backward")


def fused_sighting(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, heads: Heads) -> Sighting:
    """What a fused kernel was given; out is what it returned."""
    named = named_arguments(func, args, kwargs)
    if named.get("dropout_p", 0.0) > 0:
        return Sighting(
            reason="dropout inside a fused attention kernel: the map that multiplied the values cannot be known. "
            "Put the model in evaluation mode."
        )
    q, k = four_axes(named["query"].detach(), heads), four_axes(named["key"].detach(), heads)
    if k.shape[1] != q.shape[1]:  # grouped queries: several query heads share one key head
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    bias = named.get("attn_mask", named.get("attn_bias"))
    if bias is not None:
        bias = shrunk(_as_additive(bias.detach(), q.dtype))
    scale = named.get("scale")
    return Sighting(
        QueryKey(
            q.clone(memory_format=torch.contiguous_format),
            k.clone(memory_format=torch.contiguous_format),
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            bias=bias,
            causal=bool(named.get("is_causal", False)),
            log_normalizer=_kernel_normalizer(out, q),
        )
    )


def _kernel_normalizer(out: Any, q: Tensor) -> Tensor | None:
    """The log of each row's sum that the CPU kernel returns; other kernels pad or omit it, so it is computed there."""
    if q.device.type != "cpu" or not isinstance(out, tuple) or len(out) < 2 or not isinstance(out[1], Tensor):
        return None
    normalizer = out[1]
    wide = normalizer.dtype in (torch.float32, torch.float64) and normalizer.shape == q.shape[:3]
    return normalizer.detach().clone() if wide else None


def native_sighting(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sighting:
    """Queries and keys of PyTorch's native fast path, which computes them inside its kernel."""
    named = named_arguments(func, args, kwargs)
    whole_layer = func is aten._transformer_encoder_layer_fwd.default
    tokens = named["src"] if whole_layer else named["query"]
    submodule = "self_attn" if whole_layer else ""
    if named.get("mask") is not None or tokens.is_nested:
        return Sighting(reason="a mask or nested tensors on PyTorch's native fast path", submodule=submodule)
    dim, heads = named["embed_dim"], named["num_heads"] if whole_layer else named["num_head"]
    keys = tokens if whole_layer else named["key"]
    if whole_layer and named["norm_first"]:
        tokens = keys = torch.layer_norm(tokens, (dim,), named["norm_weight_1"], named["norm_bias_1"], named["eps"])
    weight, bias = named["qkv_weight"], named["qkv_bias"]
    q = torch.nn.functional.linear(tokens, weight[:dim], None if bias is None else bias[:dim])
    k = torch.nn.functional.linear(keys, weight[dim : 2 * dim], None if bias is None else bias[dim : 2 * dim])
    q, k = (part.detach().unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for part in (q, k))
    return Sighting(QueryKey(q, k, scale=(dim // heads) ** -0.5), submodule=submodule)


def four_axes(tensor: Tensor, heads: Heads) -> Tensor:
    """`[B, H, x, y]` from a tensor whose heads may be folded into the batch, or which has further leading axes."""
    if tensor.ndim == 4:
        return tensor
    if tensor.ndim == 3:
        count = heads() or 1
        count = count if tensor.shape[0] % count == 0 else 1
        return tensor.reshape(-1, count, *tensor.shape[1:])
    return tensor.flatten(0, tensor.ndim - 4)


def shrunk(bias: Tensor) -> Tensor:
    """An own copy with four axes; those that were only expanded are kept once."""
    bias = bias.detach()
    for axis in range(bias.ndim):
        if bias.stride(axis) == 0 and bias.shape[axis] > 1:
            bias = bias.narrow(axis, 0, 1)
    return bias[(None,) * (4 - bias.ndim)].clone()


def _as_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
