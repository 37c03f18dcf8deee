"""`--fail-on` and what belongs to it: exit codes, files, and what is refused before anything is measured."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from analysis_factory import make_analysis, make_full
from typer.main import get_command
from typer.testing import CliRunner

import collapse_probe.analysis
from collapse_probe.cli.app import app

MODEL = "digits_vit_24b"
WIDE = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "continuous_integration.md"


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than all the rest, and have tests of their own."""
    monkeypatch.setattr("collapse_probe.cli.results.write", lambda analysis, folder, _progress: analysis.save(folder))


def probe(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.stderr, done.exception)
    assert "Traceback" not in done.stderr
    return done


def flat(text):
    """On one line, as a terminal of any width would say it."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A saved analysis: M is 0.9 in the last layer, and a warning is the gravest finding."""
    return make_full(make_analysis()).save(tmp_path_factory.mktemp("gate") / "run")


@pytest.fixture
def nothing_runs(monkeypatch):
    def measure(*_arguments, **_settings):
        raise AssertionError("something was measured")

    monkeypatch.setattr(collapse_probe.analysis, "measure", measure)
    monkeypatch.setattr("collapse_probe.merging.merge", measure)


# -- from the beginning to the end -------------------------------------------------------------------------------------


def test_a_run_that_passes_and_one_that_fails(tmp_path):
    """The bundled ViT has a mean M of about 0.7 between neighbours; either way the results are there."""
    words = ["analyze", MODEL, "--num-samples", 16]
    passing, failing = "mean(similarity_to_previous)>0.95", "mean(similarity_to_previous)>0.3"
    done = probe(*words, "--out", tmp_path / "good", "--fail-on", passing)
    assert f"PASSED {passing} clear of the bound: mean over 23 layers 0." in flat(done.stdout)
    done = probe(
        *words, "--out", tmp_path / "bad", "--fail-on", passing, "--fail-on", failing, "--junit",
        tmp_path / "ci" / "junit.xml", "--conditions-json", tmp_path / "ci" / "conditions.json", code=7,
    )  # fmt: skip
    assert done.stderr.endswith(f"Error: 1 of 2 conditions failed: {failing}.\n")
    assert f"FAILED {failing}" in flat(done.stdout)
    assert done.stdout.index("blocks.23.attn") < done.stdout.index("Written to") < done.stdout.index("FAILED")
    for name in ("good", "bad"):
        assert json.loads((tmp_path / name / "analysis.json").read_text())["findings"]
        assert not (tmp_path / name / "partial").exists()
    suite = ElementTree.parse(tmp_path / "ci" / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert suite[1].get("classname") == "collapse-probe.digits_vit_24b"
    stored = json.loads((tmp_path / "ci" / "conditions.json").read_text())
    assert (stored["model"], stored["images"], stored["failed"]) == (MODEL, 16, True)
    # The same model on the same images is no worse than itself.
    relative = "similarity_to_previous>baseline+0.2"
    done = probe("report", tmp_path / "bad", "--baseline", tmp_path / "good", "--fail-on", relative)
    assert "Warning" not in done.stderr
    assert f"PASSED {relative}" in flat(done.stdout)


def test_merge_is_held_against_conditions(tmp_path):
    for number in (1, 2):
        probe("analyze", MODEL, "--num-samples", 16, "--shard", f"{number}/2", "--out", tmp_path / f"s_{number}", "-q")
    shards = [tmp_path / "s_1", tmp_path / "s_2"]
    condition = "mean(similarity_to_previous)>0.3"
    done = probe("merge", *shards, "--out", tmp_path / "run", "--fail-on", condition, "--junit", tmp_path / "j", code=7)
    assert done.stderr.endswith(f"Error: The condition failed: {condition}.\n")
    assert (tmp_path / "run" / "analysis.json").exists()
    assert (tmp_path / "j").exists()
    probe("merge", *shards, "--fail-on", "mean(similarity_to_previous)>0.95")


def test_a_process_ends_with_seven_whoever_reads(run):
    """Also where the reader of stdout has left, which otherwise is a quiet end."""
    command = f"{sys.executable} -m collapse_probe report {run} --fail-on warning"
    for redirection in ("> /dev/null", "| true"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {redirection}; exit ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            env=WIDE,
        )
        assert done.returncode == 7, done.stderr
        assert done.stderr == "Error: The condition failed: warning.\n"


def test_the_workflow_of_the_page_does_what_it_says(tmp_path, monkeypatch):
    """Its command, on another model and other images; and every option of the page's other commands exists."""
    page = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(r"- run: >\n((?: {10}.*\n)+)", page)
    words = shlex.split(block)
    assert words[:2] == ["collapse-probe", "analyze"]
    given = {"model.safetensors": [MODEL], "--model": [], "vit_small_patch16_224": [], "--images": [], "val/": []}
    monkeypatch.chdir(tmp_path)
    probe(*(item for word in words[1:] for item in given.get(word, [word])), "--num-samples", 16)
    assert {"run", "junit.xml", "conditions.json"} <= {path.name for path in tmp_path.iterdir()}
    for command in re.findall(r"^\$ (collapse-probe (?:.*\\\n)*.*)", page, re.MULTILINE):
        _, name, *rest = shlex.split(command.replace("\\\n", ""))
        options = {word for item in get_command(app).commands[name].params for word in item.opts}
        assert {word for word in rest if word.startswith("-")} <= options


# -- outcomes ----------------------------------------------------------------------------------------------------------


def test_outcomes_are_shown_each_with_its_reason(run):
    conditions = {
        "similarity_to_previous>0.8": "FAILED",
        "similarity_to_previous>0.87": "UNCLEAR",
        "similarity_to_previous>0.99": "PASSED",
        "attention-collapse": "FAILED",
        "problem": "PASSED",
    }
    done = probe("report", run, *(word for text in conditions for word in ("--fail-on", text)), code=7)
    shown = flat(done.stdout)
    for text, word in conditions.items():
        assert f"{word} {text} " in shown
    assert "FAILED similarity_to_previous>0.8 in 1 of 11 layers: blocks.11.attn 0.8600±0.0080" in shown
    assert "2 of 5 conditions failed: similarity_to_previous>0.8, attention-collapse." in done.stderr


def test_what_cannot_be_judged_is_an_error_after_the_summary(tmp_path):
    analysis = make_analysis()  # of the fast metrics only
    analysis.save(tmp_path / "run")
    done = probe("report", tmp_path / "run", "--fail-on", "effective_rank<2", "--junit", tmp_path / "j.xml", code=2)
    assert "blocks.11.attn" in done.stdout
    assert "NOT MEASURED effective_rank<2" in flat(done.stdout)
    assert "'effective_rank<2' cannot be judged: no layer has effective_rank, a reading of map_rank" in done.stderr
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("errors") == "1"
    # A failure comes first.
    probe("report", tmp_path / "run", "--fail-on", "effective_rank<2", "--fail-on", "warning", code=7)


def test_hostile_names_reach_neither_terminal_nor_markup(tmp_path):
    analysis = make_analysis(layers=2)
    names = ["[red]\x1b[31m<b>&", "a\nError: forged"]
    analysis.layers.index = names
    analysis.groups[0].layers = names
    analysis.save(tmp_path / "run")
    done = probe("report", tmp_path / "run", "--fail-on", "entropy>0.1", "--junit", tmp_path / "j.xml", code=7)
    assert "\x1b" not in done.stdout + done.stderr
    assert "\nError: forged" not in done.stdout + done.stderr
    (failure,) = ElementTree.parse(tmp_path / "j.xml").getroot()[0][0]
    assert "[red]" in failure.text
    assert "<b>&" in failure.text


def test_a_baseline_of_other_images_is_a_warning_on_stderr(run, tmp_path):
    other = make_full(make_analysis())
    other.provenance["images"]["count"] = 20
    other.save(tmp_path / "other")
    words = ["--fail-on", "entropy>baseline+1", "--conditions-json", tmp_path / "c.json"]
    done = probe("report", run, "--baseline", tmp_path / "other", *words)
    assert "Warning: The baseline was measured on other images (50 images here, 20 in the baseline)" in done.stderr
    assert "Warning" not in done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["baseline"] == str(tmp_path / "other")


def test_a_baseline_of_other_layers_is_refused(run, tmp_path):
    make_analysis(layers=3).save(tmp_path / "other")
    done = probe("report", run, "--baseline", tmp_path / "other", "--fail-on", "entropy>baseline+1", code=2)
    assert "The baseline is of other layers: blocks.3.attn, blocks.4.attn, blocks.5.attn and 6 more" in done.stderr


# -- refused before anything is measured -------------------------------------------------------------------------------

WRONG = [
    (["--fail-on", ""], 2, "A condition is empty"),
    (["--fail-on", "nonsense>1"], 2, "there is no reading 'nonsense'"),
    (["--fail-on", "entropy>nan"], 2, "neither a finite number"),
    (["--fail-on", "entropy>1e999"], 2, "too large"),
    (["--fail-on", "attention-colapse"], 2, "Did you mean attention-collapse?"),
    (["--fail-on", "problem", "--fail-on", "bad"], 2, "Severities: warning, problem"),
    (["--fail-on", "entropy>baseline"], 2, "give one with --baseline"),
    (["--fail-on", "entropy>1", "--baseline", "run"], 2, "No --fail-on refers to the --baseline"),
    (["--fail-on", "entropy>baseline", "--baseline", "nowhere"], 3, "nowhere is not a saved analysis"),
    (["--baseline", "run"], 2, "--baseline is about conditions: give some with --fail-on"),
    (["--junit", "j.xml"], 2, "--junit is about conditions"),
    (["--conditions-json", "c.json"], 2, "--conditions-json is about conditions"),
    (["--fail-on", "problem", "--junit", "."], 5, "Cannot write .: it is a folder. Choose another file for --junit."),
    (["--fail-on", "problem", "--junit", "file/j.xml"], 5, "Choose another file for --junit."),
    (["--fail-on", "problem", "--conditions-json", "/proc/c.json"], 5, "Choose another file for --conditions-json."),
    (["--fail-on", "problem", "--junit", "x" * 300], 5, "Cannot write xxx"),
    (["--fail-on", "problem", "--junit", "same", "--conditions-json", "./same"], 2, "name the same file"),
]


@pytest.mark.parametrize("command", [["analyze", MODEL, "-q"], ["merge", "s_1", "s_2"], ["report", "saved"]])
@pytest.mark.parametrize(
    ("words", "code", "sentence"), WRONG, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None
)
@pytest.mark.usefixtures("nothing_runs")
def test_wrong_conditions_end_before_anything_is_measured(run, tmp_path, monkeypatch, command, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    shutil.copytree(run, "saved")
    before = set(tmp_path.rglob("*"))
    done = probe(*command, *words, code=code)
    assert sentence in done.stderr
    assert done.stderr.count("Error") == 1
    assert done.stdout == ""
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([MODEL, "--shard", "1/2", "--out", "o", "--fail-on", "problem"], "give it to collapse-probe merge"),
        (["--fail-on", "problem"], "--fail-on is about one model"),
        ([MODEL, "--fail-on", "effective_rank<2"], "leaves out: give --metrics fast,map_rank."),
        ([MODEL, "--metrics", "attention_entropy", "--fail-on", "attention-collapse"],
         "needs similarity_to_previous, a reading of cross_layer_similarity, which --metrics attention_entropy leaves"),
        ([MODEL, "--metrics", "cka", "--fail-on", "onset<12"], "needs onset, a reading of cross_layer_similarity"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_runs")
def test_conditions_that_this_run_cannot_answer(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    done = probe("analyze", *words, code=2)
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_may_not_be_written(run, tmp_path):
    tmp_path.chmod(0o500)
    done = probe("report", run, "--fail-on", "problem", "--junit", tmp_path / "j.xml", code=5)
    assert "Permission denied" in done.stderr
    tmp_path.chmod(0o700)


def test_a_file_that_cannot_be_written_in_the_end(run, tmp_path, monkeypatch):
    """The outcome has been shown by then, and nothing half-written is left."""
    from collapse_probe import files

    def full(*_):
        raise OSError(28, "No space left on device")

    target = tmp_path / "j.xml"
    target.write_text("old")
    monkeypatch.setattr(files.os, "fdopen", full)
    done = probe("report", run, "--fail-on", "warning", "--junit", target, code=5)
    assert "FAILED" in done.stdout
    assert f"Cannot write {target}: No space left on device. Choose another file for --junit." in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"j.xml": "old"}
