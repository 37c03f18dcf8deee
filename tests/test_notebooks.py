"""Every notebook runs from top to bottom, and is committed as it came out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
sys.path.insert(0, str(ROOT / "tools"))

MOST_BYTES = 700_000


def test_there_are_notebooks() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_outputs_and_small(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) or "text/html" in output.get("data", {})
               for cell in code for output in cell.outputs)  # fmt: skip
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    words = path.read_text(encoding="utf-8")
    assert str(ROOT) not in words
    assert "Traceback" not in words


@pytest.mark.sweep
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path) -> None:
    from run_notebooks import run

    fresh, kept = run(path), nbformat.read(path, as_version=4)
    for one, two in zip(fresh.cells, kept.cells, strict=True):
        assert one.source == two.source
        kinds = [sorted(output.get("data", {output.get("name"): ""})) for output in one.get("outputs", [])]
        assert kinds == [sorted(output.get("data", {output.get("name"): ""})) for output in two.get("outputs", [])]
