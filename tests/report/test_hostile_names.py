"""Names of files, layers and models are text: no markup, no escape sequence, no forged line, in none of the outputs."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from xml.dom import minidom

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from collapse_probe.cli.app import app
from collapse_probe.plots import Gallery, save_figures
from collapse_probe.progress import ProgressBar
from collapse_probe.report import print_summary, render_html, to_html
from collapse_probe.report.comparison import render_comparison
from collapse_probe.report.terminal import print_comparison
from collapse_probe.result import Analysis, Finding
from collapse_probe.words import neutral
from tests.analysis_factory import hierarchy, make_analysis, make_full, two_groups
from tests.report.pages import without_scripts

FORGED = "✓ OK nothing is wrong"
HOSTILE = f"<script>alert(1)</script>[bold red]x[/][link=a]]$\\frac$ _^\"'&:warning:\x1b[31m\x9b\a\r\n{FORGED}\n‮\udcff"
SHOWN = "<script>alert(1)</script>[bold red]x[/][link=a]]$\\frac$ _^\"'&:warning:�[31m����✓ OK nothing is wrong���"


def _hostile(analysis: Analysis) -> Analysis:
    """Everything that comes from outside is hostile."""
    names = {name: HOSTILE + str(name) for name in analysis.layers.index}
    analysis.layers.index = pd.Index(names.values())
    for owner in analysis.measured:
        owner.layers = [names[name] for name in owner.layers]
    for stream in analysis.streams:
        stream.blocks = [HOSTILE + name for name in stream.blocks]
    analysis.findings = [Finding(*[HOSTILE] * 7, (HOSTILE,))]
    analysis.not_captured = [{"layer": HOSTILE, "reason": HOSTILE}]
    analysis.absent = [{"metric": HOSTILE, "where": HOSTILE, "reason": HOSTILE}]
    analysis.provenance = {
        "model": {"architecture": HOSTILE, "source": HOSTILE, "weights": {"format": HOSTILE}, HOSTILE: HOSTILE},
        "images": {
            "kind": "folder", "count": 40, "root": HOSTILE, "skipped": [{"path": HOSTILE, "reason": HOSTILE}],
            "matches_model": [{"setting": HOSTILE, "model": HOSTILE, "used": HOSTILE}],
        },
        "top1": {"correct": 0, "labelled": 40, "accuracy": 0.0, "se": 0.0, "classes": 1000, "labels": HOSTILE},
        "device": HOSTILE,
        "command": HOSTILE,
    }  # fmt: skip
    return analysis


@pytest.fixture(params=[make_analysis, two_groups, hierarchy], ids=lambda make: make.__name__)
def analysis(request: pytest.FixtureRequest) -> Analysis:
    make: Callable[[], Analysis] = request.param
    return _hostile(make_full(make()))


def test_neutral_words() -> None:
    assert neutral(HOSTILE) == SHOWN
    assert neutral("a\nb\tc", lines=True) == "a\nb�c"
    assert neutral("日本 é – …") == "日本 é – …"
    assert neutral("") == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_terminal_shows_names_as_they_are(analysis: Analysis, encoding: str) -> None:
    for show in (print_summary, lambda item, console: print_comparison({HOSTILE: item}, console)):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
        show(analysis, Console(file=stream, width=4000))
        stream.flush()
        text = raw.getvalue().decode(encoding)
        assert not set("\x1b\x9b\a\r‮") & set(text)
        assert "<script>alert(1)</script>[bold red]x[/][link=a]]$\\frac$" in text
        assert ":warning:" in text
        assert not [line for line in text.splitlines() if line.lstrip().startswith(FORGED)]


def test_colours_are_the_summarys_own(analysis: Analysis) -> None:
    stream = io.StringIO()
    print_summary(analysis, Console(file=stream, width=4000, force_terminal=True, color_system="standard"))
    assert "\x1b[31mx" not in stream.getvalue()
    assert "[bold red]x[/]" in stream.getvalue()


def test_pages_hold_no_tag_and_no_control_character(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collapse_probe.plots.Gallery.render", lambda *_, **__: b"")
    monkeypatch.setattr("collapse_probe.plots.render", lambda *_, **__: b"")
    for page, data in ((without_scripts(render_html(analysis)), 1), (to_html(analysis), 0)):
        assert page.encode("utf-8")  # halves of surrogate pairs cannot be written
        assert page.count("<script") == page.count("</script") == data
        assert "\\udcff" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;[bold red]x[/]" in page
        assert not set("\x1b\x9b\a‮") & set(page)


def test_a_page_of_several_holds_none_either(analysis: Analysis) -> None:
    page = render_comparison({HOSTILE: analysis}, [HOSTILE], {HOSTILE: HOSTILE})
    assert page.encode("utf-8")
    assert "<script" not in page
    assert "\x1b" not in page


@pytest.mark.sweep
def test_figures_can_be_drawn_and_are_xml(analysis: Analysis, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of characters that no font has
        save_figures(Gallery(analysis), tmp_path, formats=["svg"])
    files = list(tmp_path.glob("*.svg"))
    assert files
    for file in files:
        minidom.parse(str(file))


def test_in_python_too(analysis: Analysis) -> None:
    assert repr(analysis).isprintable()
    assert str(analysis.findings[0]).isprintable()


def test_progress() -> None:
    stream = io.StringIO()
    ProgressBar(Console(file=stream, width=300)).note(HOSTILE)
    assert "[bold red]x[/][link=a]]" in stream.getvalue()
    assert not set("\x1b\x9b\a\r‮") & set(stream.getvalue())


def test_files_on_the_way_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collapse_probe.plots.save_figures", lambda *_: None)
    monkeypatch.setattr("collapse_probe.plots.Gallery.render", lambda *_, **__: b"")
    name = HOSTILE.replace("/", "").encode("utf-8", "surrogateescape")[:200]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("L", (8, 8), 20 * number).save(folder / f"{number}.png")
    (folder / (name + b".png").decode("utf-8", "surrogateescape")).write_bytes(b"no picture")
    words = ["analyze", "digits_vit_24b", "--images", str(folder), "--metrics", "attention_entropy"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 4
    assert len(refused.stderr.splitlines()) == 1
    assert "[bold red]x[]" in refused.stderr
    assert not set("\x1b\x9b\a\r") & set(refused.stderr)
    done = CliRunner().invoke(app, [*words, "--max-skipped", "0.5", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.stderr
    page = without_scripts((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert page.count("<script") == 1  # the data
    assert "&lt;script&gt;alert(1)&lt;script&gt;[bold red]x[]" in page
    assert not set("\x1b\x9b\a") & set(done.stdout + page)


@pytest.mark.parametrize("words", [["[bold red]x[/]\x1b[31m"], ["--images", "[red]\x1b[31m"], ["-m", "\x1b[31m[red]"]])
def test_errors(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["analyze", *words])
    assert done.exit_code in (2, 3, 4)
    assert "\x1b" not in done.stderr
    assert "red]" in done.stderr
