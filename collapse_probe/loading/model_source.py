"""Turn a name, a weights file or a folder into a model: `load_model`.

timm knows the architectures and where their pretrained weights are; this module decides which source was meant,
refuses to hand out random weights unless they were asked for, and records what it found.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from collapse_probe.errors import UnknownModelError, UsageError, WeightsUnavailableError
from collapse_probe.loading.build import INSTEAD, build
from collapse_probe.loading.checkpoint import check_model_kwargs
from collapse_probe.loading.content import SUFFIXES
from collapse_probe.loading.folders import open_folder
from collapse_probe.loading.from_file import NAME, STORED, Wanted, model_from_file
from collapse_probe.loading.hub import snapshot
from collapse_probe.loading.names import HUB, LOCAL, is_name, nearest
from collapse_probe.loading.soundness import non_finite


def load_model(
    source: str | Path,
    arch: str | None = None,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    use_ema: bool = False,
    key: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_heads: int | None = None,
    img_size: int | None = None,
    allow_bad_weights: bool = False,
    device: str = "cpu",
) -> nn.Module:
    """A model in evaluation mode from weights or a timm name.

    Args:
        source: a weights file (torch.save, safetensors, the index of several files, or the original ViT's npz; told
            apart by content), a folder that holds one (an export of timm or Hugging Face, a Trainer's or Lightning's
            checkpoint), a name that timm knows (with or without a tag; its pretrained weights are meant),
            ``hf-hub:<id>`` or ``local-dir:<folder>``.
        arch: the architecture of weights. Without it the one that the file stores, or the one that keys and shapes
            belong to.
        pretrained: False asks for random weights under a name (torch's global generator draws them).
        checkpoint: weights for a name.
        use_ema: take the averaged weights of a training checkpoint.
        key: take the weights under this key of a checkpoint, for example ``"student"``.
        model_kwargs: arguments for the architecture; they override what a file stores.
        num_heads: heads of each block, where the architecture's are not the right ones: weights rarely show them.
        img_size: build the model for this image size in pixels; position embeddings are resized by timm if needed.
        allow_bad_weights: take weights that hold NaN or infinities, or matrices of one number throughout.
        device: where the model is put.

    Returns:
        The model. ``model.provenance`` is a plain dict: ``source``, ``kind``, ``architecture``, ``architecture_from``
        (``"given"``, ``"stored in the file"``, ``"recognised by keys and shapes"``, ``"name"``), ``model_kwargs``,
        ``weights``, ``parameters`` (their number), ``versions``; of weights also ``same_network`` (other names of the
        recognised network) and ``heads`` (``count`` and how it is ``known``).

    Raises:
        UsageError: arguments contradict each other, the architecture does not take them, or weights without a name fit
            several architectures.
        UnknownModelError: neither a file nor a known name; or weights that no known architecture has.
        UnsafeFileError, DamagedFileError: see :func:`collapse_probe.loading.content.recognise`; also bad weights.
        WeightsMismatchError: the weights do not fit the architecture.
        WeightsUnavailableError: a name whose pretrained weights are not at hand.

    The number of classes follows the file. Weights are converted to float32; loading is strict.
    """
    kwargs = check_model_kwargs(model_kwargs or {}, "model_kwargs")
    if img_size is not None:
        kwargs["img_size"] = _positive("img_size", img_size, " of pixels")
    if num_heads is not None:
        _positive("num_heads", num_heads)
    target = _device(device)
    kind, name, file = _recognise_source(source, arch, checkpoint)
    if file is None and (use_ema or key is not None):
        raise UsageError(f"{'use_ema' if use_ema else 'key'} needs a weights file; {source} is a name.")
    wanted = Wanted(
        name, model_kwargs=kwargs, use_ema=use_ema, key=key, num_heads=num_heads, resample=img_size is not None,
        allow_bad=allow_bad_weights,
    )  # fmt: skip
    if file is not None and pretrained:
        model, facts = _from_path(file, wanted if kind in ("file", "folder") else replace(wanted, arch_from=NAME))
    elif file is not None:
        raise UsageError(f"{file} holds weights, and random ones were asked for (--no-pretrained): choose one.")
    else:
        model, facts = _from_name(str(name), wanted, pretrained)
    facts = {"source": str(source), "kind": kind, **facts}
    return _finish(model, facts, target)


def _recognise_source(
    source: str | Path, arch: str | None, checkpoint: str | Path | None
) -> tuple[str, str | None, Path | None]:
    """What was meant: the kind of source, the architecture if it is known already, where weights are if anywhere."""
    text, path = os.fspath(source), Path(source)
    if text.startswith((*HUB, LOCAL)) or (isinstance(source, str) and is_name(source)):
        if arch is not None:
            raise UsageError(
                f"{source} names a model already, so --model {arch} is ambiguous: it is for weights files. "
                "Leave one out."
            )
        kind = "hub" if text.startswith(HUB) else "local-dir" if text.startswith(LOCAL) else "timm name"
        return kind, text, existing(checkpoint) if checkpoint is not None else None
    if not _exists(path):
        raise UnknownModelError(_no_such_source(text))
    if checkpoint is not None:
        raise UsageError(
            f"{source} and {checkpoint} are both weights files: give one, and --model for its architecture."
        )
    return "folder" if path.is_dir() else "file", arch, existing(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text that is too long for a path, or a folder that may not be entered
        return False


def existing(path: str | Path) -> Path:
    path = Path(path)
    if not _exists(path) or not (path.is_file() or path.is_dir()):
        raise UsageError(f"{path} is not a file that exists; check the path.")
    return path


def _from_path(path: Path, wanted: Wanted) -> tuple[nn.Module, dict[str, Any]]:
    """From a file, or from the weights and the configuration of a folder."""
    if not path.is_dir():
        return model_from_file(path, wanted)
    folder = open_folder(path)
    config = folder.config
    if wanted.arch is None and config.architecture is not None and is_name(config.architecture):
        wanted = replace(wanted, arch=config.architecture, arch_from=STORED)
    return model_from_file(folder.weights, replace(wanted, config=config))


def _from_name(name: str, wanted: Wanted, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    kwargs = {**wanted.model_kwargs, **({} if wanted.num_heads is None else {"num_heads": wanted.num_heads})}
    if name.startswith(LOCAL) and pretrained:
        # Its weights take the way of every other file: checked by content, fitted strictly.
        export = open_folder(Path(name.removeprefix(LOCAL)))
        model, facts = model_from_file(export.weights, replace(wanted, arch_from=NAME, config=export.config))
        return model, {**facts, "architecture": _architecture(name, model)}
    if name.startswith(HUB) and pretrained and (folder := _foreign_repository(name)) is not None:
        model, facts = _from_path(folder, replace(wanted, arch=None))
        return model, {**facts, "weights": {**facts["weights"], "path": None, "pretrained": name}}
    if name.startswith((*HUB, LOCAL)):
        model = build(name, pretrained, kwargs)
        weights: dict[str, Any] = {"pretrained": name} if pretrained else {"random": True}
    else:
        if not is_name(name):
            raise UnknownModelError(f"timm knows no architecture {name!r}. {nearest(name)}")
        cfg = get_pretrained_cfg(name)
        if pretrained and cfg is not None and cfg.file:
            model, facts = model_from_file(Path(cfg.file), replace(wanted, arch_from=NAME))
            return model, {**facts, "weights": {**facts["weights"], "path": Path(cfg.file).name}}
        if pretrained and (cfg is None or not cfg.has_weights):
            raise WeightsUnavailableError(f"No pretrained weights are published for {name}. {INSTEAD}")
        model = build(name, pretrained, kwargs)
        weights = {"pretrained": cfg.hf_hub_id or cfg.url or cfg.tag} if pretrained and cfg else {"random": True}
    weights = {**weights, "non_finite": non_finite(model.state_dict())}
    arch = _architecture(name, model)
    return model, {"architecture": arch, "architecture_from": NAME, "model_kwargs": kwargs, "weights": weights}


def _foreign_repository(name: str) -> Path | None:
    """The folder of a repository on the hub that is not timm's export; None where it is, or cannot be had."""
    folder = snapshot(name.partition(":")[2])
    return None if folder is None or open_folder(folder).config.architecture is not None else folder


def _architecture(name: str, model: nn.Module) -> str:
    """The name, or for a hub id or a local folder the architecture that timm found in its config."""
    if not name.startswith((*HUB, LOCAL)):
        return name
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", name))


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


def _no_such_source(text: str) -> str:
    if Path(text).suffix in SUFFIXES or os.sep in text:
        return f"There is no file {text}. Check the path, or give a name that timm knows."
    return f"{text!r} is neither a file nor a name that timm knows. {nearest(text)}"


# -- small arguments ---------------------------------------------------------------------------------------------------


def _positive(name: str, value: int, unit: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r} must be a whole number{unit}, 1 or more.")
    return value


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is not a device that torch knows; use cpu, cuda, cuda:1 or mps.") from None
