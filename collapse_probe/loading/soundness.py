"""Weights that cannot be those of a working model: NaN, infinities, matrices that are zero or one number throughout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from collapse_probe.errors import DamagedFileError
from collapse_probe.loading.signatures import HEAD


def non_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Keys of tensors that hold NaN or infinities."""
    return [key for key, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]


def constant_matrices(state: Mapping[str, Tensor]) -> list[str]:
    """Keys of weight matrices and kernels whose numbers are all the same.

    Norms, biases and layer scales often are before training, tokens and position tables may be, and so may a classifier
    that fine-tuning starts from; a matrix that maps tokens to tokens never is.
    """
    return [
        key for key, tensor in state.items() if _is_matrix(key, tensor) and bool((tensor == tensor.flatten()[0]).all())
    ]


def check_sound(file: Path, state: Mapping[str, Tensor]) -> None:
    """Raises DamagedFileError where weights are not finite or constant, and names them."""
    broken, constant = non_finite(state), constant_matrices(state)
    if not broken and not constant:
        return
    found = [
        f"{len(keys)} of {len(state)} tensors {words}: {', '.join(keys[:4])}{', …' if len(keys) > 4 else ''}"
        for keys, words in ((broken, "hold NaN or infinities"), (constant, "are one number throughout"))
        if keys
    ]
    raise DamagedFileError(
        f"{file} cannot be the weights of a working model: {'; '.join(found)}. Look for divergence in training or a "
        "damaged copy, or analyse it all the same with --allow-bad-weights (allow_bad_weights=True)."
    )


def _is_matrix(key: str, tensor: Tensor) -> bool:
    return (
        key.endswith("weight")
        and tensor.ndim >= 2
        and tensor.is_floating_point()
        and sum(size > 1 for size in tensor.shape) >= 2
        and not HEAD.match(key)
    )
