"""Saved analyses by the names that users type: what is there, or what there is instead and what to do with it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from collapse_probe.errors import DamagedFileError, UsageError

if TYPE_CHECKING:
    from collapse_probe.result import Analysis


def saved(folder: str) -> Analysis:
    """The analysis in a folder.

    Raises:
        UsageError: it holds something else that this tool wrote, or is no folder.
        DamagedFileError: it holds no analysis that can be read.
    """
    from collapse_probe.result import Analysis

    path = Path(folder)
    try:
        if path.is_file():
            raise UsageError(f"{folder} is a file. Give the folder that analyze --out or merge --out wrote.")
        if not (path / "analysis.json").exists():
            _check_others(path)
    except OSError as error:
        raise DamagedFileError(f"{folder:.200} cannot be read: {error.strerror or error}.") from None
    return Analysis.load(path)


def _check_others(path: Path) -> None:
    """Raises UsageError where a folder without an analysis holds what one can be had from."""
    if (path / "shard.json").exists():
        if _interrupted(path):
            raise UsageError(
                f"{path} holds what an interrupted run has measured, not an analysis. Repeat its command with --resume."
            )
        raise UsageError(
            f"{path} holds a shard, which is one part of the images. Make an analysis of all parts first: "
            "collapse-probe merge SHARD1 SHARD2 ... --out RUN"
        )
    inside = {name: sorted(item.parent for item in path.glob(f"*/{name}")) for name in ("analysis.json", "shard.json")}
    if inside["analysis.json"]:
        raise UsageError(f"{path} holds several analyses. Name one: {', '.join(map(str, inside['analysis.json'][:4]))}")
    if inside["shard.json"]:
        raise UsageError(
            f"{path} holds folders of shards or of an interrupted run, not an analysis. Shards become one by "
            f"collapse-probe merge {path}/*/ --out RUN; an interrupted run goes on with --resume."
        )


def _interrupted(path: Path) -> bool:
    """Whether sums are those of a run that may go on."""
    from collapse_probe.partial import Partial

    with contextlib.suppress(DamagedFileError):
        return bool(Partial.load_header(path).state)
    return False
