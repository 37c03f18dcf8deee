"""What commands do with an analysis: files, a summary on stdout, and conditions that it is held against."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from collapse_probe.errors import CollapseProbeError
from collapse_probe.words import neutral

if TYPE_CHECKING:
    from collapse_probe.cli.conditions import Gate
    from collapse_probe.progress import ProgressBar
    from collapse_probe.ranks import Team
    from collapse_probe.result import Analysis


def leads() -> bool:
    """Whether this process is the one that speaks: the first of those that `torchrun` started, or the only one."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


@contextlib.contextmanager
def one_voice(team: Team) -> Iterator[None]:
    """Where all processes of a team fail, its first one says why; the others end as it does, once it has spoken."""
    try:
        yield
    except CollapseProbeError as error:
        if team.size == 1:
            raise
        if team.rank == 0:
            print(f"Error: {neutral(str(error), lines=True)}", file=sys.stderr, flush=True)
        team.wait()
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if team.rank == 0:
            raise
        raise SystemExit(130) from None
    except Exception:
        if team.rank == 0 or os.environ.get("COLLAPSE_PROBE_DEBUG"):
            raise
        team.wait()  # the first process, which knows what failed here, says it
        raise SystemExit(1) from None


def write(analysis: Analysis, folder: Path, progress: ProgressBar) -> None:
    """Everything that goes into an --out folder, or nothing."""
    from collapse_probe.files import staged
    from collapse_probe.plots.save import figure_files

    progress.note(f"Writing {folder}")
    with staged(folder, optional=[f"figures/{name}" for name in figure_files()]) as stage:
        fill(analysis, stage)


def fill(analysis: Analysis, folder: Path) -> None:
    """Write data, figures and the report into a folder, one after the other."""
    from collapse_probe.plots import Gallery, save_figures
    from collapse_probe.report.html import write_report

    analysis.save(folder)
    gallery = Gallery(analysis)
    save_figures(gallery, folder / "figures")
    write_report(gallery, folder / "report.html")


def conclude(analysis: Analysis, closing: str | None, gate: Gate | None) -> None:
    """Show the analysis, then hold it against the conditions that were asked for.

    Args:
        analysis: what was found; its files are written.
        closing: where they are.
        gate: the conditions, if any.

    Raises:
        ConditionError, UsageError, OutputError: see :meth:`Gate.judge`.
    """
    from collapse_probe.cli.output import whether_or_not_read

    if gate is None:
        _show(analysis, closing)
        return
    with whether_or_not_read():
        _show(analysis, closing)
    gate.judge(analysis)


def written(out: str | None) -> str | None:
    """What :func:`write` left, in a line."""
    if out is None:
        return None
    return f"Written to {out}: analysis.json, arrays.npz, layers.csv, similarity.csv, figures/, report.html"


def _show(analysis: Analysis, closing: str | None) -> None:
    """The summary, and where the rest is."""
    from collapse_probe.cli.output import PipeConsole, printing
    from collapse_probe.report.terminal import print_summary

    with printing():
        print_summary(analysis, PipeConsole(), [] if closing is None else [closing])
