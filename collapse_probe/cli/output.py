"""Results on stdout, whoever reads them: a terminal, a file on a full disk, a pipe whose reader has left."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console

from collapse_probe.errors import OutputError


class PipeConsole(Console):
    """A console that leaves a broken pipe to its caller; rich would end the process with an exit code of its own."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Everything printed in the block has reached stdout when it ends.

    Raises:
        BrokenPipeError: nobody reads any more.
        OutputError: it cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # what is left in its buffer cannot be written at exit either
        raise OutputError(f"Cannot write to standard output: {error.strerror or error}.") from error
