"""From figures and templates to HTML: one jinja2 environment, escaping everything, and pictures as data URIs."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from collapse_probe.report import content
from collapse_probe.words import neutral


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("collapse_probe", "report"),
        autoescape=True,  # by content, not by file name: select_autoescape does not know ".jinja"
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """Control characters and halves of surrogate pairs have no place on a page; escaping leaves them in."""
    return neutral(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value


def fill(template: str, **values: Any) -> str:
    """A template of this package with escaped values put in; :mod:`content` is at hand as ``content``."""
    return _environment().get_template(template).render(content=content, **values)


def data_uri(png: bytes) -> str:
    """A PNG inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
