"""What the tokens of a model are: how many prefix tokens, and on which grid the patches lie."""

from __future__ import annotations

import math

from torch import nn

from collapse_probe.capture.attention_map import QueryKey, Source, TokenLayout


def token_layout(model: nn.Module, keys: int, image_size: tuple[int, int] | None = None) -> TokenLayout:
    """The layout of `keys` key tokens: from the model's own attributes (timm's `num_prefix_tokens`,
    `patch_embed.patch_size`) where they fit, otherwise the one reading under which the patches form a square."""
    stated = getattr(model, "num_prefix_tokens", None)
    for prefix in (stated,) if isinstance(stated, int) else (0, 1):
        grid = _grid(model, keys - prefix, image_size)
        if grid is not None:
            return TokenLayout(prefix, grid)
    return TokenLayout(stated if isinstance(stated, int) and stated < keys else 0)


def is_channel_attention(source: Source, owner: nn.Module, layout: TokenLayout) -> bool:
    """Whether channels attend to channels (XCiT): the product of queries and keys ran over the tokens instead or, where
    queries and keys are not known, the map is as large as a head is wide."""
    embed = getattr(owner, "patch_embed", None)
    patches = getattr(embed, "num_patches", None)
    if not isinstance(patches, int):
        return False
    tokens = {patches, patches + layout.prefix_tokens}
    _, heads, _, keys = source.shape
    if isinstance(source, QueryKey):
        return keys not in tokens and source.q.shape[-1] in tokens
    return keys not in tokens and keys * heads == getattr(owner, "embed_dim", None)


def _grid(model: nn.Module, patches: int, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    candidates = [getattr(embed, "grid_size", None)]
    if image_size is not None and isinstance(patch, (tuple, list)) and len(patch) == 2 and all(patch):
        candidates.insert(0, (image_size[0] // patch[0], image_size[1] // patch[1]))
    for candidate in candidates:
        if candidate is not None and len(candidate) == 2 and math.prod(candidate) == patches:
            return int(candidate[0]), int(candidate[1])
    side = math.isqrt(max(patches, 0))
    return (side, side) if side > 0 and side * side == patches else None
