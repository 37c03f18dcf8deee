"""`collapse-probe track`: files in, a table out, a folder that a second run goes on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from _models import build
from PIL import Image
from typer.testing import CliRunner

import collapse_probe as cp
from collapse_probe.cli.app import app

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
FLAGS = ["-m", "vit_tiny_patch16_224", *(f"--model-kwargs={name}={value}" for name, value in KWARGS.items())]
WIDE = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three checkpoints, one that was cut short, and pictures."""
    root = tmp_path_factory.mktemp("track")
    (root / "run").mkdir()
    for number in (1, 2, 10):
        model = build("vit_tiny_patch16_224")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.05 * number)
        torch.save({"model": model.state_dict(), "epoch": number}, root / "run" / f"c{number}.pt")
    (root / "run" / "c3.pt").write_bytes((root / "run" / "c1.pt").read_bytes()[:5000])
    (root / "pictures").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{number}.png")
    return root


def probe(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done


def track(place, out, *more, code=0):
    return probe(
        "track", place / "run" / "*.pt", *FLAGS, "--images", place / "pictures", "--out", out, *more, code=code
    )


def test_the_main_job(place, tmp_path):
    done = track(place, tmp_path / "out", "--threshold", "0.7", "-b", 4)
    for words in ("3 checkpoints · epoch 1 to 10 · 3 attention layers · 6 images", "c3.pt: ", "Written to"):
        assert words in " ".join(done.stdout.split()).replace("c3.pt : ", "c3.pt: ") or words in done.stdout
    assert f"{place / 'run' / 'c3.pt'} is left out: " in done.stderr
    out = tmp_path / "out"
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{end}" for name in ("over_steps", "heatmaps_over_steps") for end in ("png", "svg")}
    assert {"track.csv", "track.json", "track.html", "checkpoints/c10.pt/analysis.json"} | figures <= written
    table = pd.read_csv(out / "track.csv")
    assert sorted(set(table.step)) == [1, 2, 10]
    data = json.loads((out / "track.json").read_text())
    assert data["unit"] == "epoch"
    assert [point["known"] for point in data["points"]] == ["stated as epoch"] * 3
    assert data["provenance"]["command"].startswith("collapse-probe")
    assert [Path(entry["path"]).name for entry in data["skipped"]] == ["c3.pt"]
    page = (out / "track.html").read_text()
    assert "full report" not in page
    assert "c3.pt" in page
    alone = cp.analyze(
        place / "run" / "c10.pt", place / "pictures", arch="vit_tiny_patch16_224", model_kwargs=KWARGS, threshold=0.7
    )
    series = cp.Series.load(out)
    assert series.steps == [1, 2, 10]
    pd.testing.assert_frame_equal(series.analyses[10].layers, alone.layers)


def test_a_second_run_and_reports(place, tmp_path, monkeypatch):
    monkeypatch.setattr("collapse_probe.report.write_report", lambda _, path: path.write_text("a report"))
    for module in ("plots", "report.tracking"):
        monkeypatch.setattr(f"collapse_probe.{module}.render", lambda *_args, **_options: b"a picture")
    out = tmp_path / "out"
    track(place, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("analysis.json")}
    again = track(place, out, "--reports", "--quiet")
    assert again.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in out.rglob("analysis.json")} == before
    page = (out / "track.html").read_text()
    assert page.count("full report") == 3
    assert '<a href="checkpoints/c10.pt/report.html">' in page
    changed = track(place, out, "--nearest", "2")
    assert "Measured before with other nearest (1, now 2), and again now: c1.pt, c2.pt, c10.pt." in changed.stderr
    assert "full report" not in (out / "track.html").read_text()  # they were of other analyses


def test_refusals(place, tmp_path):
    bad = place / "run" / "c3.pt"
    done = probe("track", bad, *FLAGS, "--images", place / "pictures", "--out", tmp_path / "out", code=3)
    assert done.stderr.splitlines()[-1].startswith("Error: None of 1 checkpoints could be analysed. c3.pt: ")
    assert not (tmp_path / "out" / "track.json").exists()
    assert "does not exist; check the path" in probe("track", place / "nothing.pt", code=2).stderr
    assert "matches no file" in probe("track", place / "nothing*.pt", code=2).stderr
    assert "give --out" in probe("track", place / "run", "--reports", code=2).stderr
    assert "lies in the folder of images" in track(place, place / "pictures" / "out", code=2).stderr
    assert "device 'nonsense' is not known" in track(place, tmp_path, "--device", "nonsense", code=2).stderr
    assert "No such option" in track(place, tmp_path, "--checkpoint", "x", code=2).stderr
    probe("track", code=2)
    images = probe("track", place / "run", *FLAGS, "--images", tmp_path / "none", "--out", tmp_path / "out", code=4)
    assert "Error: " in images.stderr


def test_not_under_torchrun(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in probe("track", place / "run", code=2).stderr


@pytest.mark.sweep
def test_interrupted(place, tmp_path):
    """Ctrl-C while the second checkpoint is analysed."""
    driver = (
        "import time, collapse_probe as cp, collapse_probe.tracking as t\n"
        "from collapse_probe.cli import main\n"
        "run = cp.analyze\n"
        "def slow(path, *a, **o):\n"
        "    if path.name == 'c2.pt':\n"
        "        print('here', flush=True)\n"
        "        time.sleep(60)\n"
        "    return run(path, *a, **o)\n"
        "t.analyze = slow\n"
        "main()\n"
    )
    words = ["track", place / "run", *FLAGS, "--images", place / "pictures", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", driver, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=WIDE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    time.sleep(0.1)
    process.send_signal(2)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 of 4 checkpoints are measured and kept in" in stderr
    assert stderr.splitlines()[-1] == "Interrupted."
    assert [path.name for path in (tmp_path / "out").rglob("measured.json")] == ["measured.json"]
    assert cp.Analysis.load(tmp_path / "out" / "checkpoints" / "c1.pt")
