"""collapse_probe: attention-collapse diagnostics for vision transformers.

    import collapse_probe as cp

    analysis = cp.analyze("model.pt", "val/", arch="vit_small_patch16_224")
    analysis.findings

Names are imported when they are first used, so that `import collapse_probe` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collapse_probe.analysis import analyze as analyze
    from collapse_probe.analysis import measure as measure
    from collapse_probe.capture import AttentionMap as AttentionMap
    from collapse_probe.capture import capture as capture
    from collapse_probe.comparing import compare as compare
    from collapse_probe.comparison import Comparison as Comparison
    from collapse_probe.errors import CollapseProbeError as CollapseProbeError
    from collapse_probe.loading import load_model as load_model
    from collapse_probe.look import Look as Look
    from collapse_probe.looking import look_at as look_at
    from collapse_probe.merging import merge as merge
    from collapse_probe.result import Analysis as Analysis
    from collapse_probe.result import Finding as Finding
    from collapse_probe.series import Series as Series
    from collapse_probe.tracking import track as track

_HOMES = {
    "Analysis": "collapse_probe.result",
    "AttentionMap": "collapse_probe.capture",
    "CollapseProbeError": "collapse_probe.errors",
    "Comparison": "collapse_probe.comparison",
    "Finding": "collapse_probe.result",
    "Look": "collapse_probe.look",
    "Series": "collapse_probe.series",
    "analyze": "collapse_probe.analysis",
    "capture": "collapse_probe.capture",
    "compare": "collapse_probe.comparing",
    "load_model": "collapse_probe.loading",
    "look_at": "collapse_probe.looking",
    "measure": "collapse_probe.analysis",
    "merge": "collapse_probe.merging",
    "track": "collapse_probe.tracking",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'collapse_probe' has no attribute {name!r}")
    if name == "load_model":
        importlib.import_module("collapse_probe.models")  # registers the bundled architectures with timm
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
