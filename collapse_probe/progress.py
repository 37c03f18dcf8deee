"""Progress on stderr: images done, images per second, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from collapse_probe.words import neutral

#: Seconds over which the speed is averaged; a batch may take minutes.
_PERIOD = 1800


class ProgressBar:
    """A progress bar that an analysis can report to; silent when stderr is not a terminal or `quiet` is set."""

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
            disable=quiet or not (self._console.is_terminal or self._console.is_jupyter),
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
