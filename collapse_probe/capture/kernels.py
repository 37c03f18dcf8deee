"""From what attention kernels are given to maps: queries, keys, scale, bias, normaliser."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from collapse_probe.capture.attention_map import QueryKey, Source, Stored
from collapse_probe.capture.axes import Arrangement, Site, arrangement
from collapse_probe.capture.operators import named_arguments
from collapse_probe.capture.sighting import Product, Sighting

aten = torch.ops.aten

#: Kernels of PyTorch's native fast path, which compute queries and keys inside.
NATIVE = {aten._native_multi_head_attention.default, aten._transformer_encoder_layer_fwd.default}


def is_fused_attention(func: Any) -> bool:
    """Whether an operator is one of the kernels behind `F.scaled_dot_product_attention`."""
    name = func._schema.name
    return name.startswith("aten::_scaled_dot_product_") and not name.endswith("_backward")


def fused_sighting(
    serial: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, site: Site
) -> Sighting:
    """What a fused kernel was given; out is what it returned."""
    serials = frozenset({serial})
    named = named_arguments(func, args, kwargs)
    if named.get("dropout_p", 0.0) > 0:
        return Sighting(
            serials,
            reason="dropout inside a fused attention kernel: the map that multiplied the values cannot be known. "
            "Put the model in evaluation mode.",
        )
    q, k, v = (named[name].detach() for name in ("query", "key", "value"))
    if k.shape[-3] != q.shape[-3]:  # grouped queries: several query heads share one key head
        k, v = (item.repeat_interleave(q.shape[-3] // item.shape[-3], dim=-3) for item in (k, v))
    axes = arrangement(q.shape[:-2], site)
    bias = named.get("attn_mask", named.get("attn_bias"))
    if bias is not None:
        bias = axes.broadcast(_as_additive(bias.detach(), q.dtype), (q.shape[-2], k.shape[-2]))
    scale = named.get("scale")
    output = out[0] if isinstance(out, tuple) else out
    source: Source = QueryKey(
        axes(q).clone(memory_format=torch.contiguous_format),
        axes(k).clone(memory_format=torch.contiguous_format),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        bias=bias,
        causal=bool(named.get("is_causal", False)),
        log_normalizer=_kernel_normalizer(out, q, axes),
        windows=axes.windows,
    )
    if bias is not None and not bias.is_meta and bool(((bias.amax(-1) < -1e3) & bias.amax(-1).isfinite()).any()):
        # Rows masked as a whole by finite numbers: their logits are lost in those, and so would be a normaliser.
        source = Stored(source.rows(0, q.shape[-2]))
    product = Product(v, output.detach(), axes)
    return Sighting(serials, source, windows=axes.windows, contraction=q.shape[-1], product=product)


def _kernel_normalizer(out: Any, q: Tensor, axes: Arrangement) -> Tensor | None:
    """The log of each row's sum that the CPU kernel returns; other kernels pad or omit it, so it is computed there."""
    if q.device.type != "cpu" or not isinstance(out, tuple) or len(out) < 2 or not isinstance(out[1], Tensor):
        return None
    normalizer = out[1]
    wide = normalizer.dtype in (torch.float32, torch.float64) and normalizer.shape == q.shape[:-1]
    return axes(normalizer.detach()[..., None])[..., 0].clone() if wide else None


def native_sighting(
    serial: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, site: Site
) -> Sighting:
    """Queries and keys of PyTorch's native fast path, which computes them inside its kernel."""
    serials = frozenset({serial})
    named = named_arguments(func, args, kwargs)
    whole_layer = func is aten._transformer_encoder_layer_fwd.default
    tokens = named["src"] if whole_layer else named["query"]
    submodule = "self_attn" if whole_layer else ""
    if tokens.is_nested:
        reason = "nested tensors on PyTorch's native fast path; build the encoder with enable_nested_tensor=False"
        return Sighting(serials, reason=reason, submodule=submodule)
    dim, heads = named["embed_dim"], named["num_heads"] if whole_layer else named["num_head"]
    keys, values = (tokens, tokens) if whole_layer else (named["key"], named["value"])
    if whole_layer and named["norm_first"]:
        keys = values = tokens = layer_norm(tokens, (dim,), named["norm_weight_1"], named["norm_bias_1"], named["eps"])
    weights, bias = named["qkv_weight"].split(dim), named["qkv_bias"]
    biases = (None, None, None) if bias is None else bias.split(dim)
    q, k, v = (
        linear(part, weight, own).detach().unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
        for part, weight, own in zip((tokens, keys, values), weights, biases, strict=True)
    )
    mask = _native_mask(named, q, k)
    if isinstance(mask, str):
        return Sighting(serials, reason=mask, submodule=submodule)
    axes = arrangement(q.shape[:2], replace(site, heads=heads))
    output = out[0] if isinstance(out, tuple) else out
    return Sighting(
        serials,
        QueryKey(q, k, scale=(dim // heads) ** -0.5, bias=mask, windows=axes.windows),
        windows=axes.windows,
        contraction=dim // heads,
        product=Product(v, output.detach(), axes, partial(_native_output, named, whole_layer)),
        submodule=submodule,
    )


def _native_mask(named: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | str | None:
    """The mask as additive logits `[B or 1, H or 1, Q or 1, K]`; the reason where its meaning is not known."""
    mask, mask_type = named.get("mask"), named.get("mask_type")
    if mask is None:
        return None
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    shapes = {0: (1, 1, queries, keys), 1: (batch, 1, 1, keys), 2: (batch, heads, queries, keys)}
    if mask_type not in shapes or mask.numel() != math.prod(shapes[mask_type]):
        return f"a mask of type {mask_type} and shape {list(mask.shape)} on PyTorch's native fast path"
    if mask.dtype == torch.bool:  # here True means masked
        return _as_additive(~mask.detach(), q.dtype).view(shapes[mask_type])
    return mask.detach().clone().view(shapes[mask_type])


def _native_output(named: dict[str, Any], whole_layer: bool, applied: Tensor) -> Tensor:
    """What the native kernel makes of map times values `[B, H, Q, D]`."""

    def wide(name: str) -> Tensor:
        return named[name].to(applied.dtype)

    attended = linear(applied.transpose(1, 2).flatten(2), wide("proj_weight"), wide("proj_bias"))
    if not whole_layer:
        return attended

    def norm(tensor: Tensor, number: int) -> Tensor:
        weight, bias = wide(f"norm_weight_{number}"), wide(f"norm_bias_{number}")
        return layer_norm(tensor, weight.shape, weight, bias, named["eps"])

    def feed_forward(tensor: Tensor) -> Tensor:
        hidden = linear(tensor, wide("ffn_weight_1"), wide("ffn_bias_1"))
        hidden = torch.nn.functional.gelu(hidden) if named["use_gelu"] else hidden.relu()
        return linear(hidden, wide("ffn_weight_2"), wide("ffn_bias_2"))

    tokens = wide("src") + attended
    if named["norm_first"]:
        return tokens + feed_forward(norm(tokens, 2))
    tokens = norm(tokens, 1)
    return norm(tokens + feed_forward(tokens), 2)


def _as_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
