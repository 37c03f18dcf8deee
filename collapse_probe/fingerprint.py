"""What tells a model's weights, and a set of images, from others: shards must be of the same."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.loading import ImageSource
from collapse_probe.loading.folder import FolderImages
from collapse_probe.loading.tensors import TensorImages

#: Attributes of layers that change what they compute; others may be counters that change while a model runs.
_TELLING = (
    "num_heads", "heads", "head_dim", "dim_head", "scale", "temperature", "eps", "approximate", "window_size",
    "shift_size", "kernel_size", "stride", "padding", "dilation", "groups", "num_prefix_tokens",
)  # fmt: skip
_PLAIN = (bool, int, float, str, tuple)


def weights_fingerprint(model: nn.Module) -> str:
    """A digest of all parameters and buffers, by name, type, shape and value, and of what weights do not show: the
    classes of its layers, and numbers such as heads and scales."""
    digest = hashlib.blake2b(digest_size=16)
    for path, module in model.named_modules():
        plain = [(key, str(getattr(module, key))) for key in _TELLING if isinstance(vars(module).get(key), _PLAIN)]
        digest.update(f"{path} {type(module).__qualname__} {plain}".encode("utf-8", "surrogateescape"))
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):  # a module may keep other things there
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def images_fingerprint(source: ImageSource, images: Any) -> str | None:
    """A digest of which images a source delivers to all shards together, and in which order.

    Files are told apart by their paths within the folder and their sizes, images of a tensor by their values; which
    folders lie beside them counts, too. None for a loader, whose images are not known before it has delivered them.

    Args:
        source: where images come from.
        images: what it was opened on.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, FolderImages):
        digest.update(repr(source.folders).encode("utf-8", "surrogateescape"))  # their order can be that of classes
        for path in source.paths:
            digest.update(os.fsencode(f"{path}\0{_size(os.path.join(source.root, path))}\0"))  # noqa: PTH118 - many
    elif isinstance(source, TensorImages):
        for place in source.indices:
            digest.update(_bytes(images[place]))
    else:
        return None
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().tobytes()


def _size(path: str) -> int:
    """In bytes; -1 where there is no such file, which is an image that cannot be read."""
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return -1
