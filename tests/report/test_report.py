"""Three renderers, one content: the verdict leads, nothing is lost, nothing hostile gets through."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len
from rich.console import Console

from collapse_probe.errors import OutputError
from collapse_probe.plots import Gallery
from collapse_probe.readings import FAMILIES, READINGS
from collapse_probe.report import content, print_summary, render_html, to_html, write_report
from collapse_probe.report.charts import sections
from collapse_probe.report.figures import hero, hero_name
from collapse_probe.report.scripts import page as page_script
from collapse_probe.report.scripts import plotly
from collapse_probe.result import Analysis, Finding
from tests.analysis_factory import all_nan, hierarchy, make_analysis, make_full, two_groups

HOSTILE = "<script>alert(1)</script>[red]x[/red]:warning:\x1b[31m\"'&"


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(make_analysis())


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time; where they are not what is tested, a constant stands for them."""
    monkeypatch.setattr("collapse_probe.plots.Gallery.render", lambda *_, **__: b"")
    monkeypatch.setattr("collapse_probe.plots.render", lambda *_, **__: b"")


# -- the words they share ---------------------------------------------------------------------------------------------


def test_findings_stand_gravest_first_and_keep_their_order() -> None:
    severities = ("ok", "note", "problem", "warning", "problem")
    given = [_finding(title, severity) for title, severity in zip("abcde", severities, strict=True)]
    assert [finding.title for finding in content.ordered(given)] == ["c", "e", "d", "a", "b"]


def test_numbers_and_their_errors() -> None:
    assert content.with_error(0.12345, 0.0123) == "0.123±0.012"
    assert content.with_error(0.5, 0.0001) == "0.500±<.001"
    assert content.with_error(0.5, 0.0) == "0.500±0.000"
    assert content.with_error(0.5, float("nan")) == "0.500"
    assert content.with_error(float("nan"), 0.1) == "–"
    assert content.decimal(-0.0001) == "0.000"


def test_rows_hold_the_table() -> None:
    analysis = make_analysis()
    rows = content.rows(analysis)
    for row, (name, record) in zip(rows, analysis.layers.iterrows(), strict=True):
        assert row.layer == name
        assert [mean for mean, _ in row.cells] == pytest.approx([record[key] for key in content.COLUMNS], nan_ok=True)
        errors = [error for _, error in row.cells]
        assert errors == pytest.approx([record[f"{key}_se"] for key in content.COLUMNS], nan_ok=True)
    assert [row.similar for row in rows] == [value > 0.75 for value in analysis.layers["similarity_to_previous"]]
    assert [row.block for row in rows] == [str(i) for i in range(12)]
    assert [row.block for row in content.rows(two_groups())][-3:] == ["A9", "B0", "B1"]


def test_long_shared_prefixes_are_left_out_and_explained() -> None:
    analysis = _renamed(make_analysis(), "vision_model.encoder.layers.{}.self_attn")
    rows = content.rows(analysis)
    assert [row.short_name for row in rows] == [f"…{i}.self_attn" for i in range(12)]
    assert content.elided(rows) == "vision_model.encoder.layers."
    assert content.elided(content.rows(make_analysis())) == ""


def test_gaps_say_what_is_missing_and_why() -> None:
    assert content.gaps(make_analysis()) == []
    analysis = all_nan(make_analysis(), "centred")
    analysis.not_captured = [{"layer": f"decoder.{i}", "reason": "dropout in a fused kernel"} for i in range(7)]
    analysis.layers["zero_columns"] = 2
    gaps = dict(content.gaps(analysis))
    assert gaps["decoder.0, decoder.1, decoder.2 and 4 more"] == "dropout in a fused kernel"
    assert "vary over the queries" in gaps["centred"]
    assert any(what.startswith("24 attention columns") for what in gaps)
    assert [what for what, _ in content.gaps(make_analysis(1))] == ["Every comparison with a previous block"]
    assert content.gaps(two_groups())[0][0] == "Similarity across groups"


