"""A series on a page and on a screen."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from collapse_probe.report import print_series, render_track, write_track
from collapse_probe.report.tracking import COLUMNS, MOST_FRAMES, columns, gravest, origins, rows, verdict_in_short
from collapse_probe.result import Finding
from collapse_probe.series import Point, Series
from tests.analysis_factory import all_nan, make_analysis, make_full

HOSTILE = "<script>alert(1)</script></script><img src=x onerror=alert(1)>[red]x[/red]\x1b[31m\"'& {{ 7*7 }} $\\frac$ $"


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures, which take long to draw."""
    for name in ("over_steps", "heatmaps_over_steps", "heatmap_at"):
        monkeypatch.setattr(f"collapse_probe.report.tracking.{name}", lambda *_: (None, None))
    monkeypatch.setattr("collapse_probe.report.tracking.render", lambda *_args, **_options: b"png")


def _series(count: int = 3, layers: int = 4) -> Series:
    return Series.from_analyses({500 * number: make_analysis(layers) for number in range(count)})


def _printed(series: Series, width: int = 80, **options) -> str:
    stream = io.StringIO()
    print_series(series, Console(file=stream, width=width, color_system=None, **options), ["Written to " + "a/" * 50])
    return stream.getvalue()


def _hostile() -> Series:
    """Everything that comes from outside is hostile."""
    analysis = make_analysis(3)
    analysis.provenance["model"]["architecture"] = HOSTILE
    analysis.provenance["top1"] = {
        "correct": 1,
        "labelled": 2,
        "accuracy": 0.5,
        "se": 0.1,
        "classes": 5,
        "labels": HOSTILE,
    }
    analysis.findings = [Finding(HOSTILE, "warning", *[HOSTILE] * 5, (HOSTILE,))]
    points = [Point(number, analysis, f"{HOSTILE}{number}", HOSTILE, HOSTILE, HOSTILE) for number in (1, 2)]
    skipped = [{"path": HOSTILE, "reason": HOSTILE}]
    return Series(points, "step", skipped, {"options": {HOSTILE: HOSTILE}, "command": HOSTILE})


