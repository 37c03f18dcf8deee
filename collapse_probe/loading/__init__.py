"""Model sources and image sources: turn a path or a name into a model or batches, and say what was recognised.

This is the one room that opens strangers' files. It decides by content before torch sees a byte and never unpickles
arbitrary objects.
"""

from __future__ import annotations

from collapse_probe.loading.data_config import data_config, matches_model
from collapse_probe.loading.image_source import Batch, ImageSource, check_skipped
from collapse_probe.loading.images import open_images
from collapse_probe.loading.inspection import inspect_weights
from collapse_probe.loading.labels import Labels, labels_of
from collapse_probe.loading.listing import checkpoint_digest, list_checkpoints
from collapse_probe.loading.model_source import load_model
from collapse_probe.loading.picture import as_seen, read_image

__all__ = [
    "Batch",
    "ImageSource",
    "Labels",
    "as_seen",
    "check_skipped",
    "checkpoint_digest",
    "data_config",
    "inspect_weights",
    "labels_of",
    "list_checkpoints",
    "load_model",
    "matches_model",
    "open_images",
    "read_image",
]
