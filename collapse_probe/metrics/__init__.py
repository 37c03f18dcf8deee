"""Collapse metrics on attention maps: thin `torchmetrics.Metric` classes over `collapse_probe.metrics.functional`."""

from collapse_probe.metrics.cross_head import CrossHeadSimilarity
from collapse_probe.metrics.cross_layer import CrossLayerSimilarity
from collapse_probe.metrics.entropy import AttentionEntropy

__all__ = ["AttentionEntropy", "CrossHeadSimilarity", "CrossLayerSimilarity"]
