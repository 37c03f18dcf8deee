"""The scripts of an interactive page: Plotly and our own, inside the page, and the only ones that may run there."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any

from markupsafe import Markup

from collapse_probe.words import neutral


@cache
def plotly() -> Markup:
    """Plotly as its authors bundle it, from the installed package."""
    from plotly.offline import get_plotlyjs

    return _inline(get_plotlyjs())


@cache
def page() -> Markup:
    """What draws and connects the charts of a page."""
    return _inline(resources.files("collapse_probe.report").joinpath("page.js").read_text(encoding="utf-8"))


def policy() -> str:
    """A content security policy under which the page can load nothing, and run nothing but these two scripts."""
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in (plotly(), page()))
    return f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}"


def as_data(value: Any) -> Markup:
    """Plain data as JSON that may stand between script tags, whatever the strings in it hold."""
    words = json.dumps(_neutral(value), allow_nan=False, separators=(",", ":"))
    return Markup(words.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"))


def _neutral(value: Any) -> Any:
    """The same with words that can be shown anywhere."""
    if isinstance(value, dict):
        return {key: _neutral(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_neutral(item) for item in value]
    return neutral(value) if isinstance(value, str) else value


def _inline(source: str) -> Markup:
    """A script as it stands in a page. Browsers hash it with line feeds only, and it ends at the first closing tag."""
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    assert "</script" not in source.lower()
    return Markup(source)


def _digest(script: Markup) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
