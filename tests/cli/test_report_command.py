"""`collapse-probe report`: saved analyses shown again, and what is no saved analysis."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from analysis_factory import make_analysis, make_full
from typer.testing import CliRunner

from collapse_probe.cli.app import app
from collapse_probe.conditions import check
from collapse_probe.errors import CollapseProbeError
from collapse_probe.partial import Partial
from collapse_probe.plots import Gallery
from collapse_probe.result import Analysis
from collapse_probe.shards import Shard

WIDE = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}

#: A process in which torch cannot be imported.
WITHOUT_TORCH = """
import sys

class Refusing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "timm", "torchmetrics"):
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
sys.argv[0] = "collapse-probe"
"""


def report(*words, code=0):
    done = CliRunner().invoke(app, ["report", *map(str, words)])
    assert done.exit_code == code, (done.stderr, done.exception)
    assert "Traceback" not in done.stderr
    if code not in (0, 7):
        assert done.stderr.lstrip().startswith("Error: ")
    return done


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_full(make_analysis(layers=4)).save(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def one_figure(monkeypatch):
    """Drawing all of them takes longer than all the rest."""
    made = Gallery.__init__

    def few(self, analysis):
        made(self, analysis)
        self.names = ["adjacent_similarity"]

    monkeypatch.setattr(Gallery, "__init__", few)
    monkeypatch.setattr("collapse_probe.report.html.render_html", lambda gallery: f"<p>{len(gallery.names)}</p>")


def test_the_summary_alone(run):
    before = files(run)
    done = report(run)
    assert "deit_tiny_patch16_224" in done.stdout
    assert "blocks.3.attn" in done.stdout
    assert "Written" not in done.stdout
    assert not done.stderr
    assert files(run) == before


@pytest.mark.usefixtures("one_figure")
def test_a_page_by_default(run, tmp_path):
    done = report(run, "--out", tmp_path / "out")
    assert files(tmp_path / "out") == {"report.html"}
    assert f"Written to {tmp_path / 'out'}: report.html\n" in done.stdout


MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "eps": b"%!PS", "jpg": b"\xff\xd8\xff", "tif": b"II*\x00",
         "webp": b"RIFF"}  # fmt: skip


@pytest.mark.usefixtures("one_figure")
def test_figures_in_every_format(run, tmp_path):
    done = report(run, "-o", tmp_path, "--format", " .PDF, png,svg,eps,jpg,tif,webp,png", "-q")
    assert files(tmp_path) == {f"figures/adjacent_similarity.{kind}" for kind in MAGIC}
    for kind, start in MAGIC.items():
        assert (tmp_path / "figures" / f"adjacent_similarity.{kind}").read_bytes().startswith(start), kind
    assert "figures/\n" in done.stdout
    assert "report.html" not in done.stdout
    report(run, "-o", tmp_path, "--format", "html,svg", "-q")
    assert "report.html" in files(tmp_path)


@pytest.mark.usefixtures("one_figure")
def test_figures_that_are_no_more_go_and_other_files_stay(run, tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("heads.svg", "heads.png", "mine.svg"):
        (tmp_path / "figures" / name).write_text("old")
    report(run, "-o", tmp_path, "--format", "svg", "-q")
    assert files(tmp_path) == {"figures/adjacent_similarity.svg", "figures/heads.png", "figures/mine.svg"}


@pytest.mark.usefixtures("one_figure")
def test_a_run_can_hold_its_own_report(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    report(tmp_path / "run", "--out", tmp_path / "elsewhere" / ".." / "run")
    assert "report.html" in files(tmp_path / "run")
    make_analysis().save(tmp_path / "other")
    done = report(tmp_path / "run", "--out", tmp_path / "other", code=2)
    assert "holds another analysis" in done.stderr
    assert "report.html" not in files(tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--format", "html"], "give --out"),
        (["--out", "o", "--format", "gif"], "'gif' is none of html, png, svg, pdf"),
        (["--out", "o", "--format", ""], "'' is none of"),
        (["--out", "o", "--format", "png,,svg"], "'' is none of"),
        (["--out", "o", "--format", "../../x"], "'./../x' is none of"),
    ],
)
def test_wrong_formats(run, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in report(run, *words, code=2).stderr
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "Cannot write to" in report(run, "--out", tmp_path / "file" / "out", code=5).stderr


# -- what is no saved analysis -----------------------------------------------------------------------------------------


def a_shard(folder, state=None):
    provenance = {"model": {}, "images": {"skipped": []}, "versions": {}, "seconds": 1.0, "fingerprint": {}}
    Partial(Shard(1, 2), 3, {}, provenance=provenance, state=state or {}).save(folder)


@pytest.mark.parametrize(
    ("make", "code", "sentence"),
    [
        (lambda path: path.rmdir(), 3, "is not a saved analysis: analysis.json is missing"),
        (lambda _: None, 3, "is not a saved analysis: analysis.json is missing"),
        (lambda path: (path.rmdir(), path.write_text("x")), 2, "is a file. Give the folder"),
        (a_shard, 2, "collapse-probe merge SHARD1 SHARD2 ... --out RUN"),
        (lambda path: a_shard(path / "s_1"), 2, "collapse-probe merge"),
        (lambda path: a_shard(path, {"position": 3}), 2, "Repeat its command with --resume"),
        (lambda path: (path / "shard.json").write_text("{"), 2, "collapse-probe merge"),
        (lambda path: make_analysis(2).save(path / "vit"), 2, "holds several analyses. Name one: "),
    ],
    ids=["absent", "empty", "file", "shard", "shards", "interrupted", "damaged shard", "several"],
)
def test_what_is_no_saved_analysis(tmp_path, make, code, sentence):
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    assert sentence in report(folder, code=code).stderr
    done = CliRunner().invoke(
        app, ["report", str(make_analysis().save(tmp_path / "whole")), "--baseline", str(folder), "--fail-on",
              "entropy>baseline"]
    )  # fmt: skip
    assert done.exit_code == code
    assert sentence in done.stderr


def test_a_name_that_no_folder_can_have():
    assert "cannot be read: File name too long" in report("x" * 300, code=3).stderr


def test_an_interrupted_run_can_be_looked_at_and_not_judged(tmp_path):
    analysis = make_analysis()
    analysis.provenance["complete"] = False
    analysis.provenance["images"]["planned"] = 1000
    analysis.save(tmp_path)
    assert "partial: 50 of 1000 images" in report(tmp_path).stdout
    done = report(tmp_path, "--fail-on", "problem", code=2)
    assert "partial: 50 of 1000 images" in done.stdout
    assert "--resume" in done.stderr


def damaged(data, what):
    if what == "rows":
        data["layers"]["rows"][0].pop()
    elif what == "no groups":
        del data["groups"]
    elif what == "matrix":
        data["groups"][0]["matrices"]["all"]["similarity"].pop()
    elif what == "foreign layer":
        data["groups"][0]["layers"][0] = "other"
    elif what == "finding":
        data["findings"][0]["title"] = {"a": 1}
    elif what == "finding without a field":
        del data["findings"][0]["severity"]
    elif what == "a field more":
        data["findings"][0]["other"] = 1
    elif what == "provenance":
        data["provenance"] = []
    elif what == "not captured":
        data["not_captured"] = ["layer"]
    elif what == "type":
        data["layers"]["dtypes"][5] = "nonsense"
    return data


@pytest.mark.parametrize(
    "what",
    ["rows", "no groups", "matrix", "foreign layer", "finding", "finding without a field", "a field more",
     "provenance", "not captured", "type"],
)  # fmt: skip
def test_an_analysis_that_is_not_as_it_was_written(run, tmp_path, what):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "analysis.json"
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), what)))
    assert "holds a damaged analysis" in report(tmp_path / "run", code=3).stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("analysis.json", b""),
        ("analysis.json", b"{"),
        ("analysis.json", b"\xff\xfe"),
        ("analysis.json", b"[" * 100_000),
        ("analysis.json", b"[]"),
        ("analysis.json", b'{"schema_version": 99}'),
        ("analysis.json", b'{"schema_version": 3}'),
        ("arrays.npz", b""),
        ("arrays.npz", b"PK\x03\x04" + bytes(100)),
        ("arrays.npz", b"\x80\x04cos\nsystem\n"),
    ],
)
def test_files_that_are_none(run, tmp_path, name, content):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    report(tmp_path / "run", code=3)


def test_arrays_that_are_damaged_or_gone(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "arrays.npz"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(CollapseProbeError):
            Analysis.load(tmp_path / "run")
    path.unlink()
    assert "arrays.npz is missing" in report(tmp_path / "run", code=3).stderr


def mutated(value, draw):
    """The same data with one thing in it replaced by another kind of thing, or gone."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        return [*value[:place], mutated(value[place], draw), *value[place + 1 :]]
    return draw.choice([None, 0, -1, 1e308, "", "x", [], {}, [None], {"a": []}, True])


