"""One image file as a model takes it, and back to a picture as the model saw it."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collapse_probe.errors import ImageFileError, ImagesError
from collapse_probe.loading.data_config import make_transform
from collapse_probe.loading.decode import decode
from collapse_probe.words import neutral


def read_image(path: str | Path, config: Mapping[str, Any]) -> Tensor:
    """An image file, preprocessed: floats ``[C, H, W]``.

    Args:
        path: the file.
        config: from :func:`collapse_probe.loading.data_config`.

    Raises:
        ImagesError: it is no picture that can be read, or the model takes images of other than 1 or 3 channels.
    """
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise ImagesError(f"Image files give 1 or 3 channels and the model takes {channels}: pass a tensor instead.")
    _check_file(path)
    try:
        image = decode(Path(path), channels)
    except ImageFileError as error:
        raise ImagesError(f"{neutral(str(path))}: {error}.") from None
    try:
        pixels: Tensor = make_transform(dict(config))(image)
    except ValueError as error:  # a sliver can be left without width where the whole of it is to be shown
        raise ImagesError(
            f"{neutral(str(path))}: {image.width} x {image.height} pixels cannot be resized: {error}."
        ) from None
    return pixels


def _check_file(path: str | Path) -> None:
    """A folder is no picture, and a pipe could block. What is not there is for the decoder to report."""
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ImagesError(f"{neutral(str(path))} is no file; give one image file.")


def as_seen(image: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A preprocessed image ``[C, H, W]`` without its normalisation, in 0..1: what the model saw of the file."""
    mean, std = (torch.tensor(config[name], dtype=image.dtype)[:, None, None] for name in ("mean", "std"))
    return (image * std + mean).clamp(0, 1)
