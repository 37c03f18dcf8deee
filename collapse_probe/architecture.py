"""What an architecture attends with: its layers, found by running it once on random weights.

Where possible nothing is computed: the model is built and run on PyTorch's meta device, whose tensors have shapes and
no memory, so that a model of billions of parameters takes a second. A model that reads values of its tensors on the way
cannot run there and is run on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

import collapse_probe.models  # noqa: F401 - makes the bundled architectures known to timm
from collapse_probe.capture import NOT_COMPARED, Captured, capture, group_name, layer_groups
from collapse_probe.errors import CaptureError, CollapseProbeError, UnknownModelError, UsageError
from collapse_probe.loading import data_config

#: Images in the batch. With one, images could not be told from windows or heads that are folded into the same axis.
_IMAGES = 2


@dataclass(frozen=True)
class Layer:
    """One attention map of an architecture.

    Attributes:
        name: qualified name of the layer; ``"name#1"`` for the second map of a layer that attends twice.
        kind: what asks what, one of `collapse_probe.capture.attention_map.KINDS`.
        heads, queries, keys: size of the map of one image (and window).
        windows: maps per image.
        partition: how the windows were cut, where the model cuts them in more than one way.
        prefix_tokens: leading key tokens that are not patches.
        group: letter of the layers whose maps are compared with this one's; empty for kinds that are not compared.
        is_probability: whether rows are probabilities; False where the model mixes maps after their softmax.
    """

    name: str
    kind: str
    heads: int
    queries: int
    keys: int
    windows: int
    partition: str
    prefix_tokens: int
    group: str
    is_probability: bool


@dataclass(frozen=True)
class Architecture:
    """The attention of an architecture.

    Attributes:
        name: as `timm.create_model` takes it.
        family: the source file that defines it.
        source: the package that it comes from: ``"timm 1.0.31"`` or ``"collapse_probe"``.
        input_size: channels, height and width of the images it was run on.
        device: ``"meta"``, or ``"cpu"`` where it had to be computed.
        layers: in execution order.
        not_captured: layer -> why it has no map.
        not_compared: kind among the layers -> why its maps are not compared.
    """

    name: str
    family: str
    source: str
    input_size: tuple[int, int, int]
    device: str
    layers: tuple[Layer, ...]
    not_captured: Mapping[str, str]
    not_compared: Mapping[str, str]


def architecture_names() -> list[str]:
    """Every name that can be described: those of the installed timm, without tags, and the bundled ones."""
    return sorted(timm.list_models())


def describe(name: str, img_size: int | None = None, model_kwargs: Mapping[str, Any] | None = None) -> Architecture:
    """Run an architecture once, with random weights and without a download, and say how it attends.

    Args:
        name: a name that timm knows, with or without a tag, or a bundled one.
        img_size: height and width in pixels; the architecture's own by default.
        model_kwargs: arguments of the architecture.

    Raises:
        UnknownModelError: there is no such name.
        UsageError: the architecture does not take these arguments.
        CaptureError: it does not run on an image.
    """
    if not timm.is_model(name):
        raise UnknownModelError(f"timm knows no architecture {name!r}.")
    kwargs = dict(model_kwargs or {})
    if img_size is not None:
        if img_size < 1:
            raise UsageError(f"img_size={img_size} must be a whole number of pixels, 1 or more.")
        kwargs["img_size"] = img_size
    try:
        return _described(name, kwargs, img_size, "meta")
    except Exception:  # whatever a model does that has no meaning without values
        return _described(name, kwargs, img_size, "cpu")


def _described(name: str, kwargs: dict[str, Any], img_size: int | None, device: str) -> Architecture:
    model = _built(name, kwargs, device)
    channels = kwargs.get("in_chans", resolve_model_data_config(model)["input_size"][0])
    _, height, width = data_config(model, img_size=img_size)["input_size"]
    captured = _captured(name, model, torch.rand(_IMAGES, channels, height, width, device=device))
    home = timm.model_entrypoint(name).__module__
    return Architecture(
        name=name,
        family=home.rpartition(".")[2],
        source="collapse_probe" if home.startswith("collapse_probe.") else f"timm {timm.__version__}",
        input_size=(channels, height, width),
        device=device,
        layers=_layers(captured),
        not_captured=dict(captured.not_captured),
        not_compared={
            item.kind: NOT_COMPARED[item.kind] for item in captured.maps.values() if item.kind in NOT_COMPARED
        },
    )


def _built(name: str, kwargs: dict[str, Any], device: str) -> nn.Module:
    try:
        with torch.device(device):
            return timm.create_model(name, pretrained=False, **kwargs).eval()
    except Exception as error:  # timm and its models raise anything
        given = f" with model_kwargs={kwargs}" if kwargs else ""
        raise UsageError(f"{name} cannot be built{given}: {_first_line(error)}") from None


def _captured(name: str, model: nn.Module, images: torch.Tensor) -> Captured:
    try:
        with torch.inference_mode(), capture(model) as captured:
            model(images)
    except CollapseProbeError:
        raise
    except Exception as error:
        size = " x ".join(map(str, images.shape[1:]))
        raise CaptureError(f"{name} does not run on an image of {size}: {_first_line(error)}") from None
    return captured


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _layers(captured: Captured) -> tuple[Layer, ...]:
    groups = {layer: group_name(number) for number, names in enumerate(layer_groups(captured.maps)) for layer in names}
    return tuple(
        Layer(
            name=name,
            kind=item.kind,
            heads=item.shape[1],
            queries=item.shape[2],
            keys=item.shape[3],
            windows=item.windows,
            partition=item.partition,
            prefix_tokens=item.prefix_tokens,
            group=groups.get(name, ""),
            is_probability=item.is_probability,
        )
        for name, item in captured.maps.items()
    )
