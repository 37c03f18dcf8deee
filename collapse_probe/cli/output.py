"""Results on stdout, whoever reads them: a terminal, a file on a full disk, a pipe whose reader has left."""

from __future__ import annotations

import contextlib
import os
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


@contextlib.contextmanager
def whether_or_not_read() -> Iterator[None]:
    """What comes after the block happens also where nobody reads stdout any more."""
    try:
        yield
    except BrokenPipeError:
        forget_reader()


def forget_reader() -> None:
    """Point stdout elsewhere once its reader has left, so that the interpreter's last flush does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
