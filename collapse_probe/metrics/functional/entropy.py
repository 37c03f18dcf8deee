"""Entropy of attention rows (Zhai et al., ICML 2023, arXiv 2303.06296)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_entropy(attention: Tensor, normalize: bool = False) -> Tensor:
    """Shannon entropy of each query's attention, `-sum_j A log A`.

    Args:
        attention: probabilities `[..., Q, K]`.
        normalize: divide by log K, the entropy of uniform attention.

    Returns:
        `[..., Q]`, in nats (0..log K), or in 0..1 when normalised; computed in float32 or wider because the logarithm
        of half-precision zeros is not finite. NaN where the map is not finite, and where K is 1 and `normalize` is set.
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    entropy = torch.special.entr(attention).sum(-1).clamp(min=0)
    if not normalize:
        return entropy
    largest = torch.tensor(float(attention.shape[-1]), dtype=entropy.dtype, device=entropy.device).log()
    return entropy / largest
