"""Progress: images done, images per second, time left; on stderr, or below the cell of a notebook."""

from __future__ import annotations

import html
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from collapse_probe.words import neutral

#: Seconds over which the speed is averaged; a batch may take minutes.
_PERIOD = 1800


class ProgressBar:
    """A progress bar in a terminal that an analysis can report to; silent elsewhere, or where `quiet` is set."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self._console, self._quiet = console or Console(stderr=True), quiet
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            speed_estimate_period=_PERIOD,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("loading", total=None, speed="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int | None) -> None:
        speed = self._progress.tasks[0].speed
        self._progress.update(
            self._task, description="images", completed=done, total=total, speed=f"{speed:.1f}/s" if speed else ""
        )

    def note(self, text: str) -> None:
        """A line above the bar; part of the progress, not of the result."""
        if not self._quiet:
            self._console.print(Text(neutral(text, lines=True)), soft_wrap=True, highlight=False)


class NotebookBar:
    """The same below a notebook's cell, with the browser's own bar; gone when the work is done.

    It needs no widgets, so that it is the same in Jupyter, VS Code and Colab. Notes are kept below the cell.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._notes: list[str] = []
        self._begun = self._last = 0.0

    def __enter__(self) -> NotebookBar:
        from IPython.display import HTML, display

        self._begun = time.perf_counter()
        self._handle = display(HTML("loading…"), display_id=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show("")

    def __call__(self, done: int, total: int | None) -> None:
        now = time.perf_counter()
        if now - self._last < _REDRAWN and done != total:
            return
        self._last, pace = now, done / max(now - self._begun, 1e-9)
        left = f", {_minutes((total - done) / pace)} left" if total and done else ""
        bar = f'<progress value="{done}" max="{total}"></progress> ' if total else ""
        self._show(f"{bar}{done}{f' of {total}' if total else ''} images, {pace:.1f}/s{left}")

    def note(self, text: str) -> None:
        self._notes.append(html.escape(neutral(text, lines=True)))
        self._show("")

    def _show(self, bar: str) -> None:
        from IPython.display import HTML

        if self._handle is not None:
            self._handle.update(HTML("<br>".join([*self._notes, bar] if bar else self._notes)))


#: Seconds between two pictures of a notebook's bar.
_REDRAWN = 0.2


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def own_bar() -> ProgressBar | NotebookBar:
    """A bar that suits where this runs."""
    return NotebookBar() if Console(stderr=True).is_jupyter else ProgressBar()
