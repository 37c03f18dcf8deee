"""`--fail-on` and what belongs to it, for every command that has an analysis in the end."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collapse_probe.errors import ConditionError, UsageError
from collapse_probe.words import neutral

if TYPE_CHECKING:
    from collapse_probe.conditions import Outcome
    from collapse_probe.conditions.syntax import Condition
    from collapse_probe.result import Analysis

_PANEL = "Conditions"

FailOn = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-on",
        metavar="CONDITION",
        help="End with exit code 7 where this is so: attention-collapse (the code of a finding), problem (any that "
        "grave), head_diversity<0.05 (any layer, beyond what standard errors explain), mean(normalized_entropy)>0.97, "
        "similarity_to_previous>baseline+0.02; may be repeated.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(help="Folder of an earlier analysis, for conditions that are relative to it.", rich_help_panel=_PANEL),
]
ConditionsJson = Annotated[
    str | None, typer.Option("--conditions-json", help="File for the outcomes as JSON.", rich_help_panel=_PANEL)
]
JUnit = Annotated[
    str | None, typer.Option("--junit", help="File for the outcomes as JUnit XML.", rich_help_panel=_PANEL)
]


@dataclass(frozen=True)
class Gate:
    """Conditions that were asked for, read and found possible before anything is measured.

    Attributes:
        conditions: what must not be.
        baseline: an earlier analysis, and the folder that it is from.
        files: where outcomes go, by the option that says so.
    """

    conditions: list[Condition]
    baseline: tuple[Analysis, str] | None
    files: dict[str, Path]

    def check_metrics(self, chosen: str) -> None:
        """Raises UsageError where a condition is about a reading that these metrics leave out."""
        from collapse_probe.conditions.syntax import metric_of
        from collapse_probe.metrics.suite import choose

        measured = {item.name for item in choose(chosen)[0]}
        for condition in self.conditions:
            for reading in condition.readings:
                metric = metric_of(reading)
                if metric is not None and metric not in measured:
                    raise UsageError(
                        f"--fail-on {neutral(condition.text)!r} needs {reading}, a reading of {metric}, which "
                        f"--metrics {chosen} leaves out: give --metrics {chosen},{metric}."
                    )

    def judge(self, analysis: Analysis) -> None:
        """Print and write what became of the conditions.

        Raises:
            ConditionError: one failed.
            UsageError: one cannot be judged, or the baseline cannot be compared with.
            OutputError: an outcome cannot be written.
        """
        from collapse_probe.cli.output import PipeConsole, printing, whether_or_not_read
        from collapse_probe.conditions import check
        from collapse_probe.report.terminal import print_conditions

        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always")
            outcomes = check(analysis, self.conditions, None if self.baseline is None else self.baseline[0])
        for doubt in doubts:
            print(f"Warning: {neutral(str(doubt.message))}", file=sys.stderr)
        with whether_or_not_read(), printing():
            print_conditions(outcomes, PipeConsole())
        self._write(outcomes, analysis)
        _end(outcomes)

    def _write(self, outcomes: list[Outcome], analysis: Analysis) -> None:
        from collapse_probe.conditions import to_json, to_junit
        from collapse_probe.files import write_atomically

        for option, path in self.files.items():
            if option == "--junit":
                content: str | bytes = to_junit(outcomes, analysis)
            else:
                content = to_json(outcomes, analysis, None if self.baseline is None else self.baseline[1])
            write_atomically(path, content, f"Choose another file for {option}.")


def gate(
    fail_on: list[str] | None, baseline: str | None, conditions_json: str | None, junit: str | None
) -> Gate | None:
    """The gate that these options describe; None without conditions.

    Raises:
        UsageError: a condition cannot be read, or an option is given that is nothing without another.
        DamagedFileError: the baseline is no saved analysis.
        OutputError: a file for outcomes cannot be written.
    """
    from collapse_probe.cli.saved import saved

    files = {
        option: Path(path)
        for option, path in (("--conditions-json", conditions_json), ("--junit", junit))
        if path is not None
    }
    if not fail_on:
        alone = [*(["--baseline"] if baseline is not None else []), *files]
        if alone:
            raise UsageError(f"{alone[0]} is about conditions: give some with --fail-on.")
        return None
    if len({path.resolve() for path in files.values()}) < len(files):
        raise UsageError(f"{' and '.join(files)} name the same file.")
    from collapse_probe.conditions import parse
    from collapse_probe.files import check_file_writable

    conditions = [parse(text) for text in fail_on]
    relative = next((item for item in conditions if item.relative), None)
    if relative is not None and baseline is None:
        raise UsageError(f"--fail-on {neutral(relative.text)!r} is relative to a baseline: give one with --baseline.")
    if relative is None and baseline is not None:
        raise UsageError(
            "No --fail-on refers to the --baseline, for example similarity_to_previous>baseline+0.02. Leave it out."
        )
    for option, path in files.items():
        check_file_writable(path, f"Choose another file for {option}.")
    return Gate(conditions, None if baseline is None else (saved(baseline), baseline), files)


def _end(outcomes: list[Outcome]) -> None:
    """Raises what the outcomes amount to; a failure comes before what could not be judged."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        of = f"{len(failed)} of {len(outcomes)} conditions" if len(outcomes) > 1 else "The condition"
        raise ConditionError(f"{of} failed: {', '.join(outcome.condition for outcome in failed)}.")
    blind = [outcome for outcome in outcomes if outcome.status == "not-measured"]
    if blind:
        raise UsageError(f"--fail-on {blind[0].condition!r} cannot be judged: {blind[0].message}.")
