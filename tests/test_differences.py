"""Differences between analyses: places, jackknife, intervals and p values against naive loops and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from collapse_probe import differences
from collapse_probe.result import Analysis
from tests.analysis_factory import make_analysis, make_full, two_groups


def test_places_cover_the_depth() -> None:
    found = differences.places([f"block{number}" for number in range(7)])
    assert found["first third"] == ["block0", "block1"]
    assert found["middle third"] == ["block2", "block3", "block4"]
    assert found["last third"] == ["block5", "block6"]
    assert found["all blocks"] == [f"block{number}" for number in range(7)]
    assert found["block 3"] == ["block3"]


@pytest.mark.parametrize("count", [1, 2, 3, 24, 32])
def test_every_layer_is_in_one_third(count: int) -> None:
    found = differences.places([str(number) for number in range(count)])
    together = [layer for name in differences.THIRDS for layer in found[name]]
    assert together == [str(number) for number in range(count)]


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=11)
    without = np.array([np.delete(values, place).mean() for place in range(11)])
    assert differences.jackknife_error(without) == pytest.approx(values.std(ddof=1) / math.sqrt(11))


def _shifted(analysis: Analysis, by: float) -> Analysis:
    analysis.layers["head_diversity"] += by
    return analysis


def test_paired_differences_are_those_of_the_groups() -> None:
    """With readings that are means over images, the jackknife test is the ordinary paired t test over groups."""
    generator = np.random.default_rng(1)
    groups = generator.normal(0.02, 0.01, size=(6, 2)).cumsum(1)  # what each group adds to both models' reading
    without = [tuple(np.delete(groups, place, axis=0).mean(0)) for place in range(6)]
    first, second = (_shifted(make_analysis(), by) for by in groups.mean(0))
    pairs = [tuple(_shifted(make_analysis(), by) for by in item) for item in without]
    table = differences.paired(first, second, pairs)
    row = table[(table["reading"] == "head_diversity") & (table["where"] == "middle third")].iloc[0]
    expected = stats.ttest_rel(groups[:, 1], groups[:, 0])
    assert row["difference"] == pytest.approx(groups.mean(0)[1] - groups.mean(0)[0])
    assert row["p"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert [row["low"], row["high"]] == pytest.approx([interval.low, interval.high])
    same = table[table["reading"] == "normalized_entropy"]
    assert (same["difference"] == 0).all()
    assert (same["p"] == 1).all()


def test_values_are_means_over_the_blocks_of_the_main_group() -> None:
    analysis = two_groups()
    found = differences.values_at(analysis)
    values = [analysis.layers["head_diversity"].iloc[number] for number in range(10)]
    assert found["head_diversity", "all blocks"] == pytest.approx(sum(values) / 10)
    assert found["head_diversity", "block 9"] == pytest.approx(values[9])
    assert ("head_diversity", "block 10") not in found


def test_blocks_are_compared_only_at_equal_depth() -> None:
    shallow, deep = make_analysis(6), make_analysis(12)
    assert differences.shared_places(shallow, deep) == {"all blocks", "first third", "middle third", "last third"}
    assert "block 5" in differences.shared_places(shallow, make_analysis(6))


def test_saved_analyses_have_the_errors_of_both() -> None:
    first, second = make_full(make_analysis()), _shifted(make_full(make_analysis()), 0.1)
    table = differences.unpaired(first, second)
    row = table[(table["reading"] == "head_diversity") & (table["where"] == "block 4")].iloc[0]
    error = first.layers["head_diversity_se"].iloc[4]
    assert row["difference"] == pytest.approx(0.1)
    assert row["se"] == pytest.approx(math.sqrt(2) * error)
    assert row["high"] - row["low"] == pytest.approx(2 * stats.t.ppf(0.975, 49) * row["se"])


def test_few_groups_give_no_error() -> None:
    table = differences.paired(make_analysis(), make_analysis(), [(make_analysis(), make_analysis())] * 3)
    assert table["se"].isna().all()
    assert table["p"].isna().all()
    assert table["p_adjusted"].isna().all()


def test_holm_against_a_loop() -> None:
    p = np.array([0.02, np.nan, 0.001, 0.4, 0.02, 0.03])
    known = sorted(value for value in p if not math.isnan(value))
    adjusted = differences.holm(p)
    assert math.isnan(adjusted[1])
    for value, found in zip(p, adjusted, strict=True):
        if math.isnan(value):
            continue
        largest = 0.0
        for rank, other in enumerate(known):
            if other <= value:
                largest = max(largest, other * (len(known) - rank))
        assert found == pytest.approx(min(1.0, largest))


@pytest.mark.parametrize(
    ("difference", "error", "expected"), [(0.0, 0.0, 1.0), (0.1, 0.0, 0.0), (0.1, math.nan, math.nan)]
)
def test_p_values_at_the_edges(difference: float, error: float, expected: float) -> None:
    assert differences.p_value(difference, error, 5) == pytest.approx(expected, nan_ok=True)
