"""`collapse-probe analyze` without a model: the bundled pair side by side."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from collapse_probe.cli.app import app
from collapse_probe.cli.bundled import SIDES


@pytest.fixture
def no_figures(monkeypatch):
    """They take longer than all the rest, and have tests of their own."""

    def write(analysis, folder):
        analysis.save(folder)

    monkeypatch.setattr("collapse_probe.cli.results.fill", write)


def probe(*words, code=0):
    done = CliRunner().invoke(app, ["analyze", *(str(word) for word in words)])
    assert done.exit_code == code, (done.stderr, done.exception)
    assert "Traceback" not in done.stderr
    return done


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collapse_probe.cli.results.fill", lambda analysis, folder: analysis.save(folder))
        return out, probe("--out", out)


def test_each_side_is_the_analysis_that_its_label_names(shown):
    out, done = shown
    for name, maps, folder in SIDES.values():
        provenance = json.loads((out / folder / "analysis.json").read_text())["provenance"]
        assert provenance["model"]["architecture"] == name
        assert provenance["options"]["attention"] == maps
        assert provenance["images"]["count"] == 64
        assert provenance["command"].startswith("collapse-probe")
    assert "No images given" not in done.stderr


def test_page_and_screen_show_them_beside_each_other(shown):
    out, done = shown
    page = (out / "report.html").read_text(encoding="utf-8")
    for label, (_, _, folder) in SIDES.items():
        assert f'href="{folder}/report.html"' in page
        assert f"<h3>{label}</h3>" in page
        assert f"{label}: " in done.stdout
    assert "What to see" in page
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("M to previous block"))
    table = pd.read_csv(out / "vit" / "layers.csv")["similarity_to_previous"]
    assert f"{table.mean():.2f} ({table.min():.2f}..{table.max():.2f})" in row
    assert f"Written to {out}" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--attention", "softmax"],
        ["--no-pretrained"],
        ["--model-kwargs", "depth=2"],
        ["--img-size", "16"],
        ["--use-ema"],
    ],
)
def test_options_of_one_model_need_one(tmp_path, words):
    done = probe(*words, "--out", tmp_path / "out", code=2)
    assert f"{words[0]} is about one model" in done.stderr
    assert not files(tmp_path)


@pytest.mark.usefixtures("no_figures")
def test_only_what_is_there_is_explained(tmp_path):
    probe("--layers", "blocks.3.*", "--num-samples", "4", "--quiet", "--out", tmp_path / "é")
    page = (tmp_path / "é" / "report.html").read_text(encoding="utf-8")
    assert "trained alike" in page
    assert "What to see" not in page


def test_other_images_that_are_not_there_leave_nothing_half_done(tmp_path):
    done = probe("--images", tmp_path / "nowhere", "--out", tmp_path / "out", code=4)
    assert done.stderr.count("Error") == 1
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(tmp_path):
    (tmp_path / "deepvit").touch()
    done = probe("--out", tmp_path, code=5)
    assert "Analysing" not in done.stderr
    assert files(tmp_path) == [tmp_path / "deepvit"]


@pytest.mark.sweep
def test_the_demonstration_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "collapse_probe", "analyze", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for _, _, folder in SIDES.values():
        assert (tmp_path / folder / "report.html").stat().st_size > 100_000
        assert (tmp_path / folder / "figures" / "overview.svg").exists()
