"""Metrics as pure functions of tensors or arrays."""

from collapse_probe.metrics.functional.cross_head import cross_head_similarity, head_diversity
from collapse_probe.metrics.functional.cross_layer import (
    centred_cross_layer_similarity,
    cross_layer_similarity,
    image_independent_similarity,
    relative_variation,
)
from collapse_probe.metrics.functional.entropy import attention_entropy
from collapse_probe.metrics.functional.ratio import block_similarity_ratio, onset, similar_blocks, similarity_ratio

__all__ = [
    "attention_entropy",
    "block_similarity_ratio",
    "centred_cross_layer_similarity",
    "cross_head_similarity",
    "cross_layer_similarity",
    "head_diversity",
    "image_independent_similarity",
    "onset",
    "relative_variation",
    "similar_blocks",
    "similarity_ratio",
]
