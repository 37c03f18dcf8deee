"""One image through one model, to be looked at: a :class:`~collapse_probe.look.Look` with the picture and the maps.

The second pipeline beside `analysis`: it may know every room. Past it there is no tensor and no module.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import collapse_probe.models as bundled_models
from collapse_probe.capture import AttentionMap, Captured, capture, layer_groups
from collapse_probe.errors import CaptureError, ImagesError, ResourceError, UsageError, is_out_of_memory
from collapse_probe.loading import as_seen, data_config, read_image
from collapse_probe.look import LayerLook, Look
from collapse_probe.metrics.functional import cross_layer_similarity
from collapse_probe.networks import device_of, open_model, prepared
from collapse_probe.options import check_preprocessing

#: Bytes that the maps of a look may take.
MOST_BYTES = 1 << 30

#: Elements of one layer's map that are computed at once.
_TILE = 1 << 22

#: Why maps of a kind cannot be laid over the image. Kinds that can: "token", "class", "pooling".
_NOT_ON_THE_IMAGE = {
    "cross": "its queries come from another sequence than its keys",
    "channel": "its channels attend to channels",
    "gate": "a softmax weights values there without comparing queries with keys",
}

#: What a parameter is called that is a class token (timm and most others, torchvision, CLIP).
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def look_at(
    model: nn.Module | str | Path | None = None,
    image: str | Path | Tensor | None = None,
    *,
    layers: Sequence[int | str] | int | str | None = None,
    heads: Sequence[int] | None = None,
    attention: str = "applied",
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    use_ema: bool = False,
    key: str | None = None,
    num_heads: int | None = None,
    allow_bad_weights: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Look:
    """What does attention look like in this model, on this image?

    The mean over heads is kept of every layer; maps of single heads of those that are chosen.

    Args:
        model: as for `analyze`; without it, the bundled ``digits_vit_24b``.
        image: a file, or a tensor ``[C, H, W]`` already preprocessed, which is shown stretched from its smallest value
            to its largest. Without it, for bundled models, a bundled picture.
        layers: of which layers single heads are kept: numbers in execution order (negative ones count from the last),
            names, or shell-style patterns of names; by default all.
        heads: which heads those are; by default all, with ``()`` none.
        attention: ``"applied"`` (what multiplied the values) or ``"softmax"`` (the map underneath re-attention).
        arch, checkpoint, pretrained, use_ema, key, num_heads, allow_bad_weights, model_kwargs, img_size, mean, std, \
