"""Similarity of attention maps across layers (DeepViT, Zhou et al., arXiv 2103.11886, equation 2), and its parts.

All functions take the maps of L comparable layers, `[L, B, H, Q, K]`, and compute in float32 or wider. NaN marks what
is undefined: leave it out of means.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collapse_probe.errors import UsageError
from collapse_probe.metrics.functional.columns import MIN_VARIATION, Columns, decompose_columns


def cross_layer_similarity(maps: Tensor | Sequence[Tensor]) -> Tensor:
    r"""Cosine similarity of the attention columns of every pair of layers.

    .. math:: M^{p,q}_{h,t} = \frac{\langle A^p_{h,:,t}, A^q_{h,:,t}\rangle}{|A^p_{h,:,t}|\,|A^q_{h,:,t}|}

    DeepViT, equation 2. The column of key token t over all queries is compared, not the row.

    Args:
        maps: `[L, B, H, Q, K]`, or a sequence of L tensors `[B, H, Q, K]`.

    Returns:
        `[B, L, L, H, K]`, in -1..1 (0..1 for probabilities); NaN where a column is zero or not finite.

    Raises:
        UsageError: the maps do not have five axes or differ in shape.

    Example:
        >>> import torch
        >>> maps = torch.eye(4).expand(2, 1, 1, 4, 4)
        >>> cross_layer_similarity(maps)[0, 0, 1, 0]
        tensor([1., 1., 1., 1.])
    """
    columns = _decomposed(maps)
    similarity = _gram(columns.deviation) + _outer(columns.level)
    return similarity.clamp(-1, 1).masked_fill(~_both(columns.exists), torch.nan)


def centred_cross_layer_similarity(maps: Tensor | Sequence[Tensor], min_variation: float = MIN_VARIATION) -> Tensor:
    """Cosine of the columns after subtracting each column's mean over queries (Pearson correlation).

    What is left of M when uniform attention is taken away. Undefined (NaN) where a column's relative variation is below
    `min_variation` in either layer: there the deviation is rounding noise.

    Args:
        maps: `[L, B, H, Q, K]`, or a sequence of L tensors `[B, H, Q, K]`.
        min_variation: smallest relative variation at which the reading is defined.

    Returns:
        `[B, L, L, H, K]`, in -1..1.

    Raises:
        UsageError: the maps do not have five axes or differ in shape.
    """
    columns = _decomposed(maps)
    exists = columns.centred_exists(min_variation)
    scale = columns.variation.masked_fill(~exists, torch.inf)
    centred = _gram(columns.deviation / scale[..., None])
    return centred.clamp(-1, 1).masked_fill(~_both(exists), torch.nan)


def relative_variation(maps: Tensor | Sequence[Tensor]) -> Tensor:
    """How far each attention column is from uniform: `r = |a - mean(a)| / |a|`.

    Args:
        maps: `[L, B, H, Q, K]`, or a sequence of L tensors `[B, H, Q, K]`.

    Returns:
        `[L, B, H, K]`, in 0..1; 0 for a constant column, NaN for one that is zero or not finite.

    Raises:
        UsageError: the maps do not have five axes or differ in shape.
    """
    columns = _decomposed(maps)
    return columns.variation.masked_fill(~columns.exists, torch.nan)


def image_independent_similarity(maps: Tensor | Sequence[Tensor]) -> Tensor:
    """The part of M that needs no image: the mean of M between layer p on one image and layer q on another.

    Over all ordered pairs of different images at once, in linear time: with unit columns u_b,
    `(<sum_b u_b^p, sum_b u_b^q> - sum_b <u_b^p, u_b^q>) / (n_p n_q - n_pq)`, where n counts the images whose column
    exists.

    Args:
        maps: `[L, B, H, Q, K]`, or a sequence of L tensors `[B, H, Q, K]`; B at least 2.

    Returns:
        `[L, L, H, K]`, in -1..1; NaN where fewer than two images have the columns.

    Raises:
        UsageError: the maps do not have five axes, differ in shape, or hold fewer than two images.
    """
    columns = _decomposed(maps)
    if columns.level.shape[1] < 2:
        raise UsageError("image_independent_similarity needs the maps of at least 2 images, not 1.")
    deviation, level = columns.deviation.double(), columns.level.double()
    exists = columns.exists.double()
    summed, summed_level, counts = deviation.sum(1), level.sum(1), exists.sum(1)
    crossed = torch.einsum("phkq,rhkq->prhk", summed, summed) + torch.einsum(
        "phk,rhk->prhk", summed_level, summed_level
    )
    same = (_gram(deviation) + _outer(level)).sum(0)
    pairs = torch.einsum("phk,rhk->prhk", counts, counts) - _outer(exists).sum(0)
    return torch.where(pairs > 0, (crossed - same) / pairs, torch.nan)


def _decomposed(maps: Tensor | Sequence[Tensor]) -> Columns:
    if not isinstance(maps, Tensor):
        shapes = {tuple(item.shape) for item in maps}
        if len(shapes) != 1:
            raise UsageError(f"layers can be compared only where their maps agree in shape; got {sorted(shapes)}.")
        maps = torch.stack(list(maps))
    if maps.ndim != 5:
        raise UsageError(f"maps must have the axes [L, B, H, Q, K]; got a tensor of shape {list(maps.shape)}.")
    return decompose_columns(maps.mT.clone(memory_format=torch.contiguous_format))


def _gram(deviation: Tensor) -> Tensor:
    return torch.einsum("pbhkq,rbhkq->bprhk", deviation, deviation)


def _outer(value: Tensor) -> Tensor:
    return torch.einsum("pbhk,rbhk->bprhk", value, value)


def _both(exists: Tensor) -> Tensor:
    by_image = exists.transpose(0, 1)
    return by_image[:, :, None] & by_image[:, None, :]
