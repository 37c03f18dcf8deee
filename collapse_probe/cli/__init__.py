"""The command line: parse, call the analysis, turn exceptions into sentences and exit codes; torch loads late."""

from collapse_probe.cli.app import main

__all__ = ["main"]
