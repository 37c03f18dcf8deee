"""Progress below a notebook's cell: counts, speed, time left; notes stay, names are text, nothing else is left."""

from __future__ import annotations

from typing import Any

import pytest

from collapse_probe import progress
from collapse_probe.progress import NotebookBar, ProgressBar, own_bar

display = pytest.importorskip("IPython.display", reason="IPython is not installed")


class Cell:
    """What a notebook shows below a cell."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def display(self, what: Any, display_id: bool = False) -> Cell:
        assert display_id
        self.update(what)
        return self

    def update(self, what: Any) -> None:
        self.shown.append(what.data)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    found = Cell()
    monkeypatch.setattr(display, "display", found.display)
    monkeypatch.setattr(progress, "_REDRAWN", 0.0)
    return found


def test_it_counts_and_goes(cell: Cell) -> None:
    with NotebookBar() as bar:
        bar(8, 32)
        assert 'value="8" max="32"' in cell.shown[-1]
        assert "8 of 32 images" in cell.shown[-1]
        assert "left" in cell.shown[-1]
        bar(3, None)
        assert "<progress" not in cell.shown[-1]
        assert "3 images" in cell.shown[-1]
    assert cell.shown[-1] == ""


def test_notes_stay_and_are_text(cell: Cell) -> None:
    with NotebookBar() as bar:
        bar.note("<b>careful</b>\x1b[31m")
        bar(1, 2)
        assert "&lt;b&gt;careful" in cell.shown[-1]
    assert cell.shown[-1].startswith("&lt;b&gt;careful")
    assert "\x1b" not in cell.shown[-1]


def test_a_fast_loop_is_not_drawn_each_time(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REDRAWN", 1e9)
    with NotebookBar() as bar:
        for done in range(1, 100):
            bar(done, 100)
        assert len(cell.shown) <= 2
        bar(100, 100)
        assert "100 of 100" in cell.shown[-1]


def test_a_terminal_has_the_other_one() -> None:
    assert isinstance(own_bar(), ProgressBar)
