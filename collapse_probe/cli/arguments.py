"""Words of the command line as Python values."""

from __future__ import annotations

import json
from typing import Any

from collapse_probe.errors import UsageError


def keyword_arguments(pairs: list[str]) -> dict[str, Any]:
    """`name=value` words as keyword arguments; values are JSON where they can be, otherwise text."""
    arguments = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name.isidentifier():
            raise UsageError(f"--model-kwargs {pair!r} is not of the form name=value.")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return arguments


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """A list of numbers such as ``.5,.5,.5``; None where the option is not given."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers such as .5,.5,.5.") from None
