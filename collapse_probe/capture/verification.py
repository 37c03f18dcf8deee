"""Proof at run time: a map times the values is what the model computed, and no softmax was overlooked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.attention_map import AttentionMap
from collapse_probe.capture.sighting import Product

#: Largest relative error of a product, by the dtype in which the model computed it.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: Elements of a map that are looked at together.
_CHUNK_ELEMENTS = 1 << 22


@dataclass
class Verification:
    """What a verified pass showed.

    Attributes:
        kernels: softmaxes and attention kernels that ran, counted on their own.
        captured: how many of them went into maps.
        named: how many are listed in `not_captured`, each with its reason.
        errors: layer -> relative error of map times values against the model's own product.
        failures: sentences on what does not hold.
    """

    kernels: int = 0
    captured: int = 0
    named: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every product agrees and every kernel is accounted for."""
        return not self.failures

    @property
    def largest_error(self) -> float:
        """Largest relative error of a layer; 0 where none was checked."""
        return max(self.errors.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"passed": self.passed, "largest_error": self.largest_error, **asdict(self)}

    def __str__(self) -> str:
        counted = f"{self.kernels} kernels ran: {self.captured} captured, {self.named} named with a reason"
        checked = f"map times values agrees in {len(self.errors)} layers to {self.largest_error:.1e}"
        return f"{counted}; {'; '.join(self.failures) if self.failures else checked}."


def product_error(attention: AttentionMap, product: Product) -> float:
    """Largest difference between map times values and the model's own product, relative to its largest entry: by
    columns, as metrics read a map, and by rows."""
    values, output = product.axes(product.values), product.output
    wide = torch.promote_types(attention.dtype, values.dtype)
    values, theirs = values.to(wide), (output if product.finish is not None else product.axes(output)).to(wide)
    largest = theirs.nan_to_num(0.0).abs().max().clamp(min=torch.finfo(wide).tiny)
    errors = []
    for applied in (_by_columns(attention, values), _by_rows(attention, values)):
        mine = applied if product.finish is None else product.finish(applied)
        agreed_absent = theirs.isnan() & mine.isnan()
        errors.append(float((mine - theirs).masked_fill(agreed_absent, 0.0).abs().max() / largest))
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _by_columns(attention: AttentionMap, values: Tensor) -> Tensor:
    batch, heads, queries, keys = attention.shape
    total = values.new_zeros(batch, heads, queries, values.shape[-1])
    for start, stop in _chunks(keys, batch * heads * queries):
        total += attention.columns(start, stop).to(values.dtype) @ values[:, :, start:stop]
    return total


def _by_rows(attention: AttentionMap, values: Tensor) -> Tensor:
    batch, heads, queries, keys = attention.shape
    parts = [attention.rows(*chunk).to(values.dtype) @ values for chunk in _chunks(queries, batch * heads * keys)]
    return torch.cat(parts, dim=2)


def _chunks(size: int, elements: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // max(1, elements))
    for start in range(0, size, step):
        yield start, min(start + step, size)


def tolerance(product: Product) -> float:
    """Up to which relative error a product agrees, by the coarsest dtype in it."""
    dtypes = (product.values.dtype, product.output.dtype)
    return max(TOLERANCES.get(dtype, TOLERANCES[torch.float32]) for dtype in dtypes)
