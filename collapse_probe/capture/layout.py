"""What the tokens of a model are: how many prefix tokens, and on which grid the patches lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from collapse_probe.capture.attention_map import TokenLayout

#: More tokens than this in front of the patches are not taken for a class token and registers.
_MOST_PREFIX_TOKENS = 32

_Grid = tuple[int, int]


def token_layout(modules: Sequence[nn.Module], keys: int, image_size: _Grid | None = None) -> TokenLayout:
    """The layout of `keys` key tokens of one image.

    The model's own attributes are asked first (timm's `num_prefix_tokens`, a patch size beside the size of the image);
    otherwise it is the one reading under which the patches form a square.

    Args:
        modules: the model and the parts of it that are running, outermost first.
        keys: number of key tokens.
        image_size: height and width of the image in pixels, where known.
    """
    counts = (getattr(module, "num_prefix_tokens", None) for module in reversed(modules))
    stated = next((count for count in counts if isinstance(count, int)), None)
    grids = [grid for module in reversed(modules) for grid in _stated_grids(module, image_size)]
    for grid in grids:
        prefix = keys - math.prod(grid)
        if prefix in (0, stated) or (stated is None and 0 < prefix <= _MOST_PREFIX_TOKENS):
            return TokenLayout(prefix, grid)
    for prefix in (0, 1, 2) if stated is None else (stated, 0):
        found = _proportioned(keys - prefix, image_size)
        if found is not None:
            return TokenLayout(prefix, found)
    return TokenLayout(stated if stated is not None and stated < keys else 0)


def _proportioned(patches: int, image_size: _Grid | None) -> _Grid | None:
    """The grid of so many patches that has the proportions of the image; a square where these are not known."""
    height, width = image_size or (1, 1)
    rows = math.isqrt(max(patches, 0) * height // width)
    if rows < 1 or patches % rows:
        return None
    columns = patches // rows
    return (rows, columns) if rows * width == columns * height else None


def _stated_grids(module: nn.Module, image_size: _Grid | None) -> list[_Grid]:
    """Grids of patches that a module's attributes tell: by patch size and image size, or outright."""
    found = []
    for holder in (getattr(module, "patch_embed", None), module, getattr(module, "config", None)):
        patch = _pair(getattr(holder, "patch_size", None))
        if patch is not None and image_size is not None:
            found.append((image_size[0] // patch[0], image_size[1] // patch[1]))
        grid = _pair(getattr(holder, "grid_size", None))
        if grid is not None:
            found.append(grid)
    return found


def _pair(value: Any) -> _Grid | None:
    if isinstance(value, int) and value > 0:
        return value, value
    if (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(item, int) and item > 0 for item in value)
    ):
        return value[0], value[1]
    return None
