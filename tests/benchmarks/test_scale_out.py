"""The benchmark of several processes runs from end to end, on few images."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sweep
FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_a_row_for_each_number_of_processes(tmp_path):
    command = [sys.executable, FOLDER / "scale_out.py", "--models", "vit_tiny_patch16_224", "--images", "16"]
    done = subprocess.run(
        [*command, "--batch", "2", "--processes", "1", "2", "--out", tmp_path],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    (written,) = tmp_path.iterdir()
    assert written.read_text() == done.stdout
    rows = re.findall(r"^vit_tiny_patch16_224 +(\w+) +([12]) +(\d+\.\d) +(\d+\.\d\d) ", done.stdout, re.M)
    assert [(metrics, processes) for metrics, processes, _, _ in rows] == [
        (metrics, processes) for metrics in ("cross_layer_similarity", "fast") for processes in "12"
    ]
    assert all(float(speed) > 0 for _, _, speed, _ in rows)
    assert {speed_up for _, processes, _, speed_up in rows if processes == "1"} == {"1.00"}
