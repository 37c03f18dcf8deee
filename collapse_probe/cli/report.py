"""`collapse-probe report`: a saved analysis rendered again, without torch, the model or the images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collapse_probe.cli.conditions import Baseline, ConditionsJson, FailOn, JUnit, gate
from collapse_probe.cli.outcome import with_exit_codes
from collapse_probe.errors import UsageError

if TYPE_CHECKING:
    from collapse_probe.progress import ProgressBar
    from collapse_probe.result import Analysis

#: What can be written: the page, and figures.
PAGE, FIGURES = "html", ("png", "svg", "pdf", "eps", "jpg", "tif", "webp")


@with_exit_codes
def report(
    run: Annotated[str, typer.Argument(help="Folder that analyze --out or merge --out wrote.", show_default=False)],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder for report.html and figures/; may be the run's own.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"What to write into --out: {PAGE} (report.html, the default) or figures in {', '.join(FIGURES)}; "
            "several separated by commas.",
            show_default=False,
        ),
    ] = None,
    fail_on: FailOn = None,
    baseline: Baseline = None,
    conditions_json: ConditionsJson = None,
    junit: JUnit = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Show a saved analysis again, write its report and figures, and check conditions on it.

    [bold]collapse-probe report run/ --out paper/ --format html,pdf[/bold]

    [bold]collapse-probe report run/ --fail-on problem --fail-on "head_diversity<0.05"[/bold]
    """
    from collapse_probe.cli.results import conclude
    from collapse_probe.cli.saved import saved
    from collapse_probe.files import check_writable
    from collapse_probe.progress import ProgressBar

    wanted = _formats(formats, out)
    asked = gate(fail_on, baseline, conditions_json, junit)
    analysis = saved(run)
    closing = None
    if out is not None:
        _check_own(run, out)
        check_writable(out)
        with ProgressBar(quiet=quiet) as progress:
            _write(analysis, Path(out), wanted, progress)
        names = [*(["report.html"] if PAGE in wanted else []), *(["figures/"] if set(wanted) != {PAGE} else [])]
        closing = f"Written to {out}: {', '.join(names)}"
    conclude(analysis, closing, asked)


def _formats(text: str | None, out: str | None) -> list[str]:
    """The formats that were asked for, each once."""
    if text is None:
        return [PAGE]
    if out is None:
        raise UsageError("--format says what to write into --out: give --out.")
    words = [word.strip().lower().removeprefix(".") for word in text.split(",")]
    unknown = [word for word in words if word not in (PAGE, *FIGURES)]
    if unknown:
        raise UsageError(f"--format {text!r:.80}: {unknown[0]!r:.40} is none of {', '.join((PAGE, *FIGURES))}.")
    return list(dict.fromkeys(words))


def _check_own(run: str, out: str) -> None:
    """A report beside the numbers of another analysis would pass for theirs."""
    there = Path(out) / "analysis.json"
    if there.exists() and Path(out).resolve() != Path(run).resolve():
        raise UsageError(f"--out {out} holds another analysis, beside which this report would mislead. Choose another.")


def _write(analysis: Analysis, folder: Path, formats: list[str], progress: ProgressBar) -> None:
    """What was asked for, or nothing; figures of these formats that the analysis does not have go with older ones."""
    from collapse_probe.files import staged
    from collapse_probe.plots import Gallery, save_figures
    from collapse_probe.plots.gallery import FIGURES as NAMES
    from collapse_probe.report.html import write_report

    progress.note(f"Writing {folder}")
    kinds = [name for name in formats if name != PAGE]
    gallery = Gallery(analysis)
    with staged(folder, optional=[f"figures/{name}.{kind}" for name in NAMES for kind in kinds]) as stage:
        if kinds:
            save_figures(gallery, stage / "figures", kinds)
        if PAGE in formats:
            write_report(gallery, stage / "report.html")