def test_layers_that_stand_alone_are_named() -> None:
    gaps = dict(content.gaps(hierarchy()))
    alone = "Any similarity to another layer of layers.0.blocks.0.attn, layers.0.blocks.1.attn"
    assert gaps[alone] == "no other is in their group"
    assert not any("Any similarity" in what for what, _ in content.gaps(two_groups()))


def test_layers_with_masks_are_named() -> None:
    analysis = hierarchy()
    analysis.layers["entropy"] = analysis.layers["normalized_entropy"] * np.log(100)
    assert not any("mask" in what for what, _ in content.gaps(analysis))
    layer = "layers.1.blocks.1.attn"
    analysis.layers.loc[layer, "entropy"] = analysis.layers.loc[layer, "normalized_entropy"] * np.log(50)
    what, why = content.gaps(analysis)[-1]
    assert what == f"r and centred similarity without the mask in {layer}"
    assert "zeros" in why


def test_groups_are_told_in_words() -> None:
    assert content.groups(make_analysis()) == []
    assert content.groups(two_groups()) == [
        ("A", "10 layers, token, 196 tokens, in blocks"),
        ("B", "2 layers, class, 1 query and 197 keys, in blocks_token_only"),
    ]
    words = dict(content.groups(hierarchy()))
    assert words["B"] == "1 layer, window (shifted), 16 windows of 100 tokens: layers.0.blocks.1.attn"
    assert words["C"] == "3 layers, window, 4 windows of 100 tokens, in layers.1.blocks"


def test_entropy_missing_after_re_attention_is_explained() -> None:
    analysis = make_analysis()
    analysis.layers["is_probability"] = [i > 0 for i in range(12)]
    analysis.layers.loc["blocks.0.attn", "normalized_entropy"] = np.nan
    assert content.gaps(analysis) == [
        ("entropy of blocks.0.attn", "rows of these maps are not probabilities (mixed after the softmax)")
    ]


def test_random_weights_are_called_random() -> None:
    analysis = make_analysis()
    analysis.provenance["model"] = {"architecture": "vit", "weights": {"random": True}}
    assert "random weights" in dict(content.origin(analysis))["model"]


@pytest.mark.usefixtures("no_pictures")
def test_what_a_verification_proved_stands_beside_the_run() -> None:
    analysis = make_analysis()
    assert "verified" not in dict(content.origin(analysis))
    proof = {"passed": True, "kernels": 14, "captured": 12, "named": 2, "failures": [], "largest_error": 6.6e-7}
    analysis.provenance["verification"] = {**proof, "errors": {"blocks.0.attn": 6.6e-7}}
    said = "12 of 14 softmaxes and attention kernels are in maps, 2 named with a reason; maps times values agree"
    assert dict(content.origin(analysis))["verified"] == f"{said} with the model to 7e-07"
    assert said in " ".join(_printed(analysis).split())
    assert said in _Parsed(render_html(analysis)).text
    assert not any("blocks.0.attn" in key for key, _ in content.provenance_rows(analysis))
    analysis.provenance["verification"]["failures"] = ["blocks.0.attn: wrong"]
    assert dict(content.origin(analysis))["verified"].startswith("FAILED: blocks.0.attn: wrong")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("provenance", [{}, {"model": None, "images": 3}, {"model": {"weights": "x"}, "seconds": "?"}])
def test_thin_provenance_is_no_obstacle(provenance: dict[str, object]) -> None:
    analysis = make_analysis(2)
    analysis.provenance = provenance
    assert _printed(analysis)
    assert "Attention collapse" in render_html(analysis)
    assert to_html(analysis)


