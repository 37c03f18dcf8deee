"""Options out of range: one sentence with the range, from Python and from the shell, before anything is loaded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import collapse_probe as cp
from collapse_probe.cli.app import app
from collapse_probe.errors import UsageError
from collapse_probe.options import Options

HUGE = 10**30

RANGES = {
    "batch_size": "batch_size must be a whole number from 1 to 1000000; got ",
    "workers": "workers must be a whole number from 0 to 1000; got ",
    "num_samples": "num_samples must be a whole number from 1 to 1000000000000; got ",
    "nearest": "nearest must be a whole number from 1 to 10000; got ",
    "seed": "seed must be a whole number from 0 to 2**63 - 1; got ",
    "tile_bytes": "tile_bytes must be a whole number from 1 to 1125899906842624; got ",
    "img_size": "img_size must be a whole number from 1 to 100000; got ",
}

#: Option, value, what is said.
WRONG = [
    *((name, value, f"{said}{value!r}.") for name, said in RANGES.items()
      for value in (-1, HUGE, 1.5, math.nan, math.inf, True, "3", [4])),
    *((name, 0, f"{RANGES[name]}0.") for name in ("batch_size", "num_samples", "nearest", "tile_bytes", "img_size")),
    *((name, None, f"{RANGES[name]}None.") for name in ("batch_size", "nearest", "seed")),
    ("seed", 2**80, f"{RANGES['seed']}{2**80}."),
    *(("threshold", value, f"threshold must lie within -1..1; got {value}.")
      for value in (1.01, -2, HUGE, math.nan, math.inf)),
    *(("threshold", value, f"threshold must be a number; got {value!r}.") for value in (True, "0.5", None)),
    *(("until_se", value, f"until_se must lie between 0 and 1; got {value}.")
      for value in (0, 1, -0.1, HUGE, math.nan, -math.inf)),
    *(("until_se", value, f"until_se must be a number; got {value!r}.") for value in (True, "0.5")),
    *(("crop_pct", value, f"crop_pct must be a number above 0, up to 1; got {value!r}.")
      for value in (0, -1, 1.2, math.nan, math.inf, True, "1", HUGE)),
    *(("mean", value, f"mean must be finite numbers, one or one per channel; got {value!r}.")
      for value in ((), (math.nan,), (0.5, math.inf, 0.5), "0.5", 0.5, (True,), ("a",))),
    *(("std", value, f"std must be finite numbers above 0, one or one per channel; got {value!r}.")
      for value in ((), (math.nan,), (0.0,), (-1.0,), (1.0, 0.0, 1.0), "1", 1)),
    *(("interpolation", value, f"interpolation must be text, such as 'bicubic'; got {value!r}.")
      for value in (3, True)),
    *(("attention", value, f"attention must be 'applied' or 'softmax'; got {value!r}.") for value in ("x", None, 3)),
    *(("amp_dtype", value, f"amp_dtype must be 'bfloat16' or 'float16'; got {value!r}.")
      for value in ("float32", None, [])),
    *(("device", value, f"device must be text; got {value!r}.") for value in (0, None)),
    ("metrics", 5, "metrics must be text; got 5."),
    ("layers", (1,), "layers must be patterns of names; got (1,)."),
    *((name, 1, f"{name} must be True or False; got 1.") for name in ("amp", "verify")),
]  # fmt: skip

#: Not to be typed, or typed in another form.
_PYTHON_ONLY = {
    "tile_bytes", "device", "metrics", "amp", "verify", "mean", "std", "attention", "amp_dtype", "interpolation",
}  # fmt: skip

#: The same that can be typed.
TYPED = [
    (f"--{name.replace('_', '-')}", str(value), said)
    for name, value, said in WRONG
    if name not in _PYTHON_ONLY
    and (type(value) is int if name in RANGES else type(value) in (int, float) and value != HUGE)
] + [
    ("--threshold", "1e30", "threshold must lie within -1..1; got 1e+30."),
    ("--mean", "nan", "mean must be finite numbers, one or one per channel; got (nan,)."),
    ("--mean", "", "mean must be finite numbers, one or one per channel; got ()."),
    ("--std", "0", "std must be finite numbers above 0, one or one per channel; got (0.0,)."),
    ("--std", "1,inf,1", "std must be finite numbers above 0, one or one per channel; got (1.0, inf, 1.0)."),
    ("--attention", "x", "attention must be 'applied' or 'softmax'; got 'x'."),
    ("--amp-dtype", "float32", "amp_dtype must be 'bfloat16' or 'float16'; got 'float32'."),
    ("--batch-size", "1.5", "--batch-size"),
    ("--seed", "nan", "--seed"),
]  # fmt: skip


def label(value):
    return f"{value!r:.20}"


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=label)
def test_from_python(monkeypatch, name, value, said):
    monkeypatch.setattr("collapse_probe.networks.load_model", None)  # too early for that
    monkeypatch.setattr("collapse_probe.analysis.open_images", None)
    with pytest.raises(UsageError) as caught:
        cp.measure("digits_vit_24b", torch.zeros(8, 3, 8, 8), **{name: value})
    assert str(caught.value) == said


@pytest.mark.parametrize(("option", "value", "said"), TYPED, ids=label)
def test_from_the_shell(monkeypatch, option, value, said):
    monkeypatch.setattr("collapse_probe.networks.load_model", None)
    done = CliRunner().invoke(app, ["analyze", "digits_vit_24b", f"{option}={value}"], env={"COLUMNS": "200"})
    assert done.exit_code == 2, (done.stderr, done.exception)
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shard", [3, None, (1, 2), "2", "3/2", "0/1", "1/0", 1.5, "9" * 500 + "/1", True])
def test_shards(shard):
    with pytest.raises(UsageError, match="is no shard: write NUMBER/COUNT"):
        cp.measure(nn.Identity(), torch.zeros(8, 3, 8, 8), shard=shard)


def test_the_ends_of_every_range_are_inside():
    for changes in (
        {"batch_size": 10**6, "workers": 1000, "num_samples": 10**12, "nearest": 10**4, "seed": 2**63 - 1},
        {"tile_bytes": 2**50, "threshold": -1, "until_se": 1e-9},
        {"batch_size": 1, "workers": 0, "num_samples": 1, "nearest": 1, "seed": 0, "tile_bytes": 1, "threshold": 1},
        {"num_samples": None, "tile_bytes": None, "until_se": None, "workers": None},
    ):
        Options(**changes).check()


def test_the_largest_seed_is_of_use():
    assert cp.measure("digits_vit_24b", seed=2**63 - 1, num_samples=8, metrics="attention_entropy").images == 8


@pytest.mark.parametrize("value", [5, None, 1.5])
def test_layers_that_are_no_patterns(value):
    with pytest.raises(UsageError, match="layers must be patterns of names"):
        cp.measure("digits_vit_24b", layers=value)


@pytest.mark.parametrize("value", [5, "depth=3", ["depth"]])
def test_arguments_without_names(value):
    with pytest.raises(UsageError, match="model_kwargs must be arguments by name"):
        cp.load_model("vit_tiny_patch16_224", model_kwargs=value)
