"""How a model wants its images: size, channels, normalisation, crop; timm's data config, completed and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from collapse_probe.errors import UsageError

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def data_config(
    model: nn.Module,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> dict[str, Any]:
    """Preprocessing for a model, as plain data that :func:`collapse_probe.loading.open_images` takes.

    Args:
        model: timm's own settings are used; a model without them gets ImageNet's at the size it was built for (224).
        img_size: height and width in pixels.
        mean, std: one value per channel, or one for all, in units of 0..1 pixels.
        crop_pct: the shorter side is resized to ``img_size / crop_pct``, then the centre is cropped; in (0, 1].
        interpolation: one of nearest, bilinear, bicubic, box, hamming, lanczos.

    Returns:
        ``input_size`` (C, H, W), ``interpolation``, ``mean``, ``std`` (C values each), ``crop_pct``, ``crop_mode``.

    Raises:
        UsageError: an argument is out of range or has the wrong length.
    """
    if img_size is not None and (not isinstance(img_size, int) or img_size < 1):
        raise UsageError(f"img_size={img_size!r} must be a whole number of pixels, 1 or more.")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UsageError(f"crop_pct={crop_pct} must lie in (0, 1].")
    if interpolation is not None and interpolation not in _INTERPOLATIONS:
        raise UsageError(f"interpolation={interpolation!r} is not one of {', '.join(_INTERPOLATIONS)}.")
    config = dict(resolve_model_data_config(model))
    channels = _channels(model, config["input_size"][0])
    size = (img_size, img_size) if img_size else _built_size(model, config["input_size"][1:])
    return {
        **config,
        "input_size": (channels, *size),
        "mean": _per_channel("mean", mean, config["mean"], channels),
        "std": _per_channel("std", std, config["std"], channels, positive=True),
        "crop_pct": config["crop_pct"] if crop_pct is None else crop_pct,
        "interpolation": interpolation or config["interpolation"],
    }


def matches_model(model: nn.Module, config: Mapping[str, Any], img_size: int | None = None) -> Any:
    """Whether preprocessing is what the model's own settings say, as plain data for the provenance.

    Args:
        model: whose settings are meant; the size that it was built for is its own, unless the caller asked for it.
        config: from :func:`data_config`.
        img_size: the size that the caller asked for, if any.

    Returns:
        True; or what differs, each with ``setting``, and its values of the ``model`` and as ``used``; or a sentence
        where the model has no settings of its own.
    """
    if not getattr(model, "pretrained_cfg", None):
        return "not known: the model states none of its own, so ImageNet's usual settings are taken"
    own = data_config(model)
    if img_size is not None:
        stated = resolve_model_data_config(model)["input_size"]
        own["input_size"] = (own["input_size"][0], *stated[1:])
    return [
        {"setting": name, "model": own.get(name), "used": used}
        for name, used in config.items()
        if own.get(name) != used
    ] or True


def make_transform(config: dict[str, Any]) -> Any:
    """timm's evaluation transform: a PIL image in, a float tensor ``[C, H, W]`` out."""
    return create_transform(**config, is_training=False)


def _channels(model: nn.Module, default: int) -> int:
    """Input channels of the model as built: timm's settings describe the pretrained weights, not `in_chans`."""
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    if not isinstance(first, str):
        return default
    try:
        return int(getattr(model.get_submodule(first), "in_channels", default))
    except AttributeError:
        return default


def _built_size(model: nn.Module, default: Sequence[int]) -> tuple[int, int]:
    """Image size that the patch embedding was built for, where the model has one."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size if isinstance(size, (tuple, list)) and len(size) == 2 else default
    return int(height), int(width)


def _per_channel(
    name: str, given: Sequence[float] | None, default: Sequence[float], channels: int, positive: bool = False
) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in (default if given is None else given))
    except (TypeError, ValueError):
        raise UsageError(f"{name}={default if given is None else given!r} must be numbers.") from None
    if given is not None and len(values) not in (1, channels):
        raise UsageError(f"{name}={values} has {len(values)} values; the model takes images of {channels} channels.")
    if not all(math.isfinite(value) and (value > 0 or not positive) for value in values):
        raise UsageError(f"{name}={values} must be finite{' and above 0' if positive else ''}.")
    if len(values) != channels:
        # A model built for another number of channels than its settings describe: the mean over channels serves all.
        values = (sum(values) / len(values),) * channels
    return values
