"""Proof at run time: a map times the values is what the model computed, and no softmax was overlooked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

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
    """Largest difference between map times values and the model's own product, relative to its largest entry."""
    values, output = product.axes(product.values), product.output
    wide = torch.promote_types(attention.dtype, values.dtype)
    values = values.to(wide)
    batch, heads, queries, keys = attention.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * keys))
    parts = [
        torch.matmul(attention.rows(start, min(start + step, queries)).to(wide), values)
        for start in range(0, queries, step)
    ]
    applied = torch.cat(parts, dim=2)
    mine, theirs = (applied, product.axes(output)) if product.finish is None else (product.finish(applied), output)
    theirs = theirs.to(wide)
    agreed_absent = theirs.isnan() & mine.isnan()
    difference = (mine - theirs).masked_fill(agreed_absent, 0.0).abs().max()
    return float(difference / theirs.nan_to_num(0.0).abs().max().clamp(min=torch.finfo(wide).tiny))


def tolerance(product: Product) -> float:
    """Up to which relative error a product agrees, by the coarsest dtype in it."""
    dtypes = (product.values.dtype, product.output.dtype)
    return max(TOLERANCES.get(dtype, TOLERANCES[torch.float32]) for dtype in dtypes)
