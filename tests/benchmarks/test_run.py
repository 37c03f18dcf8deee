"""The benchmark runs from end to end, on few images and one repetition: what it says about speed is not looked at."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sweep
FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_a_table_names_every_contender(tmp_path):
    command = [sys.executable, FOLDER / "run.py", "--models", "vit_tiny_patch16_224", "--images", "4", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--no-scaling", "--out", tmp_path], capture_output=True, text=True, check=True, timeout=600
    )
    assert (tmp_path / "cpu.txt").read_text() in done.stdout
    rows = dict(re.findall(r"^  (\S.*?) {2,}.* (\d+\.\d\d) +-?\d+ MiB$", done.stdout, re.M))
    assert {"plain fused forward", "capture only", "M and its parts", "suite fast", "suite all", "CKA"} <= rows.keys()
    assert rows["plain fused forward"] == "1.00"
    error = re.search(r"largest difference of M from float64: (\S+)", done.stdout)
    assert float(error[1]) < 1e-5
    # 12 layers, 3 heads, 197 tokens, 64 channels: queries and keys in 4 bytes, normalisers in 4
    assert f"{12 * 3 * 197 * (2 * 64 * 4 + 4) / 1e6:.1f} MB" in done.stdout
    assert f"{3 * 197**2 * (2 * 12 * 64 + 12 * 13) / 1e9:.2f} G operations" in done.stdout


def test_curves_over_sizes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import scaling

    monkeypatch.setattr(scaling, "CENTRE", {"images": 2, "pixels": 32, "layers": 2, "heads": 3, "batch": 2})
    monkeypatch.setattr(scaling, "CURVES", {"images": (1, 2), "pixels": (32, 48), "layers": (2, 3)})
    curves = scaling.measure("cpu", "float32", 1, 1)
    assert curves["value"].tolist() == [1, 2, 32, 48, 2, 3]
    assert curves["tokens"].tolist() == [5, 5, 5, 10, 5, 5]
    assert (curves[["M and its parts", "suite fast"]] > 0).all(axis=None)
    scaling.draw(curves, tmp_path / "curves.png", "a machine")
    assert (tmp_path / "curves.png").stat().st_size > 1000
