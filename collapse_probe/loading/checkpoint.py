"""Find the weights in what a file holds: the wrapper they lie under, the prefix of their keys, what is said of them.

Understood layouts: a plain state dict; timm's training checkpoints (`arch`, `args`, `state_dict`, `state_dict_ema`;
timm/utils/checkpoint_saver.py); the wrappers of other training scripts (`model`, `module`, `teacher` and `student` of
DINO, `model_ema`…; Lightning's `state_dict`), one in another; safetensors whose metadata may hold `architecture` and
`model_kwargs` (JSON).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from collapse_probe.errors import DamagedFileError, UsageError
from collapse_probe.loading.content import NPZ, SAFETENSORS_INDEX, SUFFIXES
from collapse_probe.loading.prefixes import cut_prefixes
from collapse_probe.loading.readers import read, shards
from collapse_probe.loading.training_state import training_state

#: Where weights lie in a checkpoint, in the order of preference; of a self-distilled pair the teacher is evaluated.
WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "teacher", "target_encoder", "net",
    "backbone", "encoder", "checkpoint", "weights", "params", "student",
)  # fmt: skip
EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")
# timm's create_model would fetch or open other files on behalf of these.
_RESERVED = ("pretrained", "checkpoint_path", "cache_dir")
_MAX_DEPTH = 3
# Tied weights are stored once; a file of which every byte is claimed more often than this was made to fill memory.
_MAX_SHARING = 8


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what the file says about them.

    Attributes:
        state: tensors by key, wrapper and common prefixes removed.
        architecture: the name stored in the file, or None.
        model_kwargs: constructor arguments stored in the file.
        facts: plain data for the provenance: path, sha256, size_bytes, format, note (where the name misleads), key,
            prefix_cut, left_out (keys beside the model), dtype, tensors, training
            (see :mod:`~collapse_probe.loading.training_state`).
    """

    state: dict[str, Tensor]
    architecture: str | None
    model_kwargs: dict[str, Any]
    facts: dict[str, Any]


def read_checkpoint(path: Path, use_ema: bool = False, key: str | None = None) -> Checkpoint:
    """Read a weights file of any recognised format; code in it is never run.

    Args:
        path: the file; the index of weights in several files stands for all of them.
        use_ema: take the exponential moving average of the weights instead of the weights.
        key: take the weights under this wrapper, for example ``"student"`` or ``"state.model"``.

    Raises:
        DamagedFileError, UnsafeFileError: see :func:`collapse_probe.loading.content.recognise`; also where no state
            dict is in it.
        UsageError: ``use_ema`` or ``key``, and the file holds no such weights.
    """
    file_format, content, metadata = read(path)
    stored = _stored_in_metadata(path, metadata) if metadata else _stored_arguments(content)
    found, state = _choose(path, content, use_ema, key)
    files = [path, *shards(path)] if file_format == SAFETENSORS_INDEX else [path]
    size = sum(file.stat().st_size for file in files)
    if file_format != NPZ:  # whose arrays may be compressed, and were compared with their headers
        _check_sizes(path, state, size)
    prefix, state, left_out = cut_prefixes(state)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    facts = {
        "path": str(path),
        "sha256": _sha256(files),
        "size_bytes": size,
        "format": file_format,
        "note": _misleading_name(path, file_format),
        "key": found,
        "prefix_cut": prefix,
        "left_out": left_out,
        "dtype": ", ".join(sorted(dtypes)),
        "tensors": len(state),
        "training": training_state(path, content, metadata),
    }
    return Checkpoint(state, stored["architecture"], stored["model_kwargs"], facts)


def check_model_kwargs(model_kwargs: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The same arguments, unless they are no mapping or one of them would make timm open another file (UsageError)."""
    if not isinstance(model_kwargs, Mapping):
        raise UsageError(f"{origin} must be arguments by name; got {model_kwargs!r}.")
    for name in model_kwargs:
        if str(name).startswith(_RESERVED):
            raise UsageError(f"{origin} holds {name!r}, which is not an argument of an architecture; leave it out.")
    return dict(model_kwargs)


def _misleading_name(path: Path, file_format: str) -> str | None:
    expected = SUFFIXES.get(path.suffix.lower())
    if expected is None or file_format in expected:
        return None
    return f"named {path.suffix}, but its content is of the format {file_format}; it was read by content"


def _stored_in_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        model_kwargs = json.loads(metadata.get("model_kwargs") or "{}")
    except (ValueError, RecursionError):
        model_kwargs = None
    if not isinstance(model_kwargs, dict):
        raise DamagedFileError(f"{path}: 'model_kwargs' in its metadata is not a JSON object.")
    return {"architecture": metadata.get("architecture"), "model_kwargs": model_kwargs}


def _stored_arguments(content: Any) -> dict[str, Any]:
    """Architecture and constructor arguments as timm's training script stores them."""
    content = content if isinstance(content, Mapping) else {}
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, Mapping) else {}
    architecture = content.get("arch") or args.get("model")
    kwargs = dict(args["model_kwargs"]) if isinstance(args.get("model_kwargs"), Mapping) else {}
    kwargs = {name: value for name, value in kwargs.items() if _is_plain(value)}
    for theirs, ours in (("in_chans", "in_chans"), ("gp", "global_pool"), ("img_size", "img_size")):
        if args.get(theirs) is not None:
            kwargs.setdefault(ours, args[theirs])
    return {"architecture": architecture if isinstance(architecture, str) else None, "model_kwargs": kwargs}


