"""The codes of all findings, which scripts rely on, and the readings that each of them rests on."""

from __future__ import annotations

NON_FINITE = "non-finite"
CONSTANT_WEIGHTS = "constant-weights"
UNTRAINED = "untrained"
UNIFORM = "uniform-attention"
COLLAPSE = "attention-collapse"
TOKENS = "token-collapse"
ENTROPY = "entropy-collapse"
DEAD_HEADS = "dead-heads"
REDUNDANT_HEADS = "head-redundancy"
OUTLIERS = "outlier-tokens"
LARGE_PREFIX = "large-prefix-tokens"
IDLE = "idle-attention"
FLAT = "flat-attention"
SINKS = "attention-sinks"
HEALTHY = "healthy"
NOT_COMPARABLE = "not-comparable"

#: Code -> readings without which its rule finds nothing: where one of them is absent from every layer, that there is no
#: such finding means nothing. Empty where weights or counts decide.
RESTS_ON: dict[str, tuple[str, ...]] = {
    NON_FINITE: (),
    CONSTANT_WEIGHTS: (),
    UNTRAINED: (),
    UNIFORM: ("normalized_entropy", "relative_variation"),
    COLLAPSE: ("similarity_to_previous",),
    TOKENS: ("token_similarity_typical", "rank_residual_frobenius_typical"),
    ENTROPY: ("normalized_entropy",),
    DEAD_HEADS: ("constant_rows",),
    REDUNDANT_HEADS: ("cross_head_similarity", "centred_cross_head_similarity"),
    OUTLIERS: ("largest_norm_ratio", "outlier_share"),
    LARGE_PREFIX: ("largest_norm_ratio",),
    IDLE: ("attention_branch_share",),
    FLAT: ("relative_variation",),
    SINKS: ("sink_share",),
    HEALTHY: (),
    NOT_COMPARABLE: (),
}

CODES = tuple(RESTS_ON)
