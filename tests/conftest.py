"""Make the bundled architectures known to timm; helpers and examples importable by the tests that use them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

import collapse_probe.models  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:  # tests side by side share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # also those of the commands that tests start

# A shell starts what runs in the background with SIGINT ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
for folder in (HERE, HERE / "capture", HERE / "metrics", HERE.parent / "examples"):
    sys.path.insert(0, str(folder))