# -- terminal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_leads_with_the_verdict_and_fits(width: int) -> None:
    analysis = _renamed(make_analysis(), "vision_model.encoder.layers.{}.self_attn")
    lines = _printed(analysis, width).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert lines[2].startswith("! WARNING Attention of 2 of 11 blocks repeats")
    assert text.index("WARNING") < text.index("OK") < text.index("previous") < text.index("model:")
    for row in content.rows(analysis):
        line = next(line for line in lines if f" {row.short_name} " in line)
        for mean, _ in row.cells:
            assert content.decimal(mean) in line
    assert [line.split()[0] for line in lines if line.lstrip().startswith("*")] == ["*10", "*11"]
    assert "\x1b" not in text


def test_the_summary_tells_the_groups() -> None:
    lines = _printed(hierarchy()).splitlines()
    assert max(cell_len(line) for line in lines) <= 80
    assert "C: 3 layers, window, 4 windows of 100 tokens, in layers.1.blocks" in [line.rstrip() for line in lines]
    blocks = [line.split()[0] for line in lines if "blocks." in line and line.split()[0][-1].isdigit()]
    assert blocks == ["A0", "B0", "C0", "D0", "C1", "D1", "C2", "D2", "E0", "E1"]
    assert "Groups of" not in _printed(make_analysis())


def test_the_summary_is_plain_ascii_where_the_console_is() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252", errors="strict")
    print_summary(_hostile(), Console(file=stream, width=80))
    stream.flush()
    assert raw.getvalue().isascii()
    assert b"+/-" in raw.getvalue()


def test_hostile_names_stay_text_in_the_terminal() -> None:
    text = _printed(_hostile(), 200, colour=True)
    assert "[red]x[/red]:warning:�[31m" in text
    assert "\x1b[31m\"'" not in text


@pytest.mark.parametrize("width", [30, 60])
def test_a_narrow_console_loses_no_digit(width: int) -> None:
    printed = _printed(make_analysis(), width)
    for row in content.rows(make_analysis()):
        line = next(line for line in printed.splitlines() if f" {row.layer} " in line)
        assert line.split()[-1] == content.decimal(row.cells[-1][0])
    assert "…" not in printed


def test_no_findings_and_no_layers_print_too() -> None:
    assert "No findings" in _printed(Analysis(pd.DataFrame(), []))


# -- HTML -------------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_self_contained(page: str) -> None:
    parsed = _Parsed(page)
    assert parsed.open == []
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"https?://|@import|url\(", page.replace(plotly(), ""))


