"""The registry of readings says what the suite measures: no column without a name, no name without a column."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import collapse_probe
from collapse_probe import readings
from collapse_probe.metrics.map_rank import SAMPLE
from collapse_probe.metrics.suite import suite
from collapse_probe.metrics.tile_metric import TileMetric
from collapse_probe.readings import (
    BOOKKEEPING,
    DERIVED,
    FAMILIES,
    METRICS,
    READINGS,
    companion,
    is_bookkeeping,
    reading_of,
)
from collapse_probe.result import Analysis

PAGE = Path(__file__).resolve().parents[1] / "docs" / "readings.md"


@pytest.fixture(scope="module")
def everything() -> Analysis:
    """Every metric of the suite, on a model with a class token and a patch grid."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, depth=3, img_size=64, embed_dim=24, num_heads=3
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return collapse_probe.analyze(model, torch.randn(16, 3, 64, 64), metrics="all")


def test_every_column_is_a_reading_or_bookkeeping(everything: Analysis) -> None:
    unknown = [name for name in everything.layers if reading_of(name) is None and not is_bookkeeping(name)]
    assert not unknown
    both = [name for name in everything.layers if reading_of(name) is not None and is_bookkeeping(name)]
    assert not both


def test_every_reading_is_a_column(everything: Analysis) -> None:
    missing = [name for name in READINGS if name not in everything.layers]
    assert not missing
    empty = [name for name in READINGS if everything.layers[name].isna().all()]
    assert not empty


def test_readings_keep_to_their_range(everything: Analysis) -> None:
    heads, keys = 3, 17
    limits = {
        "0 to 1": (0, 1), "−1 to 1": (-1, 1), "0 and up": (0, np.inf), "1 and up": (1, np.inf), "1 to H": (1, heads),
        "0 to log K": (0, np.log(keys)), "0 to log 2": (0, np.log(2)), "1 to min(Q, K)": (1, keys),
        "1/K to 1": (1 / keys, 1), "1/Q to 1": (1 / keys, 1),
    }  # fmt: skip
    checked = [name for name, reading in READINGS.items() if reading.range in limits]
    assert len(checked) > 25
    for name in checked:
        low, high = limits[READINGS[name].range]
        values = everything.layers[name].dropna().to_numpy(dtype=float)
        assert (values >= low - 1e-6).all(), name
        assert (values <= high + 1e-6).all(), name


def test_intervals_are_where_the_registry_says(everything: Analysis) -> None:
    columns = list(everything.layers)
    for name, reading in READINGS.items():
        assert (companion(columns, name, "_low") is not None) == reading.interval, name
        assert (companion(columns, name, "_high") is not None) == reading.interval, name


def test_groups_have_the_derived_readings_of_the_registry(everything: Analysis) -> None:
    (group,) = everything.groups
    assert list(group.derived) == list(DERIVED)
    assert all({"value", "low", "high"} <= set(entry) for entry in group.derived.values())


def test_the_metrics_are_those_of_the_suite() -> None:
    classes = suite()
    assert sorted(METRICS) == sorted(classes)
    for name, metric in METRICS.items():
        assert metric.cost == classes[name].cost
        assert metric.sample == (SAMPLE if name == "map_rank" else None)
        if issubclass(classes[name], TileMetric):
            assert metric.reads == {"applied": readings.APPLIED, "softmax": readings.SOFTMAX}[classes[name].map]
        else:
            assert metric.reads == readings.FEATURES
        assert any(reading.metric == name for reading in READINGS.values()), f"{name} has no reading"


def test_every_reading_is_told_in_full() -> None:
    assert {reading.family for reading in READINGS.values()} == set(FAMILIES)
    for name, reading in READINGS.items():
        assert reading.name == name
        assert reading.metric in METRICS
        assert all((reading.label, reading.short, reading.unit, reading.range, reading.meaning, reading.source))
    labels = [reading.label for reading in READINGS.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("column", ["relative_variation_se_prefix", "relative_variation_prefix_se"])
def test_endings_come_in_either_order(column: str) -> None:
    assert reading_of(column) is READINGS["relative_variation"]
    assert companion([column], "relative_variation_prefix", "_se") == column
    assert companion([column], "relative_variation_patch", "_se") is None
    assert companion([column], "relative_variation", "_se") is None


def test_names_that_look_like_endings_are_kept() -> None:
    assert reading_of("prefix_attention_se") is READINGS["prefix_attention"]
    assert reading_of("image_independent_to_previous_low") is READINGS["image_independent_to_previous"]
    assert reading_of("sink_share_patch_se") is READINGS["sink_share"]
    assert reading_of("nonsense_se") is None
    assert not is_bookkeeping("nonsense_absent")
    assert is_bookkeeping("cka_absent")
    assert all(is_bookkeeping(name) for name in BOOKKEEPING)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == readings.as_markdown(), (
        "run: collapse-probe metrics --markdown > docs/readings.md"
    )


def test_the_page_has_a_row_for_each_reading() -> None:
    page = readings.as_markdown()
    families, _, rest = page.partition("## Metrics")
    metrics, _, rest = rest.partition("## Other columns")
    others, _, derived = rest.partition("## Readings of a group")
    for part, names, cells in (
        (families, READINGS, 7),
        (metrics, METRICS, 5),
        (others, BOOKKEEPING, 2),
        (derived, DERIVED, 2),
    ):
        rows = [row.replace("\\|", "") for row in part.splitlines() if row.startswith("| `")]
        assert sorted(row.split("`")[1] for row in rows) == sorted(names)
        assert {row.count("|") for row in rows} == {cells + 1}


def test_the_command_lists_explains_and_loads_no_torch() -> None:
    listed = _run("metrics")
    for name, metric in METRICS.items():
        line = next(line for line in listed.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1] == metric.cost
        assert metric.reads in line
    assert max(map(len, listed.splitlines())) <= 80
    assert listed.isascii()
    one = _run("metrics", "attention_sinks")
    assert "\nconstant_rows\n" in one
    assert "\nentropy\n" not in one
    assert _run("metrics", "--markdown") == readings.as_markdown()
    stored = json.loads(_run("metrics", "cka", "--json"))
    assert [item["name"] for item in stored["metrics"]] == ["cka"]
    assert [item["name"] for item in stored["readings"]] == ["cka_to_previous"]
    code = (
        "import sys\nfrom collapse_probe.cli.app import app\ntry:\n    app(['metrics'])\nexcept SystemExit:\n    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_metric_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "collapse_probe", "metrics", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "There is no metric 'nonsense'. Choose among attention_distance," in done.stderr


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "collapse_probe", *arguments], capture_output=True, check=True)
    return done.stdout.decode("utf-8")
