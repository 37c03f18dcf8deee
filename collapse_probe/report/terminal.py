"""The summary that a terminal or a pipe receives: verdict first, then one table, the gaps, two lines of provenance.

Nothing here is parsed as rich markup, so that a layer called ``[red]`` stays a name, and control characters never reach
the terminal. Consoles whose encoding is not UTF-8 receive plain ASCII.
"""

from __future__ import annotations

from rich import box
from rich.console import Console, RenderableType
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from collapse_probe.report import content
from collapse_probe.result import Analysis, Finding

_STYLES = {"problem": "bold red", "warning": "bold yellow", "note": "bold blue", "ok": "bold green"}
_HEADINGS = {
    "similarity_to_previous": "M to\nprevious",
    "image_independent_to_previous": "image-\nindep.",
    "head_diversity": "head\ndivers.",
    "normalized_entropy": "entropy\n/ log K",
}
_FOOTNOTE = "± standard error over images  * similar to the previous block  – not defined"
_TABLE_WIDTH = 80
_ASCII = str.maketrans({"✗": "x", "✓": "+", "±": "+/-", "·": "|", "–": "-", "—": "-", "−": "-", "…": "...", "≥": ">="})


def print_summary(analysis: Analysis, console: Console) -> None:
    """Print the analysis for a human reader; everything fits 80 columns."""
    writer = _Writer(console)
    writer.line(content.headline(analysis), "bold")
    writer.findings(content.ordered(analysis.findings))
    writer.table(analysis)
    writer.groups(content.groups(analysis))
    writer.gaps(content.gaps(analysis))
    for label, line in content.origin(analysis):
        writer.line(f"{label}: {line}", "dim")


class _Writer:
    """Puts plain words on one console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.ascii_only = console.options.ascii_only

    def text(self, words: str, style: str = "") -> Text:
        """Words as they are: no markup, no emoji codes, no control characters."""
        words = "".join(character if character.isprintable() or character == "\n" else "?" for character in words)
        if self.ascii_only:
            words = words.translate(_ASCII).encode("ascii", "replace").decode("ascii")
        return Text(words, style)

    def show(self, what: RenderableType) -> None:
        self.console.print(what, soft_wrap=False, highlight=False)

    def line(self, words: str, style: str = "") -> None:
        self.show(self.text(words, style))

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

    def table(self, analysis: Analysis) -> None:
        rows = content.rows(analysis)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0), show_edge=False, header_style="bold")
        table.add_column("block", justify="right", overflow="fold")
        table.add_column("layer", overflow="fold", min_width=8)
        for key, heading in content.COLUMNS.items():
            table.add_column(self.text(_HEADINGS.get(key, heading)), justify="right", overflow="fold")
        for row in rows:
            (mean, error), *others = row.cells
            cells = [("*" if row.similar else "") + content.with_error(mean, error)]
            cells += [content.decimal(value) for value, _ in others]
            table.add_row(*(self.text(words) for words in (row.block, row.short_name, *cells)))
        self.line("")
        # A narrower console wraps long lines by itself; rich would shrink columns until digits are lost.
        options = self.console.options.update(width=max(self.console.width, _TABLE_WIDTH))
        self.console.print(Segments(self.console.render(table, options)), crop=False, end="")
        self.line(_FOOTNOTE, "dim")
        if elided := content.elided(rows):
            self.line(f"… stands for {elided}", "dim")

    def groups(self, groups: list[tuple[str, str]]) -> None:
        """What the letters of the table's blocks mean."""
        if not groups:
            return
        self.line("")
        self.line("Groups of comparable layers", "bold")
        grid = Table.grid(padding=(0, 1))
        for name, words in groups:
            grid.add_row(self.text(f"{name}:"), self.text(words))
        self.show(grid)

    def gaps(self, gaps: list[tuple[str, str]]) -> None:
        self.line("")
        if not gaps:
            return
        self.line("Not measured", "bold")
        grid = Table.grid(padding=(0, 1))
        for what, why in gaps:
            grid.add_row("-", self.text(f"{what}: {why}"))
        self.show(grid)
        self.line("")
