"""Whether kernels run on this machine: they are compiled when they are first needed, which takes a C compiler and a
device that has room for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch

from collapse_probe.metrics.layer_kernels.launch import add_unit_columns, image_products, layer_products, normalise
from collapse_probe.metrics.layer_kernels.layers import Layer, Layers, available
from collapse_probe.metrics.tiles import MapLike


def usable(maps: Sequence[MapLike]) -> bool:
    """Whether kernels take these maps, and do run: tried once for each number of layers, head size, dtype and device.
    Where they do not, a warning says why."""
    if not available(maps):
        return False
    known = maps[0].queries_and_keys()
    assert known is not None
    q = known[0]
    return _runs(len(maps), q.shape[3], q.dtype, q.device)


@cache
def _runs(count: int, dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    tokens = torch.zeros(2, 1, 1, dim, dtype=dtype, device=device)
    try:
        layers = Layers.of([Layer(tokens, tokens, torch.zeros(2, 1, 1, device=device), 1.0)] * count)
        normalise(layers)
        products = layer_products(layers, 0, 1)
        image_products(layers, products, 0, 1)
        add_unit_columns(layers, products, 0, 1, torch.zeros(count, 1, 1, 1, dtype=torch.float64, device=device))
    except Exception as error:  # whatever Triton, the compiler or the driver say: there is another way
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"Triton's kernels do not run here ({type(error).__name__}: {reason[0] if reason else ''}): attention is "
            "compared by PyTorch's operators instead, with the same results.",
            stacklevel=2,
        )
        return False
    return True
