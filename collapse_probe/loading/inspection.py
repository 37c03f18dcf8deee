"""What a file of weights is, as plain data: `collapse-probe inspect` without the printing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collapse_probe.loading.anatomy import in_words
from collapse_probe.loading.examine import examine
from collapse_probe.loading.folders import ModelFolder, open_folder
from collapse_probe.loading.model_source import existing
from collapse_probe.loading.soundness import constant_matrices, non_finite


def inspect_weights(
    source: str | Path, *, use_ema: bool = False, key: str | None = None, num_heads: int | None = None
) -> dict[str, Any]:
    """Read a weights file and say what was recognised; no model is built.

    Args:
        source: a weights file, or a folder that holds one.
        use_ema, key, num_heads: as those of :func:`collapse_probe.load_model`.

    Returns:
        ``file`` (path, sha256, size_bytes, format, note, key, prefix_cut, left_out, dtype, tensors, scheme),
        ``stored`` (architecture and model_kwargs that the file or a configuration beside it names), ``anatomy`` (pairs
        of words), ``candidates`` (each with name, arguments, heads, heads_from, same), ``also`` (architectures
        of another image size that fit, too, and compute something else), ``nearest`` (architectures of about that size,
        where there is no candidate), ``non_finite`` and ``constant`` (keys of bad tensors).

    Raises:
        ModelError, UsageError: the file is damaged, unsafe, or holds no weights.
    """
    path = existing(source)
    folder = open_folder(path) if path.is_dir() else ModelFolder(path)
    examined = examine(folder.weights, use_ema, key, num_heads, config=folder.config)
    recognition, checkpoint = examined.recognition, examined.checkpoint
    return {
        "file": {
            **checkpoint.facts,
            "scheme": examined.scheme,
            "left_out": [*checkpoint.facts["left_out"], *examined.left_out],
        },
        "stored": {
            "architecture": folder.config.architecture or checkpoint.architecture,
            "model_kwargs": {**folder.config.model_kwargs, **checkpoint.model_kwargs},
            "num_heads": folder.config.num_heads,
        },
        "anatomy": {} if recognition.anatomy is None else dict(in_words(recognition.anatomy)),
        "candidates": [
            {
                "name": item.name,
                "arguments": item.arguments,
                "heads": item.heads,
                "heads_from": item.heads_from,
                "same": item.same,
            }
            for item in recognition.candidates
        ],
        "also": [str(item) for item in recognition.also],
        "nearest": recognition.nearest,
        "non_finite": non_finite(examined.state),
        "constant": constant_matrices(examined.state),
    }
