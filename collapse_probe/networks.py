"""A caller's model as a pass runs it: found or unwrapped, on a device, in evaluation mode, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import collapse_probe.models  # noqa: F401  # registers the bundled architectures with timm before any is loaded
from collapse_probe.errors import UsageError
from collapse_probe.loading import load_model


def open_model(
    model: object,
    *,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    use_ema: bool = False,
    key: str | None = None,
    num_heads: int | None = None,
    allow_bad_weights: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """The module that is meant: the given one without what wraps it, or what a path or a name stands for.

    Arguments as those of :func:`~collapse_probe.analysis.analyze`.

    Raises:
        UsageError: this is no model, or a module comes with a description of a file.
        ModelError: the model source was rejected.
    """
    if isinstance(model, nn.Module):
        if arch or checkpoint or model_kwargs or key or num_heads:
            raise UsageError(
                "arch, checkpoint, key, num_heads and model_kwargs describe a file or a name; the model given is a "
                "module."
            )
        return unwrapped(model)
    if not isinstance(model, (str, Path)):
        raise UsageError(f"model must be an nn.Module, a timm name or a path; got a {type(model).__name__}.")
    with drawn_from(seed):
        return load_model(
            model, arch, pretrained=pretrained, checkpoint=checkpoint, use_ema=use_ema, key=key, num_heads=num_heads,
            allow_bad_weights=allow_bad_weights, model_kwargs=model_kwargs, img_size=img_size,
        )  # fmt: skip


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Random weights are the same in every process; the caller's own random numbers go on as if there were none."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class prepared:
    """The model in evaluation mode on its device for the block, and as it was afterwards."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._home = next((parameter.device for parameter in model.parameters()), device)
        self._modes = {module: module.training for module in model.modules()}

    def __enter__(self) -> None:
        self._model.to(self._device)
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes.items():
            module.training = training
        if self._home != self._device:
            self._model.to(self._home)


def device_of(name: str, module: nn.Module | None) -> torch.device:
    """The device that was asked for; under "auto" that of a module that was given, else a GPU where there is one."""
    if name == "auto":
        if module is not None:
            parameter = next(module.parameters(), None)
            return torch.device("cpu") if parameter is None else parameter.device
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is not known; use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, and this PyTorch sees no CUDA device. Use --device cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device {name!r} was asked for, and this PyTorch sees no MPS device. Use --device cpu.")
    return device


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data parallelism, whose own layers can be observed."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
