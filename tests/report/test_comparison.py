"""Analyses side by side on a page and on a screen."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from collapse_probe.report import print_comparison, render_comparison, write_comparison
from collapse_probe.report.compared import NUMBERS, in_short, numbers
from tests.analysis_factory import all_nan, make_analysis, make_full

HOSTILE = "<script>alert(1)</script>[red]x[/red]\x1b[31m\"'& $\\frac$ $"


def _printed(sides, **options) -> str:
    stream = io.StringIO()
    print_comparison(sides, Console(file=stream, width=80, color_system=None, **options))
    return stream.getvalue()


def test_cells_are_mean_and_range_over_blocks() -> None:
    sides = {"one": make_full(make_analysis()), "two": make_analysis(5)}
    rows = dict(numbers(sides))
    for name, words in NUMBERS.items():
        for place, analysis in enumerate(sides.values()):
            if name in analysis.layers:
                values = [value for value in analysis.layers[name] if value == value]
                expected = f"{sum(values) / len(values):.2f} ({min(values):.2f}..{max(values):.2f})"
                assert rows[words][place] == expected.replace("-0.00", "0.00")
            else:
                assert rows[words][place] == "–"


def test_rows_that_no_analysis_has_are_left_out() -> None:
    sparse = make_analysis()
    sparse.layers = sparse.layers.drop(columns=[name for name in NUMBERS if name in sparse.layers][1:])
    assert len(numbers({"sparse": sparse})) <= 2
    assert "–" not in str(numbers({"sparse": sparse})[0])


def test_the_page_says_of_each_side_what_was_found() -> None:
    sides = {"plain": make_analysis(), "mixed": make_analysis(6)}
    page = render_comparison(sides, ["What to see.", "And more."], {"plain": "plain/report.html"})
    assert page.count('<article class="card">') == 2
    for finding in sides["plain"].findings:
        assert page.count(html.escape(finding.title)) == 2
        assert html.escape(finding.evidence) in page
    assert "What to see." in page
    assert page.count('<a href="plain/report.html">') == 1
    assert page.count("full report") == 1
    assert len(re.findall(r'<img src="data:image/png;base64,[^"]{1000,}" alt="[^"]{40,}"', page)) == 2
    assert not re.search(r'(src|href)="https?:', page)
    assert "<script" not in page


def test_the_page_appears_whole(tmp_path: Path) -> None:
    path = write_comparison({"only": make_analysis()}, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>")


def test_nothing_hostile_gets_through() -> None:
    analysis = make_analysis()
    analysis.provenance["model"]["architecture"] = HOSTILE
    page = render_comparison({HOSTILE: analysis}, [HOSTILE], {HOSTILE: HOSTILE})
    assert "<script>" not in page
    assert "\x1b" not in _printed({HOSTILE: analysis})
    assert "[red]x[/red]" in _printed({HOSTILE: analysis})


def test_the_screen_fits_80_columns_and_plain_ascii() -> None:
    sides = {
        "ViT": make_full(make_analysis()),
        "DeepViT": make_full(make_analysis()),
        "DeepViT, softmax underneath": make_full(make_analysis()),
    }
    for name in NUMBERS:
        for item in sides.values():
            if name in item.layers:
                item.layers[name] = np.linspace(-0.31, -0.11, len(item.layers))
    printed = _printed(sides)
    assert max(map(cell_len, printed.splitlines())) <= 80
    assert "(-0.31..-0.11)" in printed
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_comparison(sides, Console(file=ascii_only, width=80, color_system=None))


def test_an_analysis_without_readings_is_no_obstacle() -> None:
    empty = all_nan(make_analysis())
    empty.layers[[name for name in NUMBERS if name in empty.layers]] = np.nan
    assert in_short(empty) == "no readings"
    assert "no readings" in render_comparison({"empty": empty})
    assert _printed({"empty": empty})


def test_numbers_stay_whole_on_a_narrow_screen_and_paths_everywhere() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=30, color_system=None)
    print_comparison({"ViT": make_analysis(), "DeepViT": make_analysis()}, console, ["Written to " + "a/" * 40])
    assert re.search(r"\d\.\d\d \(\d\.\d\d\.\.\d\.\d\d\)", stream.getvalue())
    assert "a/" * 40 in stream.getvalue()


@pytest.mark.parametrize("layers", [1, 2])
def test_shallow_models(layers: int) -> None:
    assert render_comparison({"shallow": make_analysis(layers)})
