"""Make the bundled architectures known to timm, and helpers importable beside the tests that use them."""

from __future__ import annotations

import sys
from pathlib import Path

import collapse_probe.models  # noqa: F401

HERE = Path(__file__).parent
for folder in (HERE, HERE / "capture", HERE / "metrics"):
    sys.path.insert(0, str(folder))
