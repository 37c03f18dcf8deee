"""Turn a name or a weights file into a model: `load_model`.

timm knows the architectures and where their pretrained weights are; this module decides which source was meant,
refuses to hand out random weights unless they were asked for, and records what it found.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from collapse_probe.errors import (
    CollapseProbeError,
    UnknownModelError,
    UnsafeFileError,
    UsageError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from collapse_probe.loading.checkpoint import Checkpoint, check_model_kwargs, read_checkpoint
from collapse_probe.loading.fit import fit_weights, non_finite
from collapse_probe.loading.hub import cache_only_without_network

_HUB = ("hf-hub:", "hf_hub:")
_LOCAL = "local-dir:"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
_INSTEAD = "Pass weights you have with --checkpoint FILE, or ask for random ones with --no-pretrained."


def load_model(
    source: str | Path,
    arch: str | None = None,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    use_ema: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    device: str = "cpu",
) -> nn.Module:
    """A model in evaluation mode from a weights file or a timm name.

    Args:
        source: a weights file (torch.save or safetensors, told apart by content), a name that timm knows (with or
            without a tag; its pretrained weights are meant), ``hf-hub:<id>`` or ``local-dir:<folder>``.
        arch: the architecture of a weights file; not needed where the file stores it.
        pretrained: False asks for random weights under a name (torch's global generator draws them).
        checkpoint: weights for a name.
        use_ema: take the averaged weights of a training checkpoint.
        model_kwargs: arguments for the architecture; they override what a file stores.
        img_size: build the model for this image size in pixels; position embeddings are resized by timm if needed.
        device: where the model is put.

    Returns:
        The model. ``model.provenance`` is a plain dict: ``source``, ``kind``, ``architecture``, ``architecture_from``
        (``"given"``, ``"stored in the file"``, ``"name"``), ``model_kwargs``, ``weights``, ``parameters`` (their
        number), ``versions``.

    Raises:
        UsageError: arguments contradict each other, or the architecture does not take them.
        UnknownModelError: neither a file nor a known name.
        UnsafeFileError, DamagedFileError: see :func:`collapse_probe.loading.content.recognise`.
        WeightsMismatchError: the weights do not fit the architecture.
        WeightsUnavailableError: a name whose pretrained weights are not at hand.

    The number of classes follows the file. Weights are converted to float32; loading is strict.
    """
    kwargs = check_model_kwargs(model_kwargs or {}, "model_kwargs")
    if img_size is not None:
        kwargs["img_size"] = _positive("img_size", img_size)
    target = _device(device)
    kind, name, file = _recognise_source(source, arch, checkpoint)
    if use_ema and file is None:
        raise UsageError(f"use_ema needs a weights file; {source} is a name.")
    if file is not None and pretrained:
        model, facts = _from_file(file, name, kind, kwargs, use_ema, resample=img_size is not None)
    elif file is not None:
        raise UsageError(f"{file} holds weights, and random ones were asked for (--no-pretrained): choose one.")
    else:
        model, facts = _from_name(str(name), kwargs, pretrained)
    facts = {"source": str(source), "kind": kind, **facts}
    return _finish(model, facts, target)


def _recognise_source(
    source: str | Path, arch: str | None, checkpoint: str | Path | None
) -> tuple[str, str | None, Path | None]:
    """What was meant: the kind of source, the architecture if it is known already, the weights file if there is one."""
    text, path = os.fspath(source), Path(source)
    if text.startswith((*_HUB, _LOCAL)) or (isinstance(source, str) and _is_name(source)):
        if arch is not None:
            raise UsageError(
                f"{source} names a model already, so --model {arch} is ambiguous: it is for weights files. "
                "Leave one out."
            )
        kind = "hub" if text.startswith(_HUB) else "local-dir" if text.startswith(_LOCAL) else "timm name"
        return kind, text, _existing_file(checkpoint) if checkpoint is not None else None
    if not _exists(path):
        raise UnknownModelError(_no_such_source(text))
    if checkpoint is not None:
        raise UsageError(
            f"{source} and {checkpoint} are both weights files: give one, and --model for its architecture."
        )
    return "file", arch, _existing_file(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text that is too long for a path, or a folder that may not be entered
        return False


def _existing_file(path: str | Path) -> Path:
    path = Path(path)
    if _exists(path) and path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in _WEIGHT_SUFFIXES)[:4])
        raise UsageError(
            f"{path} is a folder; name the weights file in it ({inside or 'there is none with a known suffix'}), or "
            f"write {_LOCAL}{path} where it holds timm's config.json."
        )
    if not _exists(path) or not path.is_file():
        raise UsageError(f"{path} is not a file that exists; check the path.")
    return path


def _from_file(
    file: Path, name: str | None, kind: str, kwargs: dict[str, Any], use_ema: bool, resample: bool
) -> tuple[nn.Module, dict[str, Any]]:
    checkpoint = read_checkpoint(file, use_ema)
    arch = name or _stored_architecture(file, checkpoint)
    origin = ("given" if kind == "file" else "name") if name else "stored in the file"
    _check_known(arch)
    stored = check_model_kwargs(checkpoint.model_kwargs, str(file))
    if not _has_fixed_size(arch):
        stored.pop("img_size", None)
    kwargs = {**stored, **kwargs}
    model = _build(arch, False, kwargs)
    what = f"{file} ({arch})"
    adapted = fit_weights(model, checkpoint.state, what, keep_head="num_classes" in kwargs, resample=resample)
    weights = {**checkpoint.facts, "adapted_by_timm": adapted, "non_finite": non_finite(model)}
    arch = _architecture(arch, model)
    return model, {"architecture": arch, "architecture_from": origin, "model_kwargs": kwargs, "weights": weights}


def _from_name(name: str, kwargs: dict[str, Any], pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    if name.startswith(_LOCAL) and pretrained:
        # Its weights take the way of every other file: checked by content, fitted strictly.
        file = _weights_in(Path(name.removeprefix(_LOCAL)))
        return _from_file(file, name, "local-dir", kwargs, use_ema=False, resample="img_size" in kwargs)
    if name.startswith((*_HUB, _LOCAL)):
        model = _build(name, pretrained, kwargs)
        weights: dict[str, Any] = {"pretrained": name} if pretrained else {"random": True}
    else:
        _check_known(name)
        cfg = get_pretrained_cfg(name)
        if pretrained and cfg is not None and cfg.file:
            model, facts = _from_file(
                Path(cfg.file), name, "timm name", kwargs, use_ema=False, resample="img_size" in kwargs
            )
            return model, {**facts, "weights": {**facts["weights"], "path": Path(cfg.file).name}}
        if pretrained and (cfg is None or not cfg.has_weights):
            raise WeightsUnavailableError(f"No pretrained weights are published for {name}. {_INSTEAD}")
        model = _build(name, pretrained, kwargs)
        weights = {"pretrained": cfg.hf_hub_id or cfg.url or cfg.tag} if pretrained and cfg else {"random": True}
    weights = {**weights, "non_finite": non_finite(model)}
    arch = _architecture(name, model)
    return model, {"architecture": arch, "architecture_from": "name", "model_kwargs": kwargs, "weights": weights}


def _build(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    network = pretrained or name.startswith(_HUB)
    try:
        with cache_only_without_network() if network else nullcontext():
            return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (CollapseProbeError, MemoryError):
        raise
    except Exception as error:  # timm, its models and the hub's client raise anything
        raise _build_error(name, network, kwargs, error) from None


def _build_error(name: str, network: bool, kwargs: Mapping[str, Any], error: Exception) -> CollapseProbeError:
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if "weights_only" in str(error):  # the loader's own text advises to switch the protection off
        return UnsafeFileError(f"The weights of {name} need unpickling of arbitrary objects; they were not read.")
    if "loading state_dict" in str(error):
        return WeightsMismatchError(f"The pretrained weights of {name} do not fit it with {dict(kwargs)}. {error}")
    if not network or isinstance(error, TypeError):
        return UsageError(f"{name} cannot be built with model_kwargs={dict(kwargs)}: {reason}")
    return WeightsUnavailableError(f"{name} could not be fetched, and is not in the local cache ({reason}). {_INSTEAD}")


def _finish(model: nn.Module, facts: dict[str, Any], device: torch.device) -> nn.Module:
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise UsageError(
            f"device={device}: the model cannot be put there: {str(error).partition(chr(10))[0]}"
        ) from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.provenance = {**facts, "parameters": parameters, "versions": _versions()}  # type: ignore[assignment]
    return model


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    with suppress(importlib.metadata.PackageNotFoundError):  # where it is run from a source tree
        versions["collapse_probe"] = importlib.metadata.version("collapse-probe")
    return versions


# -- names -------------------------------------------------------------------------------------------------------------


def _is_name(text: str) -> bool:
    """A registered architecture, alone or with one of its tags; `vit_small_patch16_224.pth` is not one."""
    if not timm.is_model(text):
        return False
    try:
        return get_pretrained_cfg(text) is not None or "." not in text
    except RuntimeError:  # the tag is not one of the architecture's
        return False


def _architecture(name: str, model: nn.Module) -> str:
    """The name, or for a hub id or a local folder the architecture that timm found in its config."""
    if not name.startswith((*_HUB, _LOCAL)):
        return name
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", name))


def _check_known(name: str) -> None:
    if not name.startswith((*_HUB, _LOCAL)) and not _is_name(name):
        raise UnknownModelError(f"timm knows no architecture {name!r}. {_nearest(name)}")


def _no_such_source(text: str) -> str:
    if Path(text).suffix in _WEIGHT_SUFFIXES or os.sep in text:
        return f"There is no file {text}. Check the path, or give a name that timm knows."
    return f"{text!r} is neither a file nor a name that timm knows. {_nearest(text)}"


def _nearest(name: str) -> str:
    arch = name.partition(".")[0]
    if timm.is_model(arch):
        tags = timm.list_models(f"{arch}.*", pretrained=True)
        return f"Its pretrained tags: {', '.join(tags) or 'none'}."
    near = difflib.get_close_matches(arch.lower(), timm.list_models(), n=4)
    return f"Nearest: {', '.join(near)}." if near else "List the names with timm.list_models()."


def _stored_architecture(file: Path, checkpoint: Checkpoint) -> str:
    if checkpoint.architecture is None:
        raise UsageError(
            f"{file} does not say which architecture it is for: pass --model (arch=), e.g. vit_small_patch16_224."
        )
    if not _is_name(checkpoint.architecture):
        raise UnknownModelError(
            f"{file} names the architecture {checkpoint.architecture!r}, which timm does not know. "
            "Pass --model (arch=)."
        )
    return checkpoint.architecture


def _has_fixed_size(arch: str) -> bool:
    """Whether the architecture is built for one image size (others do not take `img_size`)."""
    cfg = get_pretrained_cfg(arch) if _is_name(arch) else None
    return cfg is None or cfg.fixed_input_size


def _weights_in(folder: Path) -> Path:
    files = sorted(p for p in folder.glob("*") if p.suffix in _WEIGHT_SUFFIXES)
    # timm writes both formats side by side; safetensors is the one that needs no unpickling.
    files = [p for p in files if p.suffix == ".safetensors"] or files
    if len(files) != 1:
        found = ", ".join(p.name for p in files) or "none"
        raise UsageError(f"{folder} must hold one weights file; found {found}. Name one with --checkpoint.")
    return files[0]


# -- small arguments ---------------------------------------------------------------------------------------------------


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r} must be a whole number of pixels, 1 or more.")
    return value


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is not a device that torch knows; use cpu, cuda, cuda:1 or mps.") from None
