"""Where the development data lie: a trained DeiT-Ti and photographs, never part of the project."""

from __future__ import annotations

import os
from pathlib import Path


def shared_data() -> Path | None:
    """The folder with the development data, or None where it is absent."""
    named = os.environ.get("COLLAPSE_PROBE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None