def test_only_scripts_of_our_own_may_run(page: str) -> None:
    """A browser runs an inline script only if its hash is in the policy."""
    scripts = re.findall(r"<script(?: [^>]*)?>(.*?)</script>", page, flags=re.DOTALL)
    assert [bool(words) for words in scripts] == [True] * 3
    data, *code = scripts
    assert code == [plotly(), page_script()]
    assert json.loads(data)["charts"]
    policy = next(item["content"] for tag, item in _Parsed(page).tags if item.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert allowed == [base64.b64encode(hashlib.sha256(item.encode()).digest()).decode() for item in code]


def test_the_picture_beside_the_verdict_has_words_and_is_png(page: str) -> None:
    (attributes,) = (attributes for tag, attributes in _Parsed(page).tags if tag == "img")
    assert len(attributes["alt"]) > 30
    assert base64.b64decode(attributes["src"].split(",")[1]).startswith(b"\x89PNG")


def test_the_page_says_everything(page: str) -> None:
    analysis, text = make_analysis(), _Parsed(page).text
    for finding in analysis.findings:
        for words in (finding.title, finding.evidence, finding.threshold, finding.source, finding.advice):
            assert words in text
    for row in content.rows(analysis):
        assert row.layer in text
        for mean, error in row.cells:
            assert content.with_error(mean, error) in text
    for words in ("collapse-probe analyze", "broken.jpg: truncated file", "M alone misleads", "50 images"):
        assert words in text
    assert (
        text.index("repeats the block before")
        < text.index("Between layers")
        < text.index("Across layers")
        < text.index("Provenance")
    )


def test_the_picture_at_the_top_belongs_to_the_verdict() -> None:
    analysis = make_analysis()
    assert hero_name(analysis) == "adjacent_similarity"
    carried = {"head-redundancy": "head_diversity", "uniform-attention": "entropy", "x": "adjacent_similarity"}
    for code, expected in carried.items():
        analysis.findings = [_finding("fine", "ok"), _finding("bad", "problem", code)]
        assert hero_name(analysis) == expected
    analysis.findings = [_finding("fine", "note", "head-redundancy")]
    assert hero_name(analysis) == "adjacent_similarity"
    assert hero_name(make_analysis(1)) == "entropy"


@pytest.mark.usefixtures("no_pictures")
def test_groups_are_told_where_there_are_several() -> None:
    analysis = hierarchy()
    analysis.findings = [_finding("fine", "ok")]
    assert hero_name(analysis) == "layer_similarity"
    text = _Parsed(render_html(analysis)).text
    for letter, words in content.groups(analysis):
        assert f"{letter}{words}" in text.replace("\n", "")


@pytest.mark.usefixtures("no_pictures")
def test_every_family_has_its_section_with_charts_and_table() -> None:
    analysis = make_full(make_analysis())
    found = sections(analysis)
    assert [section.family for section in found] == list(FAMILIES)
    for section in found:
        assert section.charts
        own = [item.label for item in READINGS.values() if item.family == section.family]
        assert {heading for heading, _ in section.table.headings} >= set(own)
        assert [layer for layer, _ in section.table.rows] == list(analysis.layers.index)
        assert {len(cells) for _, cells in section.table.rows} == {len(section.table.headings)}
    text = _Parsed(render_html(analysis)).text
    for title, question in FAMILIES.values():
        assert f"{title}\n{question}" in text
    assert [section.family for section in sections(make_analysis())] == [*list(FAMILIES)[:3], "tokens"]


def test_family_tables_hold_values_with_errors_and_intervals() -> None:
    analysis = make_full(make_analysis())
    analysis.layers.loc["blocks.3.attn", ["similarity_ratio", "similarity_ratio_low", "similarity_ratio_high"]] = (
        0.5, 0.4, 0.75,
    )  # fmt: skip
    analysis.layers["effective_heads"], analysis.layers["effective_heads_se"] = 12.345, 0.678
    analysis.layers["sink_share_prefix"], analysis.layers["sink_share_prefix_se"] = 0.25, 0.125
    assert _cell(analysis, "across_layers", "Similarity ratio") == "0.500 [0.400, 0.750]"
    assert _cell(analysis, "heads", "Effective number of heads") == "12.35±0.68"
    assert _cell(analysis, "where_attention_goes", "Heads with a sink, prefix tokens") == "0.250±0.125"
    row = analysis.layers.loc["blocks.3.attn"]
    expected = content.with_error(row["excess_to_previous"], row["excess_to_previous_se"])
    assert _cell(analysis, "across_layers", "Image-specific excess of M") == expected
    analysis.layers["stable_rank"] = np.nan
    headings = [heading for heading, _ in content.family_table(analysis, "entropy_and_rank").headings]
    assert "Stable rank of maps" not in headings


@pytest.mark.usefixtures("no_pictures")
def test_derived_readings_stand_beside_the_verdict_with_their_intervals() -> None:
    analysis = make_full(make_analysis())
    assert content.derived(analysis) == [
        ("Similar blocks", "2 [1, 3] of 11 pairs of neighbours"),
        ("Onset", "block 10 [9, 11] (there in 90% of bootstrap draws)"),
    ]
    for text in (_Parsed(render_html(analysis)).text, _Parsed(to_html(analysis)).text, _printed(analysis)):
        assert "2 [1, 3] of 11 pairs" in text
        assert text.index("repeats the block before") < text.index("block 10 [9, 11]") < text.index("blocks.3.attn")
    analysis.groups[0].derived["onset"] = {"value": None, "low": None, "high": None, "share": 0.0}
    assert [label for label, _ in content.derived(analysis)] == ["Similar blocks"]
    labels = [label for label, _ in content.derived(make_full(hierarchy()))]
    assert labels[:2] == ["Similar blocks in group C", "Onset in group C"]
    assert content.derived(make_analysis()) == []


@pytest.mark.usefixtures("no_pictures")
def test_absent_metrics_are_listed_with_where_and_why() -> None:
    analysis = make_analysis()
    analysis.absent = [
        {"metric": "attention_sinks", "where": "A", "reason": "a single query"},
        {"metric": "attention_sinks", "where": "B", "reason": "a single query"},
        {"metric": "cka", "where": "S1", "reason": "too few <images>"},
    ]
    assert content.absent(analysis) == [
        ("attention_sinks", "A, B", "a single query"), ("cka", "S1", "too few <images>"),
    ]  # fmt: skip
    text = _Parsed(render_html(analysis)).text
    for words in ("attention_sinks", "A, B", "a single query", "too few <images>"):
        assert words in text
    assert "attention_sinks (A, B): a single query" in _printed(analysis)


def test_a_reading_of_an_absent_metric_is_not_explained_twice() -> None:
    analysis = make_analysis()
    analysis.layers["normalized_entropy"] = np.nan
    assert [what for what, _ in content.gaps(analysis)] == ["entropy / log K"]
    analysis.absent = [{"metric": "attention_entropy", "where": "A", "reason": "no rows"}]
    assert content.gaps(analysis) == []


def test_columns_that_were_not_measured_are_left_out() -> None:
    analysis = make_analysis()
    analysis.layers = analysis.layers.drop(columns=["token_similarity", "head_diversity"])
    assert list(content.columns(analysis)) == [
        name for name in content.COLUMNS if name not in ("token_similarity", "head_diversity")
    ]
    assert all(len(row.cells) == len(content.COLUMNS) - 2 for row in content.rows(analysis))
    assert content.gaps(analysis) == []


def test_shards_and_metrics_stand_in_the_line_of_the_run() -> None:
    run = dict(content.origin(make_full(make_analysis())))["run"]
    assert "4 shards" in run
    assert "metrics: all" in run


@pytest.mark.usefixtures("no_pictures")
def test_words_of_a_finding_choose_the_picture_beside_the_verdict() -> None:
    analysis = make_full(make_analysis())
    carried = {
        "token-collapse": "tokens", "outlier-tokens": "norms_and_branches", "attention-sinks": "where_attention_goes",
        "dead-heads": "head_diversity", "entropy-collapse": "entropy", "attention-collapse": "adjacent_similarity",
    }  # fmt: skip
    for code, expected in carried.items():
        analysis.findings = [_finding("bad", "problem", code)]
        gallery = Gallery(analysis)
        shown = hero(gallery)
        assert shown is not None
        assert shown.name == expected
    bare = make_analysis()
    bare.findings = [_finding("bad", "problem", "attention-sinks")]
    assert hero_name(bare) == "adjacent_similarity"


def test_errors_fill_a_wide_terminal_and_leave_a_narrow_one() -> None:
    analysis = make_analysis()
    row = content.rows(analysis)[3]
    for width, errors in ((100, 7), (80, 1)):
        lines = _printed(analysis, width).splitlines()
        line = next(line for line in lines if f" {row.layer} " in line)
        assert line.count("±") == errors
        assert max(cell_len(line) for line in lines) <= width


@pytest.mark.usefixtures("no_pictures")
def test_hostile_text_is_escaped_everywhere() -> None:
    for rendered, scripts in ((render_html(_hostile()), 3), (to_html(_hostile()), 0)):
        assert "<script>alert" not in rendered
        assert sum(tag == "script" for tag, _ in _Parsed(rendered).tags) == scripts
        assert html.escape("<script>alert(1)</script>") in rendered


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "analysis", [make_analysis(1), two_groups(), hierarchy(), all_nan(make_analysis(2, 1, None, 0), "centred")]
)
def test_awkward_analyses_make_a_page(analysis: Analysis) -> None:
    assert _Parsed(render_html(analysis)).open == []
    assert _Parsed(to_html(analysis)).open == []