crop_pct, interpolation, seed, device: as for `analyze`.

    Returns:
        The :class:`~collapse_probe.look.Look`; `collapse_probe.plots` draws it.

    Raises:
        UsageError: an argument is out of range or contradicts another.
        ModelError: the model was rejected, or has no layer whose map can be laid over the image.
        ImagesError: the image cannot be read or does not suit the model.
        ResourceError: the maps would take more than 1 GiB, or memory ran out.
    """
    if attention not in ("applied", "softmax"):
        raise UsageError(f"attention={attention!r} must be 'applied' or 'softmax'.")
    check_preprocessing(img_size, mean, std, crop_pct, interpolation)
    if image is None:
        if model is not None and model not in bundled_models.BUNDLED:
            raise UsageError("No image given, and the bundled pictures of digits suit the bundled models only.")
        image = bundled_models.bundled_image()
    given = isinstance(model, nn.Module)
    network = open_model(
        bundled_models.bundled_weights() if model is None else model, arch=arch, checkpoint=checkpoint,
        pretrained=pretrained, use_ema=use_ema, key=key, num_heads=num_heads, allow_bad_weights=allow_bad_weights,
        model_kwargs=model_kwargs, img_size=img_size, seed=seed,
    )  # fmt: skip
    config = data_config(network, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation, img_size=img_size)
    pixels, picture = _opened(image, config, check=hasattr(network, "pretrained_cfg"))
    target = device_of(device, network if given else None)
    try:
        with prepared(network, target), torch.inference_mode():
            captured = _captured(network, pixels.to(target))
            look = _look(captured, attention, _has_class_token(network), picture)
            look = _with_heads(look, _maps(captured, attention), layers, heads)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError("Out of memory with one image. Use a smaller img_size, or another device.") from error
    return replace(look, provenance=_provenance(network, image, config))


def _opened(image: str | Path | Tensor, config: Mapping[str, Any], check: bool) -> tuple[Tensor, NDArray[np.float32]]:
    """The image as a batch of one, and as a picture; a tensor of another size than the model's is refused."""
    if isinstance(image, Tensor):
        single = image[0] if image.ndim == 4 and len(image) == 1 else image
        if single.ndim != 3 or not single.is_floating_point():
            raise ImagesError(
                f"The image is a tensor of shape {list(image.shape)} and type {image.dtype}; expected floats "
                "[channels, height, width], normalised as the model wants them."
            )
        if check and tuple(single.shape) != tuple(config["input_size"]):
            raise ImagesError(
                f"The image is a tensor of size {tuple(single.shape)} (channels, height, width); the model takes "
                f"{tuple(config['input_size'])}. Resize it, or give img_size where the model takes other sizes."
            )
        low, high = single.min(), single.max()
        seen = (single - low) / (high - low).clamp_min(torch.finfo(single.dtype).tiny)
    elif isinstance(image, (str, Path)):
        single = read_image(image, config)
        seen = as_seen(single, config)
    else:
        raise UsageError(f"image must be a path or a tensor [C, H, W]; got a {type(image).__name__}.")
    grey = seen.shape[0] != 3
    picture = seen.mean(0) if grey else seen.movedim(0, -1)
    return single[None], picture.float().cpu().numpy()


def _captured(network: nn.Module, pixels: Tensor) -> Captured:
    dtype = next((item.dtype for item in network.parameters() if item.is_floating_point()), torch.float32)
    with capture(network, features=True) as captured:
        network(pixels.to(dtype))
    return captured


def _maps(captured: Captured, attention: str) -> dict[str, AttentionMap]:
    return {name: item if attention == "applied" else item.softmax for name, item in captured.maps.items()}


def _look(captured: Captured, attention: str, class_token: bool, picture: NDArray[np.float32]) -> Look:
    """Means over heads, and M between neighbours, of all layers whose maps have a place on the image."""
    maps = _maps(captured, attention)
    left_out = {name: reason for name, item in maps.items() if (reason := _why_not(item))}
    left_out |= captured.not_captured
    drawn = {name: item for name, item in maps.items() if name not in left_out}
    if not drawn:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise CaptureError(f"No layer has a map that can be laid over the image. {reasons or 'No attention was seen'}.")
    _check_size(sum(item.shape[2] * item.shape[3] for item in drawn.values()))
    before = {
        name: previous
        for names in layer_groups(drawn)
        for previous, name in pairwise(names)
        if drawn[name].shape[2] > 1  # of a single query all columns are alike
    }
    blocks = {name: item.name for item in captured.features.values() for name in item.layers}
    order = list(maps)
    layers = {}
    for name, item in drawn.items():
        previous = before.get(name)
        layers[name] = LayerLook(
            name=name, number=order.index(name), kind=item.kind, heads=item.shape[1],
            **_layout(item), class_token=class_token, is_probability=item.is_probability,
            mean=_mean(item), previous=previous, block=blocks.get(name),
            similarity=None if previous is None else _similarity(drawn[previous], item),
        )  # fmt: skip
    return Look(picture, layers, left_out, order, attention)


def _why_not(item: AttentionMap) -> str:
    """Why a layer's map has no place on the image; empty where it has."""
    if item.windows > 1:
        return f"its attention stays within {item.windows} windows of {item.shape[3]} tokens"
    return _NOT_ON_THE_IMAGE.get(item.kind, "")


