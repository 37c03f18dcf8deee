"""The summary that a terminal or a pipe receives: verdict first, then one table, the gaps, two lines of provenance.

Nothing here is parsed as rich markup, so that a layer called ``[red]`` stays a name, and control characters and line
ends of names never reach the terminal. Consoles whose encoding is not UTF-8 receive plain ASCII.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from collapse_probe.comparison import Comparison
from collapse_probe.report import content, differences
from collapse_probe.report.compared import numbers
from collapse_probe.report.tracking import columns, extent, origins, rows, verdict_in_short
from collapse_probe.result import Analysis, Finding
from collapse_probe.series import Series
from collapse_probe.words import REPLACEMENT, neutral

if TYPE_CHECKING:
    from collapse_probe.conditions import Outcome

_STYLES = {"problem": "bold red", "warning": "bold yellow", "note": "bold blue", "ok": "bold green"}
_HEADINGS = {
    "similarity_to_previous": "M to\nprevious",
    "image_independent_to_previous": "image-\nindep.",
    "head_diversity": "head\ndivers.",
    "normalized_entropy": "entropy\n/ log K",
    "token_similarity": "token\nsimil.",
}
_SERIES_HEADINGS = {
    "similarity_to_previous": "M to\nprev.",
    "centred_to_previous": "cen-\ntred",
    "image_independent_to_previous": "image-\nindep.",
    "normalized_entropy": "entr./\nlog K",
    "cross_head_similarity": "head\nsim.",
    "token_similarity": "token\nsim.",
}
_FOOTNOTE = "± standard error over images  * similar to the previous block  – not defined"
#: What became of a condition -> symbol, word and style.
_OUTCOMES = {
    "failed": ("✗", "FAILED", _STYLES["problem"]),
    "unclear": ("?", "UNCLEAR", _STYLES["warning"]),
    "passed": ("✓", "PASSED", _STYLES["ok"]),
    "not-measured": ("!", "NOT MEASURED", _STYLES["problem"]),
}
#: Consoles in which the table would be wider have standard errors of M only.
_TABLE_WIDTH, _UNBOUNDED = 80, 1000
_ASCII = str.maketrans({"✗": "x", "✓": "+", "±": "+/-", "·": "|", "–": "-", "—": "-", "−": "-", "…": "...", "≥": ">=",
                         REPLACEMENT: "?"})  # fmt: skip


def print_summary(analysis: Analysis, console: Console, closing: Sequence[str] = ()) -> None:
    """Print the analysis for a human reader; everything fits 80 columns; with 100 most tables have all errors.

    Args:
        analysis: what to print.
        console: where.
        closing: lines at the end, never wrapped: they may hold paths.
    """
    writer = _Writer(console)
    writer.line(content.headline(analysis), "bold")
    writer.warnings(content.warnings(analysis))
    writer.findings(content.ordered(analysis.findings))
    writer.pairs("", content.derived(analysis))
    writer.table(analysis)
    writer.pairs("Groups of comparable layers", content.groups(analysis))
    writer.gaps([*content.gaps(analysis), *_absent(analysis)])
    for label, line in content.origin(analysis):
        writer.line(f"{label}: {line}", "dim")
    writer.closing(closing)


def _absent(analysis: Analysis) -> list[tuple[str, str]]:
    return [(f"{metric} ({where})", why) for metric, where, why in content.absent(analysis)]


def print_comparison(analyses: Mapping[str, Analysis], console: Console, closing: Sequence[str] = ()) -> None:
    """Print several analyses side by side: each one's verdict in a line or two, then the same readings of all.

    Args:
        analyses: what to print, by label.
        console: where.
        closing: as for :func:`print_summary`.
    """
    writer = _Writer(console)
    for label, analysis in analyses.items():
        writer.line(f"{label}: {content.headline(analysis)}", "bold")
        writer.warnings(content.warnings(analysis))
        writer.verdict(content.ordered(analysis.findings))
        writer.line("")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("mean over blocks\n(range)", overflow="fold")
    for label in analyses:
        table.add_column(writer.text(label.replace(", ", ",\n"), lines=True), justify="right", overflow="fold")
    for label, cells in numbers(analyses):
        table.add_row(*(writer.text(words) for words in (label, *cells)))
    writer.wide(table)
    writer.closing(closing)


def print_differences(comparison: Comparison, console: Console, closing: Sequence[str] = ()) -> None:
    """Print a comparison: every verdict, readings side by side, and what sets each model apart from the first.

    Args:
        comparison: what to print.
        console: where.
        closing: as for :func:`print_summary`.
    """
    print_comparison(comparison.analyses, console)
    writer = _Writer(console)
    for label in comparison.differences:
        writer.line("")
        writer.line(f"{label} against {comparison.reference}, mean over all blocks", "bold")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
        table.add_column("reading", overflow="fold")
        for heading in ("first", "second", "difference", "p"):
            table.add_column(heading, justify="right", no_wrap=True)
        for reading, cells in differences.rows(comparison, label):
            table.add_row(*(writer.text(words) for words in (reading, *cells)))
        writer.wide(table)
    for cross in comparison.cross:
        for line in differences.cross_in_words(cross):
            writer.line(line)
    writer.line(differences.method(comparison), "dim")
    for note in comparison.notes[0 if comparison.paired else 1 :]:
        writer.line(note)
    writer.closing(closing)


def print_conditions(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print what became of conditions, each with its reason.

    Args:
        outcomes: of :func:`collapse_probe.conditions.check`.
        console: where.
    """
    writer = _Writer(console)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for outcome in outcomes:
        symbol, word, style = _OUTCOMES[outcome.status]
        grid.add_row(writer.text(f"{symbol} {word}", style), writer.text(outcome.condition, "bold"))
        grid.add_row("", writer.text(outcome.message))
    writer.line("")
    writer.line("Conditions that must not be", "bold")
    writer.show(grid)


