"""An independent way to every attention map of a model: the graph that autograd keeps of an ordinary forward pass.

Nothing of the capture is used. Fused calls leave queries, keys, mask and scale in their backward node; explicit
products leave both operands, and the walk back from an operand tells whether a softmax stands behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

PRODUCTS = ("BmmBackward0", "BaddbmmBackward0")
SOFTMAXES = ("SoftmaxBackward0", "SafeSoftmaxBackward0")
LINEAR = ("MmBackward0", "AddmmBackward0")


@dataclass
class ReferenceMap:
    """What multiplied the values, `[N, Q, K]` with all leading axes as one, and where the softmax stands behind it."""

    order: int
    applied: torch.Tensor
    fused: bool
    softmaxes: frozenset
    output: torch.Tensor | None = None


def _reference_nodes(outputs):
    """Every node of the graph."""
    seen, waiting = {}, [tensor.grad_fn for tensor in tensors_in(outputs) if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen[id(node)] = node
        waiting.extend(parent for parent, _ in node.next_functions)
    return list(seen.values())


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def _softmaxes_behind(node, axes):
    """Softmax nodes from which an operand descends without another product in between."""
    found, waiting, seen = set(), [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        name = node.name()
        if name in SOFTMAXES:
            found.add(node)
        elif name in LINEAR:
            # A linear layer over heads (talking heads) is given one entry of the map per row.
            if _rows_are_entries(node, axes):
                waiting.append(node.next_functions[0 if name == "MmBackward0" else 1][0])
        elif name == "ConvolutionBackward0":
            if tuple(node._saved_weight.shape[2:]) == (1, 1) and tuple(node._saved_input.shape[-2:]) in axes:
                waiting.append(node.next_functions[0][0])
        elif name in PRODUCTS:
            # A batched product with one matrix is a linear layer over heads as well (einsum).
            left = node._saved_self if name == "BmmBackward0" else None
            if left is not None and left.shape[0] == 1 and left.shape[1] % math.prod(axes[0]) == 0:
                waiting.append(node.next_functions[0][0])
        elif not name.startswith("ScaledDotProduct"):
            waiting.extend(parent for parent, _ in node.next_functions)
    return found


def _rows_are_entries(node, axes):
    sizes = node._saved_self_sym_sizes if node.name() == "MmBackward0" else node._saved_mat1_sym_sizes
    return sizes[0] % math.prod(axes[0]) == 0 and sizes[1] <= 64


def _reference_fused(node):
    """Softmax of the logits in float64, written out."""
    q, k = node._saved_query.double(), node._saved_key.double()
    if k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scale = node._saved_scale
    logits = torch.einsum("...id,...jd->...ij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = getattr(node, "_saved_attn_mask", None)
    if mask is None:
        mask = getattr(node, "_saved_attn_bias", None)
    if mask is not None:
        logits = logits + mask.double() if mask.dtype != torch.bool else logits.masked_fill(~mask, -torch.inf)
    if node._saved_is_causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def reference_maps(outputs):
    """Every map behind these outputs, in execution order, and the softmaxes that reach no product."""
    maps, used, nodes = [], set(), _reference_nodes(outputs)
    for node in nodes:
        if node.name().startswith("ScaledDotProduct"):
            maps.append(ReferenceMap(node._sequence_nr(), _reference_fused(node).flatten(0, -3), True, frozenset()))
        elif node.name() in PRODUCTS or node.name() == "MmBackward0":
            for applied, behind in _softmax_operands(node):
                used |= behind
                maps.append(ReferenceMap(node._sequence_nr(), applied.detach().double(), False, frozenset(behind)))
    idle = [node for node in nodes if node.name() in SOFTMAXES and node not in used]
    return sorted(maps, key=lambda item: item.order), idle


def _softmax_operands(node):
    """Operands of a product, seen as queries by keys, that descend from a softmax."""
    batched = node.name() == "BaddbmmBackward0"
    left, right = (node._saved_batch1, node._saved_batch2) if batched else (node._saved_self, node._saved_mat2)
    for operand, position in ((left, int(batched)), (right, int(batched) + 1)):
        # An operand is saved only where the other one needs a gradient; values always do.
        if operand is not None and operand.ndim + batched >= 2:
            axes = [tuple(operand.shape[-2:]), tuple(operand.shape[-2:][::-1])]
            behind = _softmaxes_behind(node.next_functions[position][0], axes)
            # Otherwise the operand is a map whose heads are being mixed by a linear layer.
            if any(_has_axes(softmax, axes) for softmax in behind):
                yield (operand if operand is left else operand.mT).reshape(-1, *_turned(operand, left)), behind


def _has_axes(softmax, axes):
    result = softmax._saved_result
    return tuple(result.shape[-2:]) in axes or (result.numel() % math.prod(axes[0]) == 0 and 1 in axes[0])


def _turned(operand, left):
    rows, columns = operand.shape[-2:]
    return (rows, columns) if operand is left else (columns, rows)