def _is_plain(value: Any) -> bool:
    """Numbers, texts and lists of them: what an argument that a file stores may be."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, (int, float, str, bool, type(None))) for item in value)
    return value is None or isinstance(value, (int, float, str, bool))


def _choose(path: Path, content: Any, use_ema: bool, key: str | None) -> tuple[str | None, dict[str, Tensor]]:
    """The state dict inside the file and the wrapper key it lay under (None: the file is the state dict)."""
    if key is not None:
        return key, _under(path, content, key)
    found = _search(content, EMA_WRAPPERS if use_ema else WRAPPERS, use_ema)
    if found is not None:
        return found
    if use_ema:
        raise UsageError(f"{path} holds no EMA weights ({' or '.join(EMA_WRAPPERS)}); leave --use-ema out.")
    top = list(content) if isinstance(content, Mapping) else []
    inside = f"its top level holds {', '.join(map(repr, top[:8]))}" if top else f"it holds a {type(content).__name__}"
    known = [str(name) for name in top if isinstance(name, str) and _is_state_dict(content[name])]
    advice = f" Tensors by name lie under {', '.join(map(repr, known[:4]))}: --key names one of them." if known else ""
    raise DamagedFileError(
        f"{path} holds no state dict where one is looked for: {inside}. Expected tensors by name, at the top level or "
        f"under one of {', '.join(WRAPPERS)}, or under a key that --key names.{advice}"
    )


def _search(
    content: Any, wrappers: tuple[str, ...], required: bool, above: str = "", depth: int = 0
) -> tuple[str | None, dict[str, Tensor]] | None:
    """The state dict under the first wrapper that holds one, with attention if any has; wrappers may hold others."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return None
    inner = [
        _search(content[name], wrappers, False, f"{above}{name}.", depth + 1)
        for name in wrappers
        if content.get(name) is not None
    ]
    found = [item for item in inner if item is not None]
    for item in found:
        if any("att" in key.lower() for key in item[1]):
            return item
    if found:
        return found[0]
    if required or not _is_state_dict(content):
        return None
    return above.rstrip(".") or None, _tensors(content)


def _under(path: Path, content: Any, key: str) -> dict[str, Tensor]:
    """The state dict under a key that the user named; dots lead from one level to the next.

    Where the keys of one state dict begin with it, as of teacher and student side by side, those are meant.
    """
    inner, walked = content, list[str]()
    for name in key.split("."):
        if isinstance(inner, Mapping) and name not in inner:
            own = {item[len(name) + 1 :]: value for item, value in inner.items() if str(item).startswith(f"{name}.")}
            inner = {**inner, name: own} if own else inner
        if not isinstance(inner, Mapping) or name not in inner:
            at = f"under {'.'.join(walked)!r}" if walked else "at its top level"
            names = ", ".join(map(repr, list(inner)[:8])) if isinstance(inner, Mapping) else type(inner).__name__
            raise UsageError(f"{path} holds no {name!r} {at} ({names}); give --key another one.")
        inner = inner[name]
        walked.append(name)
    if not _is_state_dict(inner):
        raise UsageError(f"{path} holds no tensors by name under {key!r}; give --key another one.")
    return _tensors(inner)


def _is_state_dict(value: Any) -> bool:
    """Tensors by name; a few other things among them do no harm."""
    if not isinstance(value, Mapping):
        return False
    tensors = [name for name, item in value.items() if isinstance(item, Tensor)]
    plain = [name for name, item in value.items() if item is None or isinstance(item, (int, float, str))]
    others = len(value) - len(tensors) - len(plain)
    return bool(tensors) and others < len(tensors) and all(isinstance(name, str) for name in tensors)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    # torch's AveragedModel keeps a counter beside the weights that it averages.
    return {
        name: tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor) and name != "n_averaged"
    }


def _check_sizes(path: Path, state: Mapping[str, Tensor], size: int) -> None:
    """A few bytes can claim, with strides of zero, to be a tensor that no memory holds, or many tensors one storage."""
    claimed = 0
    for key, tensor in state.items():
        own = tensor.numel() * tensor.element_size()
        claimed += own
        if own > size:
            raise DamagedFileError(f"{path} is damaged: {key} {list(tensor.shape)} is larger than the file.")
    if claimed > _MAX_SHARING * size:
        raise DamagedFileError(f"{path} is damaged: its tensors claim {claimed} bytes, the file has {size}.")


def _sha256(files: list[Path]) -> str:
    """Of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