def test_any_change_is_read_or_refused(run, tmp_path):
    """Nothing but the errors that are meant, wherever in the file something else stands."""
    shutil.copytree(run, tmp_path / "run")
    path, draw = tmp_path / "run" / "analysis.json", random.Random(0)
    data = json.loads(path.read_text())
    data["groups"] = [{**group, "matrices": {"all": {}}} for group in data["groups"]]  # the rest is what is of interest
    read = 0
    for _ in range(150):
        path.write_text(json.dumps(mutated(data, draw)))
        try:
            analysis = Analysis.load(tmp_path / "run")
        except CollapseProbeError:
            continue
        read += 1
        check(analysis, ["problem", "entropy>0.5", "similar_blocks>1", "onset<3"])
    assert read > 20


# -- what it needs -----------------------------------------------------------------------------------------------------


def test_no_torch_is_needed(tmp_path):
    run = make_analysis(layers=2).save(tmp_path / "run")
    words = [
        "report", run, "--out", tmp_path / "out", "--fail-on", "entropy>baseline+9", "--fail-on",
        "attention-collapse:problem", "--baseline", run, "--junit", tmp_path / "j.xml", "--conditions-json",
        tmp_path / "c.json",
    ]  # fmt: skip
    program = WITHOUT_TORCH + "from collapse_probe.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, env=WIDE)
    assert done.returncode == 0, done.stderr
    assert {"out/report.html", "j.xml", "c.json"} <= files(tmp_path)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "blocks.1.attn" in page
    assert "data:image/png" in page
    assert subprocess.run([sys.executable, "-c", WITHOUT_TORCH + "import torch"], capture_output=True).returncode == 1


