"""The report in a real browser: no requests, no errors; hover, click and keys do as told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collapse_probe.report import write_report
from collapse_probe.result import Analysis
from tests.analysis_factory import hierarchy, make_analysis, make_full, two_groups

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

HOSTILE = "<img src=x onerror=alert(1)><b>bold</b>&amp;</script>"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


class Opened:
    """A report in a tab, with everything that it complained of or asked for."""

    def __init__(self, browser: Any, analysis: Analysis, folder: Path, **settings: Any) -> None:
        path = write_report(analysis, folder / "report.html")
        self.tab = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **settings})
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.trouble.append(message.text))
        self.tab.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.trouble.append(f"dialog: {dialog.message}"))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("html.drawn", state="attached")

    def said(self, name: str) -> str:
        return str(self.tab.text_content(f"#{name}"))

    def square(self, row: int, column: int) -> tuple[float, float]:
        """Where a square of the heatmap lies in the window."""
        self.tab.locator("#explorer-heatmap").scroll_into_view_if_needed()
        place = self.tab.evaluate(
            """([row, column]) => {
                const plot = document.getElementById("explorer-heatmap");
                const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
                return [box.left + xaxis._offset + xaxis.d2p(column), box.top + yaxis._offset + yaxis.d2p(row)];
            }""",
            [row, column],
        )
        return place[0], place[1]


OTHERS = [two_groups, hierarchy, lambda: make_analysis(1)]


@pytest.mark.parametrize("make", [make_analysis, *(pytest.param(make, marks=pytest.mark.sweep) for make in OTHERS)])
@pytest.mark.parametrize("width", [1200, 390])
def test_pages_load_without_trouble_or_requests(browser: Any, tmp_path: Path, make: Any, width: int) -> None:
    page = Opened(browser, make_full(make()), tmp_path, viewport={"width": width, "height": 800})
    assert page.trouble == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.tab.locator("[data-chart] .main-svg").count() > 0
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    page.tab.close()


def test_hover_names_the_pair_with_its_error(browser: Any, tmp_path: Path) -> None:
    analysis = make_analysis()
    page = Opened(browser, analysis, tmp_path)
    page.tab.mouse.move(*page.square(4, 7))
    words = page.tab.text_content("#explorer-heatmap .hoverlayer")
    matrices = analysis.main_group.matrices["all"]
    assert "blocks.4.attn" in words
    assert "blocks.7.attn" in words
    assert f"{matrices['similarity'][4, 7]:.3f} ± {matrices['similarity_se'][4, 7]:.3f}" in words
    page.tab.close()


def test_a_click_shows_the_pair_by_head_and_token(browser: Any, tmp_path: Path) -> None:
    analysis = make_analysis()
    group = analysis.main_group
    page = Opened(browser, analysis, tmp_path)
    page.tab.mouse.click(*page.square(2, 9))
    assert page.said("explorer-pair") == "blocks.2.attn and blocks.9.attn"
    assert f"{group.matrices['all']['similarity'][2, 9]:.3f}" in page.said("explorer-said")
    assert f"{group.matrices['prefix']['similarity'][2, 9]:.3f}" in page.said("explorer-readings")
    heads = page.tab.evaluate("document.getElementById('explorer-heads').data[0].y")
    assert heads == pytest.approx(group.arrays["similarity_by_head"][2, 9].tolist(), abs=0.004)
    tokens = page.tab.evaluate("document.getElementById('explorer-tokens').data[0].z.flat()")
    assert tokens == pytest.approx(group.arrays["similarity_by_token"][2, 9, 1:].tolist(), abs=0.004)
    assert page.trouble == []
    page.tab.close()


@pytest.mark.sweep
def test_keys_and_lists_choose_as_the_mouse_does(browser: Any, tmp_path: Path) -> None:
    page = Opened(browser, make_analysis(), tmp_path)
    page.tab.select_option("#explorer-first", "3")
    page.tab.select_option("#explorer-second", "5")
    assert page.said("explorer-pair") == "blocks.3.attn and blocks.5.attn"
    page.tab.focus("#explorer-heatmap")
    page.tab.keyboard.press("ArrowUp")
    page.tab.keyboard.press("ArrowRight")
    assert page.said("explorer-pair") == "blocks.2.attn and blocks.6.attn"
    assert page.tab.input_value("#explorer-second") == "6"
    for _ in range(20):
        page.tab.keyboard.press("ArrowRight")
    assert page.said("explorer-pair") == "blocks.2.attn and blocks.11.attn"
    page.tab.close()


@pytest.mark.sweep
def test_readings_and_parts_are_switched(browser: Any, tmp_path: Path) -> None:
    analysis = make_full(make_analysis())
    page = Opened(browser, analysis, tmp_path)

    def shown() -> float:
        return float(page.tab.evaluate("document.getElementById('explorer-heatmap').data[0].z[3][8]"))

    matrices = analysis.main_group.matrices
    assert shown() == pytest.approx(matrices["all"]["similarity"][3, 8], rel=1e-3)
    page.tab.check("input[name=reading][value=excess]")
    assert shown() == pytest.approx(matrices["all"]["excess"][3, 8], rel=1e-3)
    page.tab.check("input[name=part][value=prefix]")
    assert shown() == pytest.approx(matrices["prefix"]["excess"][3, 8], rel=1e-3)
    page.tab.check("input[name=reading][value=cka]")
    assert "no part by key token" in page.said("explorer-note")
    page.tab.close()


@pytest.mark.sweep
def test_layers_of_two_groups_are_not_compared(browser: Any, tmp_path: Path) -> None:
    page = Opened(browser, two_groups(), tmp_path)
    page.tab.select_option("#explorer-first", "2")
    page.tab.select_option("#explorer-second", "11")
    assert "cannot be compared" in page.said("explorer-why")
    assert not page.tab.is_visible("#explorer-heads")
    assert page.trouble == []
    page.tab.close()


def test_names_from_outside_stay_text(browser: Any, tmp_path: Path) -> None:
    analysis = make_analysis(4)
    names = [f"{HOSTILE}{layer}" for layer in range(4)]
    analysis.layers.index = names
    analysis.main_group.layers = names
    page = Opened(browser, analysis, tmp_path)
    page.tab.mouse.click(*page.square(0, 2))
    assert page.said("explorer-pair") == f"{names[0]} and {names[2]}"
    assert HOSTILE in page.tab.text_content("#explorer-heatmap .hoverlayer")
    assert page.tab.locator("img[src=x]").count() == 0
    assert page.trouble == []
    page.tab.close()


@pytest.mark.sweep
def test_the_dark_and_paper_have_colours_of_their_own(browser: Any, tmp_path: Path) -> None:
    page = Opened(browser, make_analysis(), tmp_path, color_scheme="dark")

    def ink() -> str:
        return str(page.tab.evaluate("document.querySelector('[data-chart]').layout.font.color"))

    assert ink() == "#e9e9e6"
    page.tab.emulate_media(color_scheme="light")
    page.tab.wait_for_timeout(500)  # the policy of the page forbids to wait for an expression
    assert ink() == "#1c1c1a"
    page.tab.emulate_media(color_scheme="dark")
    page.tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert ink() == "#000"
    page.tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert ink() == "#e9e9e6"
    page.tab.close()


def test_deep_models_stay_small(tmp_path: Path) -> None:
    path = write_report(make_full(make_analysis(32, 16, (37, 37), 5)), tmp_path / "report.html")
    assert path.stat().st_size < 10e6