def _layout(item: AttentionMap) -> dict[str, Any]:
    """What keys and queries are; a grid only where it accounts for all of them."""
    _, _, queries, keys = item.shape
    prefix, grid = item.layout.prefix_tokens, item.layout.grid
    if grid is not None and prefix + grid[0] * grid[1] != keys:
        grid = None
    same = item.kind == "token" and queries == keys
    return {
        "prefix_tokens": prefix,
        "grid": grid,
        "query_prefix": prefix if same else 0,
        "query_grid": grid if same else None,
    }


def _mean(item: AttentionMap) -> NDArray[np.float32]:
    """The mean over heads, ``[Q, K]``."""
    parts = [item.rows(*tile)[0].mean(0).float().cpu() for tile in _tiles(item.shape[2], item.shape[1] * item.shape[3])]
    return np.asarray(torch.cat(parts).numpy())


def _single(item: AttentionMap, heads: Sequence[int]) -> dict[int, NDArray[np.float32]]:
    """Maps of heads, each ``[Q, K]``."""
    if not heads:
        return {}
    wanted = torch.tensor(heads, device=item.device)
    tiles = _tiles(item.shape[2], item.shape[1] * item.shape[3])
    found = torch.cat([item.rows(*tile)[0, wanted].float().cpu() for tile in tiles], dim=1).numpy()
    return {head: np.asarray(found[place]) for place, head in enumerate(heads)}


def _similarity(one: AttentionMap, other: AttentionMap) -> NDArray[np.float64]:
    """M of each column, ``[H, K]``."""
    parts = [
        cross_layer_similarity([one.columns(*tile), other.columns(*tile)])[0, 0, 1].cpu()
        for tile in _tiles(one.shape[3], one.shape[1] * one.shape[2])
    ]
    return np.asarray(torch.cat(parts, dim=-1).double().numpy())


def _tiles(count: int, each: int) -> Iterator[tuple[int, int]]:
    """Ranges of as many rows or columns as :data:`_TILE` allows at a time."""
    step = max(1, _TILE // each)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def _with_heads(
    look: Look,
    maps: Mapping[str, AttentionMap],
    layers: Sequence[int | str] | int | str | None,
    heads: Sequence[int] | None,
) -> Look:
    """The look with the maps of single heads."""
    chosen = look.choose(layers)
    kept = {layer.name: list(range(layer.heads)) if heads is None else list(heads) for layer in chosen}
    for layer in chosen:
        wrong = [head for head in kept[layer.name] if not 0 <= head < layer.heads]
        if wrong:
            raise UsageError(f"{layer.name} has no head {wrong[0]}; it has {layer.heads}, counted from 0.")
    every = sum(layer.queries * layer.keys for layer in look.layers.values())
    _check_size(every + sum(len(kept[layer.name]) * layer.queries * layer.keys for layer in chosen))
    found = {layer.name: replace(layer, maps=_single(maps[layer.name], kept[layer.name])) for layer in chosen}
    return replace(look, layers={**look.layers, **found})


def _check_size(elements: int) -> None:
    if 4 * elements > MOST_BYTES:
        raise ResourceError(
            f"The maps would take {4 * elements / 2**30:.1f} GiB, more than {MOST_BYTES >> 30}. Choose layers or heads "
            "(with heads=() only the means over heads are kept), or a smaller img_size."
        )


def _has_class_token(network: nn.Module) -> bool:
    """Whether the model says that it has a class token."""
    for module in network.modules():
        stated = getattr(module, "has_class_token", None)
        if isinstance(stated, bool):
            return stated
        if any(isinstance(getattr(module, name, None), Tensor) for name in _CLASS_TOKENS):
            return True
    return False


def _provenance(network: nn.Module, image: object, config: Mapping[str, Any]) -> dict[str, Any]:
    from_file = isinstance(image, (str, Path))
    return {
        "model": getattr(network, "provenance", None) or {"architecture": type(network).__name__, "source": "module"},
        "image": str(image) if from_file else "a tensor",
        "preprocessing": dict(config) if from_file else "done by the caller",
        "versions": {name: importlib.metadata.version(name) for name in ("collapse-probe", "torch", "timm")},
    }
