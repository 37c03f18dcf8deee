"""What a command ends with: a sentence on stderr and an exit code, never a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from collapse_probe.errors import CollapseProbeError, ResourceError, is_out_of_memory
from collapse_probe.words import neutral

P = ParamSpec("P")


def with_exit_codes(command: Callable[P, None]) -> Callable[P, None]:
    """Map exceptions to the exit codes of `collapse_probe.errors`; 1 for what nobody foresaw, 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CollapseProbeError as error:
            print(f"Error: {neutral(str(error), lines=True)}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            from collapse_probe.cli.output import forget_reader

            forget_reader()
            raise typer.Exit(0) from None
        except Exception as error:
            if is_out_of_memory(error):
                print(f"Error: Out of memory: {str(error) or type(error).__name__}", file=sys.stderr)
                raise typer.Exit(ResourceError.exit_code) from None
            if os.environ.get("COLLAPSE_PROBE_DEBUG"):
                raise
            print(
                f"Internal error: {type(error).__name__}: {neutral(str(error), lines=True)}\n"
                "This is a bug in collapse_probe. Set COLLAPSE_PROBE_DEBUG=1 to see where it happened.",
                file=sys.stderr,
            )
            raise typer.Exit(1) from None

    return run
