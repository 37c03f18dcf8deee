"""How to run an analysis, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from collapse_probe.errors import UsageError
from collapse_probe.ratio import SIMILAR
from collapse_probe.shards import Shard
from collapse_probe.skipping import SKIPPED_ALLOWED, check_share

#: Ranges of whole numbers. The upper ends are far beyond any use; what is larger is a slip of the hand.
_WHOLE_NUMBERS = {
    "batch_size": (1, 10**6),
    "workers": (0, 1000),
    "num_samples": (1, 10**12),
    "nearest": (1, 10**4),
    "seed": (0, 2**63 - 1),
    "tile_bytes": (1, 2**50),
}

#: Options that may be None.
_OPTIONAL = {"num_samples", "tile_bytes", "until_se", "workers"}


@dataclass(frozen=True)
class Options:
    """How to run an analysis; what each means is said in `collapse_probe.analyze`."""

    batch_size: int = 32
    workers: int | None = None
    num_samples: int | None = None
    device: str = "auto"
    amp: bool = False
    amp_dtype: str = "bfloat16"
    seed: int = 0
    layers: tuple[str, ...] = ()
    attention: str = "applied"
    until_se: float | None = None
    threshold: float = SIMILAR
    nearest: int = 1
    tile_bytes: int | None = None
    verify: bool = False
    metrics: str = "fast"
    max_skipped: float = SKIPPED_ALLOWED
    shard: Shard = field(default_factory=Shard)

    def described(self) -> dict[str, Any]:
        """What results may depend on, as plain data."""
        kept = {name: value for name, value in vars(self).items() if name not in ("tile_bytes", "shard")}
        return {**kept, "layers": list(self.layers)}  # as it comes back from a file

    def check(self) -> None:
        """Raises UsageError where a value is out of range."""
        for name, (least, most) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL):
                _check_whole(name, value, least, most)
        for name in ("threshold", "until_se"):
            value = getattr(self, name)
            known = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (known or (value is None and name in _OPTIONAL)):
                raise UsageError(f"{name} must be a number; got {value!r}.")
        check_share(self.max_skipped)
        for name in ("amp", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False; got {getattr(self, name)!r}.")
        for name in ("device", "metrics"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} must be text; got {getattr(self, name)!r}.")
        if not all(isinstance(pattern, str) for pattern in self.layers):
            raise UsageError(f"layers must be patterns of names; got {self.layers!r}.")
        if self.attention not in ("applied", "softmax"):
            raise UsageError(f"attention must be 'applied' or 'softmax'; got {self.attention!r}.")
        if self.amp_dtype not in ("bfloat16", "float16"):
            raise UsageError(f"amp_dtype must be 'bfloat16' or 'float16'; got {self.amp_dtype!r}.")
        if self.until_se is not None and not 0 < self.until_se < 1:
            raise UsageError(f"until_se must lie between 0 and 1; got {self.until_se}.")
        if self.until_se is not None and self.shard.count > 1:
            raise UsageError("until_se needs to see all images; it cannot be used with shards. Use num_samples.")
        if not -1 <= self.threshold <= 1:
            raise UsageError(f"threshold must lie within -1..1; got {self.threshold}.")


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        end = "2**63 - 1" if most == 2**63 - 1 else most
        raise UsageError(f"{name} must be a whole number from {least} to {end}; got {value!r:.60}.")


def check_preprocessing(
    img_size: Any = None, mean: Any = None, std: Any = None, crop_pct: Any = None, interpolation: Any = None
) -> None:
    """Raises UsageError where what overrides a model's preprocessing is out of range, before the model is loaded."""
    if img_size is not None:
        _check_whole("img_size", img_size, 1, 10**5)
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            _check_values(name, values)
    if crop_pct is not None and not (_is_finite(crop_pct) and 0 < crop_pct <= 1):
        raise UsageError(f"crop_pct must be a number above 0, up to 1; got {crop_pct!r:.60}.")
    if interpolation is not None and not isinstance(interpolation, str):
        raise UsageError(f"interpolation must be text, such as 'bicubic'; got {interpolation!r}.")


def _check_values(name: str, values: Any) -> None:
    """One number for each channel, or one for all."""
    listed = isinstance(values, (list, tuple)) and len(values) > 0
    if not listed or not all(_is_finite(value) and (value > 0 or name == "mean") for value in values):
        above = " above 0" if name == "std" else ""
        raise UsageError(f"{name} must be finite numbers{above}, one or one per channel; got {values!r:.60}.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
