"""Turn a folder, a tensor or a DataLoader into batches: `open_images`.

The analysis takes images in the order in which they come and pairs neighbours, so order is part of the result. For
folders and tensors it hangs on each image alone (its relative path, its content) and a seed: the first N are a random
sample, neighbours are random pairs, and neither the file system nor the caller's order matters. A DataLoader keeps
its own order. Each image carries its place in that order, and by it shards divide the images among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from collapse_probe.errors import UsageError
from collapse_probe.loading.folder import FolderImages
from collapse_probe.loading.image_source import ImageSource
from collapse_probe.loading.tensors import LoaderImages, TensorImages
from collapse_probe.shards import WHOLE, Shard


def open_images(
    source: str | Path | Tensor | Iterable[Any],
    *,
    config: Mapping[str, Any],
    batch_size: int = 32,
    workers: int = 0,
    num_samples: int | None = None,
    seed: int = 0,
    shard: Shard = WHOLE,
    pin_memory: bool = False,
) -> ImageSource:
    """Batches from a folder of image files, a tensor, or a DataLoader.

    Args:
        source: a folder (searched recursively); a tensor ``[N, C, H, W]``, preprocessed; or an iterable of batches:
            a tensor, a tuple or list that starts with one, or a mapping with ``pixel_values``, ``image`` or ``images``.
        config: from :func:`collapse_probe.loading.data_config`; may be empty for tensors and loaders, whose size is not
            checked then.
        batch_size: images per batch, 1 or more; a DataLoader keeps its own.
        workers: processes that decode files, 0 or more, each with one thread; no more than there are batches. They do
            not change results.
        num_samples: use only that many of the whole source, 1 or more, whatever the shard; None for all.
        seed: which random order; has no effect on a DataLoader.
        shard: deliver this part of the images only. Files of other shards are not opened. A DataLoader is iterated
            whole in every shard and must deliver the same images in the same order each time: shuffle with a seed.
        pin_memory: decode files into page-locked memory, from which a CUDA device copies while it computes.

    Raises:
        UsageError: an argument is out of range, or the source is none of these.
        ImagesError: the folder does not exist or holds no image; the tensor is empty or does not fit ``config``.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("num_samples", num_samples, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UsageError(f"{name}={value!r} must be a whole number, {least} or more.")
    if isinstance(source, (str, Path)):
        return FolderImages(source, config, batch_size, workers, num_samples, seed, shard, pin_memory)
    if isinstance(source, Tensor):
        return TensorImages(source, config, batch_size, num_samples, seed, shard)
    if isinstance(source, Iterable) and not isinstance(source, (bytes, Mapping)):
        return LoaderImages(source, config, num_samples, shard)
    raise UsageError(
        f"Images cannot be a {type(source).__name__}: give a folder, a tensor [N, C, H, W] or a DataLoader."
    )
