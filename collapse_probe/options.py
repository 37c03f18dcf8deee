"""How to run an analysis, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from collapse_probe.errors import UsageError
from collapse_probe.metrics.functional.ratio import SIMILAR
from collapse_probe.shards import Shard
from collapse_probe.skipping import SKIPPED_ALLOWED, check_share


@dataclass(frozen=True)
class Options:
    """How to run an analysis; what each means is said in `collapse_probe.analyze`."""

    batch_size: int = 32
    workers: int = 0
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
        for name, least in (("batch_size", 1), ("num_samples", 1), ("nearest", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UsageError(f"{name} must be a whole number of at least {least}; got {value!r}.")
        for name in ("threshold", "until_se"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (int, float)):
                raise UsageError(f"{name} must be a number; got {value!r}.")
        check_share(self.max_skipped)
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
