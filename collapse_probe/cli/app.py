"""The `collapse-probe` command."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer

from collapse_probe.allocator import large_pages
from collapse_probe.cli.analyze import analyze
from collapse_probe.cli.compare import compare
from collapse_probe.cli.inspect import inspect
from collapse_probe.cli.look import look
from collapse_probe.cli.merge import merge
from collapse_probe.cli.metrics import metrics
from collapse_probe.cli.models import models
from collapse_probe.cli.report import report
from collapse_probe.cli.track import track

app = typer.Typer(
    name="collapse-probe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Is attention in a vision transformer collapsing: where, how badly, and what can be done about it?",
    epilog="Exit codes: 0 done, 1 internal error, 2 usage, 3 model rejected, 4 images insufficient, 5 cannot write, "
    "6 out of resources, 7 a --fail-on condition failed, 130 and 143 interrupted.",
)
app.command()(analyze)
app.command()(compare)
app.command()(inspect)
app.command()(look)
app.command()(merge)
app.command()(metrics)
app.command()(models)
app.command()(report)
app.command()(track)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"collapse-probe {version('collapse-probe')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminated)
    large_pages()
    app()


def _terminated(*_: Any) -> None:
    print("Terminated.", file=sys.stderr)
    raise SystemExit(143)
