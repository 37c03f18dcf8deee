"""How far training had come when a checkpoint was written, as far as the file or its folder states it.

Training scripts store a step or an epoch beside the weights: timm, DINO and torchvision `epoch`, Lightning `epoch` and
`global_step`, DINOv2 `iteration`, DeepSpeed `global_steps`, OpenMMLab `meta.iter`; Hugging Face's Trainer writes
`trainer_state.json` into the folder. A number is taken as it is stated: whether the first epoch is 0 or 1 is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from collapse_probe.loading.folders import KNOWN

#: Names of what is stated, the plainest first. "epochs" and "steps" are how long training is to be, where they occur.
_NAMES = {
    "step": ("global_step", "global_steps", "step", "iteration", "iter", "num_updates", "train_step", "current_step"),
    "epoch": ("epoch", "current_epoch"),
}
#: Mappings in which they may lie, beside the top level.
_WITHIN = ("meta", "extra_state", "trainer_state", "train_state")
_TRAINER_STATE, _LONGEST = "trainer_state.json", 100_000_000
_LARGEST = 10**15


def training_state(path: Path, content: Any, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a weights file, its metadata, or a Trainer's file beside it says of its place in training.

    Args:
        path: the file.
        content: what was saved in it.
        metadata: text metadata of safetensors.

    Returns:
        ``"step"`` and ``"epoch"``, as far as they are stated, each with its ``number`` and under which name it was
        ``stated``.
    """
    found: dict[str, dict[str, Any]] = {}
    for where, mapping in _mappings(path, content, metadata):
        for unit, names in _NAMES.items():
            for name in names:
                number = _number(mapping.get(name))
                if number is not None:
                    found.setdefault(unit, {"number": number, "stated": f"{where}{name}"})
    return found


def _mappings(path: Path, content: Any, metadata: Mapping[str, str]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    if isinstance(content, Mapping):
        yield "", content
        for name in _WITHIN:
            if isinstance(content.get(name), Mapping):
                yield f"{name}.", content[name]
    yield "", {name: _parsed(value) for name, value in metadata.items()}
    beside = path.parent / _TRAINER_STATE
    if path.name in KNOWN:  # of a folder for one checkpoint
        with suppress(OSError, ValueError, RecursionError):
            stated = json.loads(beside.read_bytes()) if beside.stat().st_size <= _LONGEST else None
            if isinstance(stated, Mapping):
                yield f"{_TRAINER_STATE}: ", stated


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> int | float | None:
    """A count that training can have reached; None for anything else."""
    if isinstance(value, Tensor):
        value = value.item() if value.ndim == 0 and not value.is_complex() else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 <= value <= _LARGEST:  # nor NaN
        return None
    return int(value) if value == int(value) else value