def print_series(series: Series, console: Console, closing: Sequence[str] = ()) -> None:
    """Print a row for each checkpoint: means over its blocks and the gravest finding; then what was left out.

    Args:
        series: what to print.
        console: where.
        closing: as for :func:`print_summary`.
    """
    writer = _Writer(console)
    writer.line(f"{content.model_name(series.points[-1].analysis)}: {extent(series)}", "bold")
    writer.line("")
    shown = columns(series)
    found = rows(series)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for heading in (series.unit, *(_SERIES_HEADINGS[name] for name in shown), "simil.\nblocks"):
        table.add_column(writer.text(heading, lines=True), justify="right", no_wrap=True)
    labelled = any(row.top1 for row in found)
    if labelled:
        table.add_column("top-1", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in found:
        severity, verdict = verdict_in_short(row)
        cells = [row.step, *row.cells, row.similar, *([row.top1 or "–"] if labelled else [])]
        table.add_row(*map(writer.text, cells), writer.text(verdict, _STYLES.get(severity, "")))
    writer.wide(table)
    writer.line("Means over blocks; +n: so many more warnings and problems", "dim")
    writer.line(f"Steps: {'; '.join(origins(series))}", "dim")
    writer.gaps([(entry["path"], entry["reason"]) for entry in series.skipped], "Left out")
    writer.closing(closing)


class _Writer:
    """Puts plain words on one console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.ascii_only = console.options.ascii_only

    def text(self, words: str, style: str = "", lines: bool = False) -> Text:
        """Words as they are: no markup, no emoji codes, no control characters; line ends only if they are our own."""
        words = neutral(words, lines)
        if self.ascii_only:
            words = words.translate(_ASCII).encode("ascii", "replace").decode("ascii")
        return Text(words, style)

    def show(self, what: RenderableType) -> None:
        self.console.print(what, soft_wrap=False, highlight=False)

    def line(self, words: str, style: str = "") -> None:
        self.show(self.text(words, style))

    def warnings(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self.line(f"! {sentence}", _STYLES["warning"])

    def findings(self, findings: list[Finding]) -> None:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(overflow="fold")
        grid.add_column(overflow="fold")
        for finding in findings:
            symbol, word = content.severity(finding)
            style = _STYLES.get(finding.severity, "bold")
            grid.add_row(self.text(f"{symbol} {word.upper()}", style), self.text(finding.title, "bold"))
            cut_off = f"{finding.threshold} ({finding.source})" if finding.source else finding.threshold
            for label, words in (("evidence", finding.evidence), ("cut-off", cut_off), ("advice", finding.advice)):
                if words:
                    grid.add_row("", self.text(f"{label}: {words}", "dim" if label == "cut-off" else ""))
        self.line("")
        self.show(grid if findings else self.text("No findings: this analysis holds no verdict."))

    def verdict(self, findings: list[Finding]) -> None:
        """Titles and evidence only."""
        grid = Table.grid(padding=(0, 1))
        for finding in findings:
            symbol, word = content.severity(finding)
            mark = self.text(f"{symbol} {word.upper()}", _STYLES.get(finding.severity, "bold"))
            grid.add_row(mark, self.text(finding.title))
            grid.add_row("", self.text(finding.evidence, "dim"))
        self.show(grid)

    def closing(self, lines: Sequence[str]) -> None:
        """Lines at the end, whole."""
        if lines:
            self.line("")
        for line in lines:
            self.console.print(self.text(line), soft_wrap=True, highlight=False)

    def wide(self, table: Table) -> None:
        """A table that keeps its width: a narrower console wraps its lines; rich would break numbers apart."""
        self.console.print(Segments(self.console.render(table, self.wide_options())), crop=False, end="")

    def wide_options(self) -> ConsoleOptions:
        return self.console.options.update(width=max(self.console.width, _TABLE_WIDTH))

    def table(self, analysis: Analysis) -> None:
        rows = content.rows(analysis)
        options = self.wide_options()
        table = self._table(analysis, rows, with_errors=True)
        if Measurement.get(self.console, options.update(width=_UNBOUNDED), table).maximum > options.max_width:
            table = self._table(analysis, rows, with_errors=False)
        self.line("")
        self.wide(table)
        self.line(_FOOTNOTE, "dim")
        if elided := content.elided(rows):
            self.line(f"… stands for {elided}", "dim")

    def _table(self, analysis: Analysis, rows: list[content.Row], with_errors: bool) -> Table:
        """A row for each layer, with the standard error of every mean, or of the first column only."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0), show_edge=False, header_style="bold")
        table.add_column("block", justify="right", overflow="fold")
        table.add_column("layer", overflow="fold", min_width=8)
        for key, heading in content.columns(analysis).items():
            table.add_column(self.text(_HEADINGS.get(key, heading), lines=True), justify="right", no_wrap=True)
        for row in rows:
            cells = [_cell(*cell, with_error=with_errors or not place) for place, cell in enumerate(row.cells)]
            block = f"*{row.block}" if row.similar else row.block
            table.add_row(*(self.text(words) for words in (block, row.short_name, *cells)))
        return table

    def pairs(self, title: str, pairs: list[tuple[str, str]]) -> None:
        """Labels and words under a title: what the letters of the table's blocks mean, derived readings."""
        if not pairs:
            return
        self.line("")
        if title:
            self.line(title, "bold")
        grid = Table.grid(padding=(0, 1))
        for name, words in pairs:
            grid.add_row(self.text(f"{name}:"), self.text(words))
        self.show(grid)

    def gaps(self, gaps: list[tuple[str, str]], title: str = "Not measured") -> None:
        self.line("")
        if not gaps:
            return
        self.line(title, "bold")
        grid = Table.grid(padding=(0, 1))
        grid.add_column()
        grid.add_column(overflow="fold")  # a path has no space to break at
        for what, why in gaps:
            grid.add_row("-", self.text(f"{what}: {why}"))
        self.show(grid)
        self.line("")


def _cell(value: float, error: float, with_error: bool) -> str:
    """A mean, with its standard error without the leading zero where there is room."""
    return content.with_error(value, error).replace("±0.", "±.") if with_error else content.decimal(value)
