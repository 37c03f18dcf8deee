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
KNOWN = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin", "last.ckpt",
)  # fmt: skip
#: What trainers leave beside the weights.
OTHERS = re.compile(r"optimizer|scheduler|rng_state|training_args|scaler|random_states|trainer_state")
# Hugging Face's names of activations -> timm's.
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
# Pillow's numbers of filters.
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Configuration:
    """What `config.json` and `preprocessor_config.json` beside weights say.

    Attributes:
        architecture: timm's name, where the folder is timm's export.
        model_kwargs: constructor arguments stored beside it.
        num_heads, activation, norm_eps: of a Hugging Face configuration; the activation by timm's name.
        preprocessing: settings by timm's names: mean, std, interpolation, crop_pct, crop_mode.
    """

    architecture: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    num_heads: int | None = None
    activation: str | None = None
    norm_eps: float | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFolder:
    """The weights file of a folder, and what lies beside it."""

    weights: Path
    config: Configuration = field(default_factory=Configuration)


def open_folder(folder: Path) -> ModelFolder:
    """Find the weights in a folder.

    Raises:
        UsageError: it holds none, or several of which none is plainly meant.
        DamagedFileError: its `config.json` or `preprocessor_config.json` cannot be read.
    """
    weights = _weights_in(folder)
    return ModelFolder(weights, _configuration(weights.parent))


def _configuration(folder: Path) -> Configuration:
    config = _read(folder / "config.json")
    architecture, arguments, own = (config.get(name) for name in ("architecture", "model_args", "pretrained_cfg"))
    if isinstance(architecture, str):
        return Configuration(
            architecture,
            dict(arguments) if isinstance(arguments, Mapping) else {},
            preprocessing=_of_timm(own) if isinstance(own, Mapping) else {},
        )
    inner = config.get("vision_config")
    vision = inner if isinstance(inner, Mapping) else config
    heads, eps, activation = (vision.get(name) for name in ("num_attention_heads", "layer_norm_eps", "hidden_act"))
    gated = vision.get("use_swiglu_ffn") is True  # then the activation of the configuration is not used
    return Configuration(
        num_heads=heads if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 else None,
        activation=None if gated or not isinstance(activation, str) else _ACTIVATIONS.get(activation),
        norm_eps=eps if isinstance(eps, float) and 0 < eps < 1 else None,
        preprocessing=_of_processor(_read(folder / "preprocessor_config.json")),
    )


def _of_timm(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's own configuration says of preprocessing."""
    found = {name: stored[name] for name in ("interpolation", "crop_mode") if isinstance(stored.get(name), str)}
    found |= {name: tuple(stored[name]) for name in ("mean", "std") if _are_numbers(stored.get(name))}
    crop = stored.get("crop_pct")
    return found | ({"crop_pct": float(crop)} if isinstance(crop, (int, float)) and 0 < crop <= 1 else {})


def _of_processor(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a Hugging Face image processor."""
    found: dict[str, Any] = {}
    if stored.get("do_normalize") is False:
        found = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    else:
        pairs = (("image_mean", "mean"), ("image_std", "std"))
        found = {ours: tuple(stored[theirs]) for theirs, ours in pairs if _are_numbers(stored.get(theirs))}
    if stored.get("resample") in _RESAMPLING:
        found["interpolation"] = _RESAMPLING[stored["resample"]]
    size, crop = (item if isinstance(item, Mapping) else {} for item in (stored.get("size"), stored.get("crop_size")))
    shortest, cropped = size.get("shortest_edge"), crop.get("height")
    if stored.get("do_center_crop") and isinstance(shortest, int) and isinstance(cropped, int):
        found |= {"crop_pct": min(cropped / shortest, 1.0), "crop_mode": "center"} if shortest > 0 < cropped else {}
    elif not stored.get("do_center_crop") and "height" in size:  # both sides are resized, whatever their ratio
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return found


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, (int, float)) for item in value)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}.") from None
    return content if isinstance(content, dict) else {}


def _weights_in(folder: Path) -> Path:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise ModelError(f"Cannot read {folder}: {error.strerror or error}.") from None
    if known := next((name for name in KNOWN if name in names), None):
        return folder / known
    files = [name for name in names if Path(name).suffix in SUFFIXES and not OTHERS.search(name)]
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
