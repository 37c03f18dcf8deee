"""`collapse-probe merge`: one analysis from the sums of all shards, without the model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from collapse_probe.cli.conditions import Baseline, ConditionsJson, FailOn, JUnit, gate
from collapse_probe.cli.outcome import with_exit_codes


@with_exit_codes
def merge(
    shards: Annotated[list[str], typer.Argument(help="All folders that analyze --shard wrote.", show_default=False)],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Folder for analysis.json, tables, figures and report.html."),
    ] = None,
    max_skipped: Annotated[
        float | None,
        typer.Option(
            help="Share of all images that may be unreadable; by default what the shards were measured with.",
            rich_help_panel="Images",
        ),
    ] = None,
    fail_on: FailOn = None,
    baseline: Baseline = None,
    conditions_json: ConditionsJson = None,
    junit: JUnit = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make one analysis of shards that were measured apart.

    [bold]collapse-probe analyze model.pt --images val/ --shard 1/4 --out s_1[/bold]

    and the other three, in any order and on any machine that sees the same weights and images; then, anywhere:

    [bold]collapse-probe merge s_*/ --out run/[/bold]
    """
    from collapse_probe.cli.results import conclude, write, written
    from collapse_probe.files import check_writable
    from collapse_probe.progress import ProgressBar

    asked = gate(fail_on, baseline, conditions_json, junit)
    if out is not None:
        check_writable(out)
    with ProgressBar(quiet=quiet) as progress:
        from collapse_probe.merging import merge as merged

        analysis = merged(shards, max_skipped)
        analysis.provenance["command"] = shlex.join(["collapse-probe", *sys.argv[1:]])
        if out is not None:
            write(analysis, Path(out), progress)
    conclude(analysis, written(out), asked)
