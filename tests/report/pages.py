"""What tests of pages share."""

from __future__ import annotations

from collapse_probe.report import scripts


def without_scripts(page: str) -> str:
    """The page but for the two scripts that belong there, which are not made of anything from outside."""
    for script in (scripts.plotly(), scripts.page()):
        page = page.replace(f"<script>{script}</script>", "")
    return page