def test_an_analysis_without_layers_makes_a_page() -> None:
    empty = Analysis(pd.DataFrame(), [])
    assert "No findings" in render_html(empty)
    assert to_html(empty)


def test_the_notebook_view_holds_verdict_picture_and_table() -> None:
    analysis = make_analysis()
    parsed = _Parsed(analysis._repr_html_())
    assert parsed.text.index("Warning:") < parsed.text.index("blocks.11.attn")
    assert sum(tag == "img" for tag, _ in parsed.tags) == 1
    assert sum(tag == "tr" for tag, _ in parsed.tags) == 13


def test_a_finding_shows_itself_with_its_reasons() -> None:
    finding = make_analysis().findings[0]
    parsed = _Parsed(finding._repr_html_())
    assert parsed.open == []
    for words in (finding.title, finding.evidence, finding.threshold, finding.source, finding.advice, "blocks.11.attn"):
        assert words in parsed.text
    hostile = Finding(*[HOSTILE] * 7)
    assert "<script" not in hostile._repr_html_()


@pytest.mark.usefixtures("no_pictures")
def test_the_whole_report_is_shown_in_a_frame_on_request() -> None:
    analysis = make_analysis(3)
    shown = analysis.interactive(height=500)._repr_html_()
    (frame,) = (attributes for tag, attributes in _Parsed(shown).tags if tag == "iframe")
    assert frame["height"] == "500"
    assert frame["srcdoc"] == render_html(analysis)