class _Page(HTMLParser):
    """Tags with their attributes, and the text of scripts, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_admits_its_own_script_and_nothing_else() -> None:
    page = _Page(render_track(_series()))
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert page.all("script") == [{}]
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all((attributes.get(name) or "data:image/png").startswith("data:image/png") for name in ("src", "href"))


def test_pictures_lie_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sources = [str(image["src"]) for image in _Page(render_track(_series(2))).all("img")]
    assert len(set(sources)) == 4
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert min(picture.size) > 400


def test_a_frame_for_each_step_that_is_hidden_until_the_script_runs() -> None:
    page = _Page(render_track(_series(5)))
    frames = [image for image in page.all("img") if "data-title" in image]
    assert [frame["data-title"] for frame in frames] == [f"Step {500 * number}" for number in range(5)]
    assert all("hidden" in frame and len(frame["alt"] or "") > 40 for frame in frames)
    assert [figure["id"] for figure in page.all("figure") if "hidden" in figure] == ["slider"]
    (slider,) = page.all("input")
    assert (slider["type"], slider["min"], slider["max"], slider["id"]) == ("range", "0", "4", "step")
    assert [label["for"] for label in page.all("label")] == ["step"]
    shown = [image for image in page.all("img") if "hidden" not in image]
    assert len(shown) == 2  # curves and heatmaps, with or without a script
    assert all(len(image["alt"] or "") > 40 for image in shown)


def test_one_checkpoint_needs_no_slider() -> None:
    page = _Page(render_track(_series(1)))
    assert not page.all("input")
    assert len(page.all("img")) == 2


def test_many_checkpoints_share_the_frames() -> None:
    text = render_track(_series(MOST_FRAMES + 20, layers=2))
    assert len([image for image in _Page(text).all("img") if "data-title" in image]) == MOST_FRAMES
    assert f"{MOST_FRAMES} of {MOST_FRAMES + 20} checkpoints, evenly spaced." in text
    assert "68 checkpoints between those shown are left out here." in text


def test_the_page_says_what_was_found_when() -> None:
    series = _series()
    series.skipped = [{"path": "bad.pt", "reason": "bad.pt is empty."}]
    series.provenance = {"options": {"seed": 7, "device": "cpu"}, "command": "collapse-probe track 'a b.pt'"}
    text = render_track(series, {"step 500": "checkpoints/step_500/report.html"})
    assert text.count(html.escape(series.points[0].analysis.findings[0].title)) == 3
    assert series.points[0].analysis.findings[1].title not in text  # all is well with the heads
    assert text.count('<a href="checkpoints/step_500/report.html">full report</a>') == 1
    assert "bad.pt is empty." in text
    assert html.escape("collapse-probe track 'a b.pt'", quote=False) in html.unescape(text)
    for row in rows(series):
        assert all(f"<td>{cell}</td>" in text for cell in row.cells)


def test_cells_are_means_over_blocks() -> None:
    series = _series()
    for row, analysis in zip(rows(series), series.analyses.values(), strict=True):
        assert row.cells == tuple(f"{analysis.layers[name].mean():.2f}" for name in COLUMNS)
    full = Series.from_analyses({1: make_full(make_analysis())})
    assert rows(full)[0].similar == "2"
    sparse = Series.from_analyses({1: all_nan(make_analysis(), "centred")})
    assert "centred_to_previous" not in columns(sparse)


def test_the_gravest_finding_in_short() -> None:
    analysis = make_analysis()
    found = [
        Finding(code, severity, *[""] * 5)
        for code, severity in (("n", "note"), ("w", "warning"), ("o", "ok"), ("p", "problem"))
    ]
    for kept, expected in (
        (4, ("problem", "✗ p +1")),
        (3, ("warning", "! w")),
        (1, ("note", "i n")),
        (0, ("", "none")),
    ):
        analysis.findings = found[:kept]
        assert verdict_in_short(rows(Series.from_analyses({1: analysis}))[0]) == expected
    analysis.findings = [found[0], found[2]]
    assert [item.code for item in gravest(analysis)] == ["o"]


def test_how_steps_are_known() -> None:
    analysis = make_analysis(2)
    known = ["stated as epoch"] * 5 + ["number in its name"]
    points = [Point(number, analysis, f"c{number}", words) for number, words in enumerate(known)]
    assert origins(Series(points)) == ["stated as epoch (c0, c1, c2 and 2 more)", "number in its name (c5)"]
    assert origins(Series(points[:5])) == ["stated as epoch (all)"]


def test_nothing_hostile_gets_through() -> None:
    text = render_track(_hostile(), {f"{HOSTILE}1": HOSTILE})
    page = _Page(text)
    assert len(page.all("script")) == 1
    assert "alert" not in "".join(page.scripts)
    assert not any("onerror" in image or image.get("src") == "x" for image in page.all("img"))
    assert "\x1b" not in text
    assert "{{ 7*7 }}" in html.unescape(text)
    printed = _printed(_hostile())
    assert "\x1b" not in printed
    assert "[red]x[/red]" in printed


def test_the_page_appears_whole(tmp_path: Path) -> None:
    path = write_track(_series(2), tmp_path / "new" / "track.html")
    assert path.read_text(encoding="utf-8").endswith("</html>")


def test_pictures_that_were_drawn_are_not_drawn_again() -> None:
    text = render_track(_series(2), pictures={"over_steps": b"curves", "heatmaps_over_steps": b"maps"})
    for name in (b"curves", b"maps"):
        assert base64.b64encode(name).decode() in text


def test_the_screen_fits_80_columns_and_plain_ascii() -> None:
    series = Series.from_analyses({10**7 + number: make_full(make_analysis()) for number in range(3)})
    for analysis in series.analyses.values():
        analysis.provenance["top1"] = {"accuracy": 1.0}
        analysis.findings = [Finding("large-prefix-tokens", "problem", *[""] * 5)] * 3
        for name in COLUMNS:
            analysis.layers[name] = -0.314
    series.skipped = [{"path": "/a/long/path/" * 8 + "bad.pt", "reason": "It is empty."}]
    printed = _printed(series)
    lines = [line for line in printed.splitlines() if not line.startswith("Written to")]
    assert max(map(cell_len, lines)) <= 80
    assert "10000002" in printed
    assert len(re.findall(r"-0\.31", printed)) == 3 * len(COLUMNS)
    assert "a/" * 50 in printed
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_series(series, Console(file=ascii_only, width=80, color_system=None))


@pytest.mark.parametrize("layers", [1, 2])
def test_shallow_models(layers: int) -> None:
    series = _series(2, layers)
    assert render_track(series)
    assert _printed(series)
