"""`collapse-probe models`: what is listed, filtered and shown, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import timm
from typer.testing import CliRunner

from collapse_probe import catalogue
from collapse_probe.catalogue import Row
from collapse_probe.cli.app import app

#: Names that another version knows are listed from timm itself, and not from the table.
of_this_timm = pytest.mark.skipif(
    timm.__version__ not in catalogue.timm_version(catalogue.read_table().values()),
    reason="the table was made with another version of timm",
)

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def models(*words):
    return CliRunner().invoke(app, ["models", *words])


def names_in(text):
    """First words of the lines between the heading and the legend: one line, one architecture."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("name"))
    body = lines[start + 1 :]
    return [line.split()[0] for line in body[: body.index("")]]


@pytest.fixture(scope="module")
def table():
    return catalogue.read_table()


@pytest.fixture
def small_table(monkeypatch):
    """A table of few names that claims to be of another timm, and those that the other timm is said to have."""
    rows = {
        "alpha_token": Row("alpha_token", "f", "timm 0.5", "3x8x8", {"token": 12}, 12, (12,)),
        "alpha_both": Row("alpha_both", "f", "timm 0.5", "3x8x8", {"window": 4, "token": 2}, 6, (2, 2), 1, {"why": 3}),
        "alpha_gaps": Row("alpha_gaps", "f", "timm 0.5", "3x8x8", not_captured={"why": 7}),
        "alpha_conv": Row("alpha_conv", "f", "timm 0.5", "3x8x8"),
        "alpha_bad": Row("alpha_bad", "f", "timm 0.5", failure="It does not run."),
        "alpha_gate": Row("alpha_gate", "f", "timm 0.5", "3x8x8", {"gate": 12}),
        "alpha_gone": Row("alpha_gone", "f", "timm 0.5", "3x8x8", {"token": 1}, 1),
        "alpha_lone": Row("alpha_lone", "f", "timm 0.5", "3x8x8", {"token": 2, "gate": 1}, 2),
    }
    monkeypatch.setattr(catalogue, "read_table", lambda: rows)
    names = sorted({*rows, "alpha_new"} - {"alpha_gone"})
    monkeypatch.setattr("collapse_probe.architecture.architecture_names", lambda: names)


# -- the table ---------------------------------------------------------------------------------------------------------


@of_this_timm
def test_every_architecture_that_attends_is_listed_within_80_columns(table):
    done = models()
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    assert names_in(done.stdout) == sorted(row.name for row in table.values() if row.attends)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.isascii()


@pytest.mark.usefixtures("small_table")
def test_patterns_filter_and_the_rest_is_named():
    done = models("*_t*", "*_conv", "*bad")
    assert names_in(done.stdout) == ["alpha_token"]
    assert "No attention in alpha_conv." in done.stdout
    assert "Could not be run: alpha_bad." in done.stdout
    assert "alpha_new" not in done.stdout


@pytest.mark.usefixtures("small_table")
def test_lines_say_what_the_table_says():
    done = models("*")
    assert done.exit_code == 0, done.stderr
    rows = [line.split("  ") for line in done.stdout.splitlines() if line.startswith("alpha")]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["alpha_both", "6", "4 window + 2 token", "2+2", "3"],
        ["alpha_gaps", "0", "-", "not analysed", "7"],
        ["alpha_gate", "12", "12 gate", "not analysed", "-"],
        ["alpha_lone", "3", "2 token + 1 gate", "lone layers", "-"],
        ["alpha_token", "12", "12 token", "12", "-"],
    ]
    assert "Not in the table: alpha_new." in done.stdout


@pytest.mark.usefixtures("small_table")
def test_the_heading_counts_the_names_of_the_installed_timm():
    from importlib.metadata import version

    heading = " ".join(models().stdout.partition("\nname")[0].split())
    assert heading == (
        f"Table made with timm 0.5, installed is {version('timm')}. Of 8 names, 3 can be analysed, 2 attend only "
        "in ways that are not analysed, 1 do not attend, 1 could not be run, 1 are unknown to the table."
    )


@of_this_timm
def test_a_kind_filters(table):
    done = models("swin*", "deit_*", "--kind", "window")
    assert names_in(done.stdout) == [
        row.name for row in table.values() if row.name.startswith(("swin", "deit_")) and "window" in row.kinds
    ]
    both = models("--kind", "class", "--kind", "window")
    assert names_in(both.stdout) == [row.name for row in table.values() if {"class", "window"} & set(row.kinds)]


@pytest.mark.usefixtures("small_table")
def test_json_has_the_same():
    content = json.loads(models("alpha_[bcnt]*", "--json").stdout)
    assert content["names"] == {"attending": 5, "without_attention": 1, "failed": 1, "unknown": 1}
    assert [row["name"] for row in content["models"]] == ["alpha_both", "alpha_token"]
    assert content["models"][0] == {
        "name": "alpha_both", "family": "f", "source": "timm 0.5", "input_size": "3x8x8", "maps": 6, "analysed": 6,
        "mixed": 1, "kinds": {"window": 4, "token": 2}, "groups": [2, 2], "not_captured": {"why": 3}, "failure": "",
    }  # fmt: skip
    assert content["without_attention"] == ["alpha_conv"]
    assert content["failed"] == {"alpha_bad": "It does not run."}
    assert content["unknown"] == ["alpha_new"]
    assert content["timm"]["table"] == "0.5"


