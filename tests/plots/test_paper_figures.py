"""Figures for a paper: every format, both widths, with and without titles, and words that can be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from collapse_probe import plots
from collapse_probe.errors import UsageError
from collapse_probe.look import Look
from collapse_probe.plots.gallery import FIGURES, Gallery
from collapse_probe.plots.save import figure_files
from collapse_probe.plots.sizes import WIDTHS, figure_width, fold, text_width
from collapse_probe.result import Analysis
from tests.analysis_factory import hierarchy, make_analysis, make_full
from tests.look_factory import make_look
from tests.plots.legibility import faults, words_of

ANALYSES: dict[str, Callable[[], Analysis]] = {
    "blocks": lambda: make_full(make_analysis()),
    "32 blocks": lambda: make_full(make_analysis(32, 12)),
    "stages and windows": lambda: make_full(hierarchy()),
}
LOOKS: dict[str, Callable[[], Look]] = {
    "class token": make_look,
    "registers": lambda: make_look(5, 4, (4, 4), prefix=5),
    "no class token, 24 layers": lambda: make_look(24, 2, (3, 6), prefix=0, class_token=False),
}
PICTURES: dict[str, Callable[[Look], tuple[Figure, Any]]] = {
    "attention_over_image": plots.attention_over_image,
    "attention_by_depth": plots.attention_by_depth,
    "rollout_by_depth": plots.rollout_by_depth,
    "column_by_depth": plots.column_by_depth,
}
#: What has a title of its own, and in a class of one axes; of the others, panels have headings.
TITLED = {
    "layer_similarity": "Similarity M",
    "adjacent_similarity": "Similarity to the previous block",
    "similarity_by_head": "Similarity to the previous block, by head",
    "similarity_by_token": "Similarity to the previous block, by key token",
}


@cache
def analysed(case: str) -> Analysis:
    return ANALYSES[case]()


def compared(count: int) -> dict[str, Analysis]:
    labels = ("ViT", "DeepViT", "DeepViT, softmax underneath")
    return {label: make_analysis(24 if "softmax" in label else 12) for label in labels[:count]}


#: Combinations for every day; all others are in the sweep.
FEW = [
    ("layer_similarity", "two-column", True),
    ("similarity_parts", "one-column", True),
    ("adjacent_similarity", "one-column", False),
    ("entropy_and_rank", "one-column", True),
    ("attention_over_image", "two-column", False),
    ("column_by_depth", "one-column", True),
]
EVERY = [(name, width, titles) for name, width, titles in product([*FIGURES, *PICTURES], WIDTHS, (True, False))]


def draw(name: str, case: str = "") -> Figure:
    if name in PICTURES:
        return PICTURES[name](LOOKS[case or "class token"]())[0]
    return FIGURES[name](analysed(case or "blocks"))[0]


def check(name: str, width: str, titles: bool) -> None:
    """In print resolution everything is legible; PNG, SVG and PDF have the width, and text is text."""
    with plots.figure_style(width, titles):
        figure = draw(name)
    figure.set_dpi(150)
    assert not faults(figure), faults(figure)
    title = TITLED.get(name)
    shown = [text.get_text().replace("\n", " ") for text, _ in words_of(figure)]
    if title is not None:
        assert (title in shown) == titles
    png, svg, pdf = (plots.render(figure, suffix, dpi=60) for suffix in ("png", "svg", "pdf"))
    assert png.startswith(b"\x89PNG")
    assert re.search(rb'<svg[^>]* width="(.*?)pt"', svg)[1] == f"{72 * WIDTHS[width]:g}".encode()  # type: ignore[index]
    assert max(shown, key=len).split()[0].encode() in svg
    assert b"<text" in svg
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf  # TrueType outlines, as fonttype 42 embeds them
    assert b"/Type3" not in pdf
    box = re.search(rb"/MediaBox \[ ?0 0 ([0-9.]+) ", pdf)
    assert float(box[1]) == pytest.approx(72 * WIDTHS[width], abs=0.5)  # type: ignore[index]


@pytest.mark.parametrize(("name", "width", "titles"), FEW)
def test_a_figure_is_ready_for_a_paper(name: str, width: str, titles: bool) -> None:
    check(name, width, titles)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "width", "titles"), sorted({*EVERY} - {*FEW}))
def test_every_figure_is_ready_for_a_paper(name: str, width: str, titles: bool) -> None:
    check(name, width, titles)


@pytest.mark.sweep
@pytest.mark.parametrize("width", [None, *WIDTHS])
@pytest.mark.parametrize(("name", "case"), [*product(FIGURES, [*ANALYSES][1:]), *product(PICTURES, [*LOOKS][1:])])
def test_awkward_figures_can_be_read(name: str, case: str, width: str | None) -> None:
    with plots.figure_style(width):
        figure = draw(name, case)
    figure.set_dpi(150)
    assert not faults(figure), faults(figure)


@pytest.mark.sweep
@pytest.mark.parametrize("width", [None, *WIDTHS])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("compare", [plots.heatmaps_compared, plots.curves_compared])
def test_comparisons_can_be_read(compare: Any, count: int, width: str | None) -> None:
    with plots.figure_style(width):
        figure, _ = compare(compared(count))
    figure.set_dpi(150)
    assert not faults(figure), faults(figure)


def test_faults_are_found() -> None:
    figure = Figure(figsize=(2, 1))
    figure.text(0.9, 0.5, "beyond the edge", fontsize=8)
    figure.text(0.1, 0.5, "one", fontsize=8)
    figure.text(0.12, 0.52, "other", fontsize=5)
    found = faults(figure)
    assert [words.partition("' ")[2] for words in found] == ["is cut", "has 5.0 pt", "touches 'other'"]


def test_numbers_on_cells_need_room() -> None:
    texts = {}
    for width in (None, *WIDTHS):
        with plots.figure_style(width):
            _, ax = plots.layer_similarity(make_analysis(12))
        texts[width] = [text.get_fontsize() for text in ax.texts]
    assert (len(texts[None]), len(texts["one-column"]), len(texts["two-column"])) == (144, 0, 144)
    assert min(texts[None] + texts["two-column"]) >= 6
    with plots.figure_style("one-column"):
        assert len(plots.layer_similarity(make_analysis(8))[1].texts) == 64


def test_styles_hold_within_their_block_and_nest() -> None:
    assert figure_width(4.6) == 4.6
    with plots.figure_style("one-column"):
        with plots.figure_style(titles=False):
            assert figure_width(4.6) == 3.25
            assert not plots.head_diversity(make_analysis())[1].get_title(loc="left")
        with plots.figure_style("two-column"):
            assert figure_width(4.6) == 6.75
        assert plots.head_diversity(make_analysis())[1].get_title(loc="left") == "Head diversity"
    assert figure_width(4.6) == 4.6
    with pytest.raises(UsageError, match="width='wide' is unknown; choose one of"), plots.figure_style("wide"):
        pass


def test_the_callers_axes_keep_their_size() -> None:
    figure = Figure(figsize=(9, 6))
    axes = figure.subplots(2, 2)
    with plots.figure_style("one-column"):
        drawn, used = plots.similarity_parts(make_analysis(), axes)
    assert drawn is figure
    assert list(used) == list(axes.flat)
    assert list(figure.get_size_inches()) == [9, 6]
    three = Figure().subplots(1, 3)
    _, used = plots.similarity_beside(make_full(make_analysis()), three)
    assert [ax.get_title(loc="left").split()[0] for ax in used] == ["Overlap", "Similarity", "CKA"]
    _, used = plots.heatmaps_compared(compared(3), ax=Figure().subplots(1, 3))
    assert [ax.get_title(loc="left").split()[0].rstrip(",") for ax in used] == ["ViT", "DeepViT", "DeepViT"]
    with pytest.raises(UsageError, match="ax has 3 axes; this figure needs 4"):
        plots.similarity_parts(make_analysis(), three)
    with pytest.raises(UsageError, match="ax has 3 axes; this figure needs 1"):
        plots.heatmaps_compared(compared(1), ax=three)


def test_files_of_a_width_without_titles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*FIGURES][2:]:
        monkeypatch.delitem(FIGURES, name)
    paths = plots.save_figures(make_analysis(2), tmp_path, formats=("png", "pdf"), width="one-column", titles=False)
    assert {path.suffix for path in paths} == {".png", ".pdf"}
    assert all(Image.open(path).width == 3.25 * 240 for path in paths if path.suffix == ".png")
    with pytest.raises(UsageError, match="width='half' is unknown"):
        plots.save_figures(make_analysis(2), tmp_path, width="half")
    with pytest.raises(UsageError, match="give them to Gallery"):
        plots.save_figures(Gallery(make_analysis(2)), tmp_path, titles=False)


def test_pdf_is_written_on_request_only() -> None:
    assert {Path(name).suffix for name in figure_files()} == {".png", ".svg"}


def test_folded_words_fit_and_stay_whole() -> None:
    words = "How much each output draws from this token; means over heads"
    for inches in (0.5, 1.0, 2.0, 9.0):
        lines = fold(words, inches, 8).split("\n")
        assert " ".join(lines) == words
        assert all(text_width(line, 8) <= inches or " " not in line for line in lines)
    assert fold(words, 9, 8) == words
    assert text_width("wide", 16) == pytest.approx(2 * text_width("wide", 8))
    assert np.isclose(text_width("wide" * 3, 8), 3 * text_width("wide", 8), rtol=0.1)
