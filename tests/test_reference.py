"""The reference says what the code says."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import write_reference  # noqa: E402

PINNED = dict(
    line.split(" ;")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


@pytest.mark.parametrize("name", write_reference.PAGES)
def test_the_reference_is_up_to_date(name: str) -> None:
    if name == "command_line.md" and importlib.metadata.version("typer") != PINNED["typer"]:
        pytest.skip("another version of typer may word its help in another way")
    text = write_reference.PAGES[name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run python tools/write_reference.py"


def test_it_covers_what_is_public() -> None:
    import collapse_probe
    from collapse_probe import conditions, metrics, plots

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in (*collapse_probe.__all__, *metrics.__all__, *plots.__all__, *conditions.__all__):
        assert f"### {name}\n" in text or f".{name}" in text, name
    commands = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    for name in ("analyze", "compare", "inspect", "merge", "metrics", "look", "models", "report", "track"):
        assert f"## `collapse-probe {name}`\n" in commands
    assert "-b, --batch-size" in commands
