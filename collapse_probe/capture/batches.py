"""Whether an image's windows are its own: a test by turning the batch around.

That images come first on a folded batch axis is how nearly every model lays out its windows, and cannot be read from a
shape. A model that stacks augmented copies behind each other, or all images of one window before those of the next,
would hand one image's windows out as another's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from collapse_probe.capture.attention_map import AttentionMap
from collapse_probe.capture.context import capture

#: Why a layer is left out that does not pass.
OUT_OF_ORDER = (
    "it holds the windows of a batch in an order that does not follow its images, so they cannot be told apart"
)

#: How many queries of an image are compared, and by how much of the largest entry they may differ: kernels round
#: differently at another place of the batch, most in mixed precision.
_QUERIES, _ROUNDING = 8, 0.02


def out_of_order(model: nn.Module, batch: Tensor, maps: Mapping[str, AttentionMap]) -> list[str]:
    """Layers with windows whose first image is not the last one of the batch turned around.

    Args:
        model: in evaluation mode; it runs once more if `maps` hold windows of more than one image.
        batch: the images that gave the maps.
        maps: a capture's maps of that batch.
    """
    windowed = {name: item for name, item in maps.items() if item.windows > 1 and item.images > 1}
    if not windowed:
        return []
    with capture(model) as turned:
        model(batch[:2].flip(0))
    return [name for name, item in windowed.items() if name not in turned.maps or not _alike(item, turned.maps[name])]


def _alike(item: AttentionMap, turned: AttentionMap) -> bool:
    first, last = item.select(0, 1), turned.select(turned.images - 1, turned.images)
    if first.shape != last.shape:
        return False
    queries = min(_QUERIES, first.shape[2])
    one, other = first.rows(0, queries), last.rows(0, queries)
    return torch.allclose(one, other, rtol=0, atol=_ROUNDING * float(one.abs().max()), equal_nan=True)
