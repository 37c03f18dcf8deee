"""Read a recognised file into what was saved: a state dict or a tree that holds one, and the metadata beside it."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from collapse_probe.errors import DamagedFileError
from collapse_probe.loading.content import (
    NPZ,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TORCH_LEGACY,
    TORCH_ZIP,
    DamagedMemberError,
    recognise,
)
from collapse_probe.loading.npz import read_arrays
from collapse_probe.loading.pickles import refusal

_LONGEST_NAME = 200


def read(path: Path, named_by: Path | None = None) -> tuple[str, Any, dict[str, str]]:
    """The format of a weights file, what was saved in it, and its text metadata (safetensors only).

    Args:
        path: the file.
        named_by: the index that names it, which may not name another one.

    Raises:
        ModelError, DamagedFileError, UnsafeFileError: see :func:`collapse_probe.loading.content.recognise`; also where
            torch, numpy or safetensors cannot read what is inside.
    """
    try:
        file_format = recognise(path)
    except DamagedMemberError as error:
        raise DamagedFileError(f"{error}{_tensors_in(path, error.member)}") from None
    if file_format == SAFETENSORS:
        return file_format, *_safetensors(path)
    if file_format == SAFETENSORS_INDEX:
        if named_by is not None:
            raise DamagedFileError(f"{named_by} names {path.name}, which is an index and holds no weights.")
        return file_format, _indexed(path), {}
    if file_format == NPZ:
        return file_format, read_arrays(path), {}
    return file_format, _torch(path, file_format), {}


def shards(index: Path) -> list[Path]:
    """The files that an index names, in its folder.

    Raises:
        DamagedFileError: it names something else than files beside it, or a file that is missing.
    """
    names = _weight_map(index).values()
    files = [index.parent / name for name in dict.fromkeys(names)]
    missing = [_short(file.name) for file in files if not _is_file(file)]
    if missing:
        raise DamagedFileError(
            f"{index} names {len(files)} files of weights, and {', '.join(missing[:3])} is missing beside it. Download "
            "or copy it, too."
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        found = None
    names = found.values() if isinstance(found, dict) else ()
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise DamagedFileError(f"{index} is a damaged index: its 'weight_map' must name files beside it by key.")
    return dict(found)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"


def _indexed(index: Path) -> dict[str, Tensor]:
    promised = _weight_map(index)
    state: dict[str, Tensor] = {}
    for file in shards(index):
        file_format, content, _ = read(file, named_by=index)
        if file_format not in (SAFETENSORS, TORCH_ZIP, TORCH_LEGACY) or not isinstance(content, Mapping):
            raise DamagedFileError(f"{index} names {file.name}, which holds no weights.")
        state.update(content)
    absent = [key for key in promised if key not in state]
    if absent:
        raise DamagedFileError(
            f"{index} promises {len(absent)} tensors that its files do not hold, {absent[0]} first. Download them "
            "again."
        )
    return state


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            return {name: stream.get_tensor(name) for name in stream.keys()}, metadata  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise DamagedFileError(f"{path} is a damaged safetensors file: {error}.") from None


def _torch(path: Path, file_format: str) -> Any:
    """torch.load, restricted to tensors, plain containers and timm's `args` (an argparse.Namespace)."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hints for torch's developers about odd pickles
            return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=file_format == TORCH_ZIP)
    except pickle.UnpicklingError:
        if file_format == TORCH_LEGACY:
            raise DamagedFileError(f"{path} is damaged: its pickled part cannot be read. Copy it again.") from None
        # torch's own text advises to switch the protection off; it is not repeated, nor chained.
        raise refusal(path, []) from None
    except Exception as error:  # the loader meets hostile or broken bytes with any exception type
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise DamagedFileError(f"{path} is damaged: {reason}. Download or copy it again.") from None


def _tensors_in(path: Path, member: str) -> str:
    """Which tensors lie in a damaged member of a torch archive, in words; nothing where that cannot be known.

    The archive is mapped into memory, so that the order of storages there is that of the members in the file.
    """
    top, _, place = member.partition("/")
    if not place.startswith("data/"):
        return ""
    try:
        content = _torch(path, TORCH_ZIP)
        reader = torch._C.PyTorchFileReader(os.fspath(path))
        members = [f"{top}/{name}" for name in reader.get_all_records() if name.startswith("data/")]
        starts = {reader.get_record_offset(name.partition("/")[2]): name for name in members}  # type: ignore[attr-defined]
        return _words(content, [starts[start] == member for start in sorted(starts)])
    except Exception:  # it is damaged, after all
        return ""


def _words(content: Any, damaged: list[bool]) -> str:
    keys: dict[int, list[str]] = {}
    for key, tensor in _leaves(content, ""):
        keys.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)
    if len(keys) != len(damaged):
        return ""
    hit = next(names for bad, (_, names) in zip(damaged, sorted(keys.items()), strict=True) if bad)
    return f" The damage is in {', '.join(hit[:3])}."


def _leaves(value: Any, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(path, value)]
    if isinstance(value, Mapping):
        found = []
        for key, item in value.items():
            found += _leaves(item, f"{path}.{key}" if path else str(key))
        return found
    if isinstance(value, (list, tuple)):
        return [leaf for number, item in enumerate(value) for leaf in _leaves(item, f"{path}.{number}")]
    return []
