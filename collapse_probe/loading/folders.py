"""Folders that hold a model: timm's and Hugging Face's exports, Trainer checkpoints, Lightning's logs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collapse_probe.errors import DamagedFileError, ModelError, UsageError
from collapse_probe.loading.content import SUFFIXES

#: What exports call their weights, the safer format first.
_KNOWN = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin", "last.ckpt",
)  # fmt: skip
# What trainers leave beside the weights.
_OTHERS = re.compile(r"optimizer|scheduler|rng_state|training_args|scaler|random_states|trainer_state")


@dataclass(frozen=True)
class ModelFolder:
    """The weights file of a folder, and what its `config.json` says.

    Attributes:
        weights: the file.
        architecture: timm's name, where the folder is timm's export.
        model_kwargs: constructor arguments stored beside it.
        num_heads: of a Hugging Face configuration.
    """

    weights: Path
    architecture: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    num_heads: int | None = None


def open_folder(folder: Path) -> ModelFolder:
    """Find the weights in a folder.

    Raises:
        UsageError: it holds none, or several of which none is plainly meant.
        DamagedFileError: its `config.json` cannot be read.
    """
    weights = _weights_in(folder)
    config = _config(weights.parent / "config.json")
    architecture, arguments = config.get("architecture"), config.get("model_args")
    vision = config.get("vision_config")
    heads = (vision if isinstance(vision, Mapping) else config).get("num_attention_heads")
    return ModelFolder(
        weights,
        architecture if isinstance(architecture, str) else None,
        dict(arguments) if isinstance(arguments, Mapping) else {},
        heads if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 else None,
    )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}.") from None
    return content if isinstance(content, dict) else {}


def _weights_in(folder: Path) -> Path:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise ModelError(f"Cannot read {folder}: {error.strerror or error}.") from None
    if known := next((name for name in _KNOWN if name in names), None):
        return folder / known
    files = [name for name in names if Path(name).suffix in SUFFIXES and not _OTHERS.search(name)]
    files = [name for name in files if not name.endswith(".json")]
    # Of both formats side by side, the one that needs no unpickling.
    files = [name for name in files if name.endswith(".safetensors")] or files
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise UsageError(f"{folder} holds {len(files)} weights files: {_listed(files)}. Name one of them.")
    if (folder / "checkpoints") in inner:  # of a Lightning log
        return _weights_in(folder / "checkpoints")
    candidates = [path.name for path in inner if re.match(r"checkpoint-\d+$|version_\d+$|lightning_logs$", path.name)]
    if len(candidates) == 1:
        return _weights_in(folder / candidates[0])
    if candidates:
        candidates.sort(key=lambda name: int(re.sub(r"\D", "", name) or 0))
        raise UsageError(f"{folder} holds several checkpoints: {_listed(candidates[::-1])}. Name one of them.")
    raise UsageError(
        f"{folder} holds no weights file ({', '.join(sorted(SUFFIXES))}). For images give --images {folder}."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