@pytest.mark.usefixtures("no_pictures")
def test_reports_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    analysis = make_analysis(2)
    path = write_report(analysis, tmp_path / "run" / "report.html")
    assert path.read_text(encoding="utf-8") == render_html(analysis)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match="Cannot write"):
        write_report(analysis, path / "below-a-file.html")


@pytest.mark.usefixtures("no_pictures")
def test_rendering_changes_nothing() -> None:
    analysis = make_analysis(3)
    before = copy.deepcopy(analysis)
    render_html(analysis)
    _printed(analysis)
    pd.testing.assert_frame_equal(analysis.layers, before.layers)
    assert analysis.findings == before.findings
    assert analysis.provenance == before.provenance


def test_reports_load_no_torch() -> None:
    code = "import sys, collapse_probe.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class _Parsed(HTMLParser):
    """Tags with their attributes, the visible text, and whatever was left open."""

    VOID = ("meta", "img", "br", "link", "base", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


def _printed(analysis: Analysis, width: int = 80, colour: bool = False) -> str:
    stream = io.StringIO()
    print_summary(analysis, Console(file=stream, width=width, force_terminal=colour))
    return stream.getvalue()


def _cell(analysis: Analysis, family: str, heading: str) -> str:
    """What the family's table says of block 3."""
    table = content.family_table(analysis, family)
    place = [name for name, _ in table.headings].index(heading)
    return table.rows[3][1][place]


def _finding(title: str, severity: str, code: str = "code") -> Finding:
    return Finding(code, severity, title, "", "", "", "")


def _renamed(analysis: Analysis, pattern: str) -> Analysis:
    names = [pattern.format(i) for i in range(len(analysis.layers))]
    analysis.layers.index = pd.Index(names)
    analysis.groups[0].layers = names
    return analysis


def _hostile() -> Analysis:
    analysis = _renamed(make_analysis(3), "layer{}" + HOSTILE)
    analysis.provenance = {"model": {"architecture": HOSTILE, HOSTILE: HOSTILE}, "images": {"kind": HOSTILE}}
    analysis.findings = [Finding(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, (HOSTILE,))]
    analysis.not_captured = [{"layer": HOSTILE, "reason": HOSTILE}]
    return analysis
