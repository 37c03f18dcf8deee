"""Read a recognised weights file into a flat state dict, with whatever else it says about the model.

Understood layouts: a plain state dict; timm's training checkpoints (`arch`, `args`, `state_dict`, `state_dict_ema`;
timm/utils/checkpoint_saver.py); the `model`, `model_ema` and `module` wrappers of other training scripts; safetensors
whose metadata may hold `architecture` and `model_kwargs` (JSON).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from collapse_probe.errors import DamagedFileError, UsageError
from collapse_probe.loading.content import SAFETENSORS, TORCH_LEGACY, TORCH_ZIP, foreign_globals, recognise, refusal

_WRAPPERS = ("state_dict", "model", "module")
_EMA_WRAPPERS = ("state_dict_ema", "model_ema")
# DistributedDataParallel, torch.compile, and Lightning modules put these before every key.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# timm's create_model would fetch or open other files on behalf of these.
_RESERVED = ("pretrained", "checkpoint_path", "cache_dir")


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what the file says about them.

    Attributes:
        state: tensors by key, wrapper and common prefixes removed.
        architecture: the name stored in the file, or None.
        model_kwargs: constructor arguments stored in the file.
        facts: plain data for the provenance: path, sha256, size_bytes, format, key, prefix_cut, dtype, tensors.
    """

    state: dict[str, Tensor]
    architecture: str | None
    model_kwargs: dict[str, Any]
    facts: dict[str, Any]


def read_checkpoint(path: Path, use_ema: bool = False) -> Checkpoint:
    """Read a weights file of any recognised format; code in it is never run.

    Args:
        path: the file.
        use_ema: take the exponential moving average of the weights instead of the weights.

    Raises:
        DamagedFileError, UnsafeFileError: see :func:`collapse_probe.loading.content.recognise`; also where no state
            dict is in it.
        UsageError: ``use_ema`` and the file holds no such weights.
    """
    file_format = recognise(path)
    if file_format == SAFETENSORS:
        content, stored = _read_safetensors(path)
    else:
        content = _read_torch(path, file_format)
        stored = _stored_arguments(content)
    key, state = _choose(path, content, use_ema)
    prefix, state = _cut_prefixes(state)
    _check_sizes(path, state)
    facts = {
        "path": str(path),
        "sha256": _sha256(path),
        "size_bytes": path.stat().st_size,
        "format": file_format,
        "key": key,
        "prefix_cut": prefix,
        "dtype": ", ".join(
            sorted({str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()})
        ),
        "tensors": len(state),
    }
    return Checkpoint(state, stored["architecture"], stored["model_kwargs"], facts)


def check_model_kwargs(model_kwargs: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The same arguments, unless one of them would make timm open another file (UsageError)."""
    for name in model_kwargs:
        if str(name).startswith(_RESERVED):
            raise UsageError(f"{origin} holds {name!r}, which is not an argument of an architecture; leave it out.")
    return dict(model_kwargs)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            content = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise DamagedFileError(f"{path} is a damaged safetensors file: {error}.") from None
    try:
        model_kwargs = json.loads(metadata.get("model_kwargs") or "{}")
    except ValueError:
        model_kwargs = None
    if not isinstance(model_kwargs, dict):
        raise DamagedFileError(f"{path}: 'model_kwargs' in its metadata is not a JSON object.")
    return content, {"architecture": metadata.get("architecture"), "model_kwargs": model_kwargs}


def _read_torch(path: Path, file_format: str) -> Any:
    """torch.load, restricted to tensors, plain containers and timm's `args` (an argparse.Namespace)."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hints for torch's developers about odd pickles
            return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=file_format == TORCH_ZIP)
    except pickle.UnpicklingError:
        names = foreign_globals(path, file_format)
        if file_format == TORCH_LEGACY and not names:
            raise DamagedFileError(f"{path} is damaged: its pickled part cannot be read. Copy it again.") from None
        # torch's own text advises to switch the protection off; it is not repeated, nor chained.
        raise refusal(path, names) from None
    except Exception as error:  # the loader meets hostile or broken bytes with any exception type
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DamagedFileError(f"{path} is damaged: {reason}. Download or copy it again.") from None


def _stored_arguments(content: Any) -> dict[str, Any]:
    """Architecture and constructor arguments as timm's training script stores them."""
    content = content if isinstance(content, Mapping) else {}
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, Mapping) else {}
    architecture = content.get("arch") or args.get("model")
    kwargs = dict(args["model_kwargs"]) if isinstance(args.get("model_kwargs"), Mapping) else {}
    for theirs, ours in (("in_chans", "in_chans"), ("gp", "global_pool"), ("img_size", "img_size")):
        if args.get(theirs) is not None:
            kwargs.setdefault(ours, args[theirs])
    return {"architecture": architecture if isinstance(architecture, str) else None, "model_kwargs": kwargs}


def _choose(path: Path, content: Any, use_ema: bool) -> tuple[str | None, dict[str, Tensor]]:
    """The state dict inside the file and the wrapper key it lay under (None: the file is the state dict)."""
    top = list(content) if isinstance(content, Mapping) else []
    for key in _EMA_WRAPPERS if use_ema else _WRAPPERS:
        if key in top and _is_state_dict(content[key]):
            return key, _tensors(content[key])
    if use_ema:
        raise UsageError(f"{path} holds no EMA weights ({' or '.join(_EMA_WRAPPERS)}); leave --use-ema out.")
    if _is_state_dict(content):
        return None, _tensors(content)
    found = f"its top level holds {', '.join(map(repr, top[:8]))}" if top else f"it holds a {type(content).__name__}"
    raise DamagedFileError(
        f"{path} holds no state dict: {found}. Expected tensors by name, at the top level or under one of "
        f"{', '.join(_WRAPPERS)}."
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, Tensor) for item in value.values())
        and all(isinstance(name, str) for name in value)
        and all(isinstance(item, Tensor) for item in value.values())
    )


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # torch's AveragedModel keeps a counter beside the weights that it averages.
    return {name: tensor.detach() for name, tensor in state.items() if name != "n_averaged"}


def _check_sizes(path: Path, state: Mapping[str, Tensor]) -> None:
    """A few bytes can claim, with strides of zero, to be a tensor that no memory holds."""
    size = path.stat().st_size
    for key, tensor in state.items():
        if tensor.numel() * tensor.element_size() > size:
            raise DamagedFileError(f"{path} is damaged: {key} {list(tensor.shape)} is larger than the file.")


def _cut_prefixes(state: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Remove prefixes that all keys share; returns what was cut and the state dict without it."""
    cut = ""
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        cut += prefix
    return cut, state


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
