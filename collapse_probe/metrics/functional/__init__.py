"""Metrics as pure functions of tensors or arrays."""

from collapse_probe.metrics.functional.across_blocks import feature_similarity
from collapse_probe.metrics.functional.attention_distance import mean_attention_distance
from collapse_probe.metrics.functional.branches import branch_share
from collapse_probe.metrics.functional.cka import linear_cka, unbiased_hsic
from collapse_probe.metrics.functional.cross_head import cross_head_similarity, effective_heads, head_diversity
from collapse_probe.metrics.functional.cross_layer import (
    centred_cross_layer_similarity,
    cross_layer_similarity,
    image_independent_similarity,
    relative_variation,
)
from collapse_probe.metrics.functional.divergence import head_divergence
from collapse_probe.metrics.functional.entropy import attention_entropy
from collapse_probe.metrics.functional.feature_spectrum import diagonal_frequencies, relative_log_amplitude
from collapse_probe.metrics.functional.low_pass import high_to_low_ratio
from collapse_probe.metrics.functional.map_rank import effective_rank, stable_rank
from collapse_probe.metrics.functional.norms import (
    HIGH_NORM_RATIO,
    high_norm_tokens,
    median_patch_norm,
    norm_ratio,
    token_norms,
)
from collapse_probe.metrics.functional.oversmoothing import token_similarity
from collapse_probe.metrics.functional.residual import rank_residual, rank_residual_frobenius
from collapse_probe.metrics.functional.sinks import attention_received, constant_rows, sink_share
from collapse_probe.metrics.functional.total_variation import total_variation_similarity
from collapse_probe.ratio import block_similarity_ratio, onset, similar_blocks, similarity_ratio

__all__ = [
    "HIGH_NORM_RATIO",
    "attention_entropy",
    "attention_received",
    "block_similarity_ratio",
    "branch_share",
    "centred_cross_layer_similarity",
    "constant_rows",
    "cross_head_similarity",
    "cross_layer_similarity",
    "diagonal_frequencies",
    "effective_heads",
    "effective_rank",
    "feature_similarity",
    "head_divergence",
    "head_diversity",
    "high_norm_tokens",
    "high_to_low_ratio",
    "image_independent_similarity",
    "linear_cka",
    "mean_attention_distance",
    "median_patch_norm",
    "norm_ratio",
    "onset",
    "rank_residual",
    "rank_residual_frobenius",
    "relative_log_amplitude",
    "relative_variation",
    "similar_blocks",
    "similarity_ratio",
    "sink_share",
    "stable_rank",
    "token_norms",
    "token_similarity",
    "total_variation_similarity",
    "unbiased_hsic",
]