# -- one architecture --------------------------------------------------------------------------------------------------


def test_one_name_shows_its_layers():
    done = models("swin_tiny_patch4_window7_224")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "swin_tiny_patch4_window7_224: 12 attention maps, images of 3 x 224 x 224"
    assert lines[2].split() == ["group", "layer", "kind", "[H,", "Q,", "K]", "windows"]
    assert lines[3].split() == ["A", "layers.0.blocks.0.attn", "window", "[3,", "49,", "49]", "64"]
    assert lines[4].split() == ["B", "layers.0.blocks.1.attn", "window", "[3,", "49,", "49]", "64", "shifted"]
    assert max(map(len, lines)) <= 80
    assert "Rows of all maps are probabilities." in done.stdout


def test_one_name_as_json():
    content = json.loads(models("cait_xxs24_224", "--json").stdout)
    assert content["input_size"] == [3, 224, 224]
    assert len(content["layers"]) == 26
    assert content["layers"][25] == {
        "name": "blocks_token_only.1.attn", "kind": "class", "heads": 4, "queries": 1, "keys": 197, "windows": 1,
        "partition": "", "prefix_tokens": 1, "group": "B", "is_probability": True,
    }  # fmt: skip
    assert not content["layers"][0]["is_probability"]
    assert content["not_captured"] == {}


def test_mixed_maps_and_kinds_that_are_not_compared_are_marked():
    done = models("cait_xxs24_224").stdout
    assert sum(line.rstrip().endswith(" mixed") for line in done.splitlines()) == 24
    done = models("xcit_nano_12_p8_224").stdout
    assert "Not compared: channel:" in done
    assert max(map(len, done.splitlines())) <= 80


def test_options_reach_the_model():
    done = models(
        "vit_tiny_patch16_224", "--img-size", "64", "--model-kwargs", "depth=2", "--model-kwargs", "num_heads=6"
    )
    assert "2 attention maps, images of 3 x 64 x 64" in done.stdout
    assert done.stdout.count("[6, 17, 17]") == 2


def test_a_kind_filters_layers():
    done = models("cait_xxs24_224", "--kind", "class")
    assert "2 attention maps" in done.stdout
    assert "blocks.0.attn" not in done.stdout


@of_this_timm
def test_gaps_are_shown_and_no_map_at_all_is_a_rejected_model(monkeypatch):
    from collapse_probe import architecture

    gaps = {f"blocks.{number}.attn": "nothing was seen" for number in range(6)} | {"head": "it ran elsewhere"}
    found = architecture.Architecture("alpha", "f", "s", (3, 8, 8), "meta", (), gaps, {})
    monkeypatch.setattr(architecture, "describe", lambda *_: found)
    done = models("alpha")
    assert done.exit_code == 3
    assert "- blocks.0.attn, blocks.1.attn, blocks.2.attn and 3 more: nothing was seen" in done.stdout
    assert "- head: it ran elsewhere" in done.stdout
    assert done.stderr == "Error: No attention map could be captured from alpha.\n"


def test_an_architecture_without_attention_is_rejected():
    done = models("resnet18")
    assert done.exit_code == 3
    assert "0 attention maps" in done.stdout


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["swin"], "'*swin*' matches"),
        (["swim_tiny*"], "Nearest: swin_tiny*"),
        (["vit_tiny_patch61_224"], "vit_tiny_patch16_224"),
        (["vit_tiny_patch16_224.nonsense"], "cannot be built: RuntimeError: Invalid pretrained tag (nonsense)"),
        (["swin*", "qqqq*"], "'qqqq*'"),
        (["--kind", "windows"], "token"),
        (["deit_tiny_patch16_224", "--kind", "window"], "it has token"),
        (["swin*", "--img-size", "64"], "--img-size"),
        (["--model-kwargs", "depth=2"], "--model-kwargs"),
        (["vit_tiny_patch16_224", "--model-kwargs", "depth"], "name=value"),
        (["vit_tiny_patch16_224", "--model-kwargs", "nonsense=1"], "nonsense"),
        (["vit_tiny_patch16_224", "--img-size", "0"], "img_size=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_words_end_with_a_sentence_and_code_2(words, sentence):
    done = models(*words)
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert done.stderr.lstrip().startswith("Error: ")
    assert done.stdout == ""


@of_this_timm
def test_the_table_is_listed_without_torch():
    code = (
        "import sys, collapse_probe.cli.app as a\ntry:\n    a.app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    for words in (["models", "--help"], ["models", "swin*"], ["models", "--json"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=ENVIRONMENT)
        assert done.stderr.splitlines()[-1] == "False", words


@pytest.mark.parametrize(("reader", "code"), [("| head -1", 0), ("> /dev/full", 5)])
def test_stdout_that_cannot_be_written(reader, code):
    command = f"{sys.executable} -m collapse_probe models {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