#: `collapse-probe` with one figure: drawing all of them takes longer than all the rest.
ONE_FIGURE = """
import sys
import collapse_probe.plots.gallery as gallery
from collapse_probe.cli import main

gallery.FIGURES = {"adjacent_similarity": gallery.FIGURES["adjacent_similarity"]}
sys.argv[0] = "collapse-probe"
main()
"""


@pytest.fixture
def german(tmp_path):
    """An environment in which numbers have a comma, for everything that asks, and matplotlib does."""
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this machine cannot make a German locale")
    (tmp_path / "matplotlibrc").write_text("axes.formatter.use_locale: True\n")
    return {**WIDE, "LC_ALL": "de_DE.UTF-8", "LOCPATH": str(tmp_path), "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("localedef") is None, reason="this machine cannot make a German locale")
def test_numbers_have_decimal_points_whatever_the_locale(tmp_path, german):
    asks = "import matplotlib, locale; print(locale.format_string('%.1f', 0.5))"
    assert subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, env=german).stdout == "0,5\n"
    run = make_analysis(layers=2).save(tmp_path / "run")
    words = ["report", run, "--out", "out", "--format", "svg", "-q", "--fail-on", "entropy>99", "--junit", "j.xml"]
    shown = []
    for name, environment in (("plain", WIDE), ("german", german)):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", ONE_FIGURE, *map(str, words), "--conditions-json", "c.json"],
            capture_output=True, text=True, env=environment, cwd=tmp_path / name, check=True,
        )  # fmt: skip
        shown.append(done.stdout)
    assert shown[0] == shown[1]
    assert re.search(r"\d\.\d{3}", shown[0])
    written = files(tmp_path / "plain")
    assert {"j.xml", "c.json", "out/figures/adjacent_similarity.svg"} <= written
    for name in written:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "german" / name).read_bytes(), name
