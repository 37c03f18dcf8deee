"""What the page shows between two layers: every number is the analysis' own, pictures by token are close enough."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from collapse_probe.plots.details import over_windows
from collapse_probe.report import explorer as module
from collapse_probe.report.explorer import explorer
from collapse_probe.result import Analysis
from tests.analysis_factory import all_nan, hierarchy, make_analysis, make_full, two_groups


def _view(analysis: Analysis, reading: str, part: str = "all") -> dict[str, Any]:
    found = explorer(analysis)
    assert found is not None
    (view,) = (view for view in found.drawn["views"] if (view["reading"], view["part"]) == (reading, part))
    return view


def _unpacked(packed: dict[str, Any]) -> np.ndarray:
    """As the page's script does it: 255 stands for what is not defined."""
    levels = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).astype(float)
    levels[levels == 255] = np.nan
    return (packed["low"] + levels * (packed["high"] - packed["low"]) / 254).reshape(-1, packed["count"] or 1)


@pytest.mark.parametrize("reading", ["similarity", "centred", "image_independent", "excess", "cka"])
@pytest.mark.parametrize("analysis", [make_full(make_analysis()), make_full(two_groups()), make_full(hierarchy())])
def test_a_heatmap_holds_the_readings_under_their_layers(analysis: Analysis, reading: str) -> None:
    view = _view(analysis, reading)
    expected = analysis.matrix(reading)
    for row, first in zip(view["values"], view["layers"], strict=True):
        for value, second in zip(row, view["layers"], strict=True):
            wanted = expected.loc[first, second]
            assert (value is None and np.isnan(wanted)) or value == pytest.approx(wanted, rel=1e-4)


def test_errors_and_intervals_stand_beside_their_values() -> None:
    analysis = make_full(make_analysis())
    group = analysis.main_group
    view = _view(analysis, "similarity")
    assert np.allclose(view["se"], group.matrices["all"]["similarity_se"], rtol=1e-4)
    group.matrices["all"]["excess_low"] = group.matrices["all"]["excess"] - 0.25
    group.matrices["all"]["excess_high"] = group.matrices["all"]["excess"] + 0.5
    view = _view(analysis, "excess")
    assert np.allclose(np.array(view["values"]) - view["low"], 0.25, atol=1e-4)
    assert np.allclose(np.array(view["high"]) - view["values"], 0.5, atol=1e-4)


def test_parts_are_offered_where_there_are_any() -> None:
    with_prefix, without = explorer(make_analysis()), explorer(make_analysis(prefix=0))
    assert with_prefix is not None
    assert without is not None
    assert [name for name, _ in with_prefix.parts] == ["all", "prefix", "patch"]
    assert [name for name, _ in without.parts] == ["all"]


def test_the_most_alike_neighbours_are_shown_first() -> None:
    analysis = make_analysis()
    found = explorer(analysis)
    assert found is not None
    neighbours = np.diagonal(analysis.main_group.matrices["all"]["similarity"], 1)
    assert found.start == (int(neighbours.argmax()), int(neighbours.argmax()) + 1)


@pytest.mark.parametrize("analysis", [make_analysis(5, 4), make_analysis(3, 2, None, 0), hierarchy()])
def test_every_pair_by_head_and_token_is_near_the_truth(analysis: Analysis) -> None:
    found = explorer(analysis)
    assert found is not None
    for details in found.drawn["groups"]:
        group = next(item for item in analysis.groups if item.name == details["name"])
        by_head, count = group.arrays["similarity_by_head"], len(group.layers)
        by_token = over_windows(group, np.asarray(group.arrays["similarity_by_token"], dtype=float))
        heads = _unpacked(details["by_head"])
        prefix, patches = (_unpacked(details["by_token"][name]) for name in ("prefix", "patches"))
        pair = 0
        for first in range(count):
            for second in range(first + 1, count):
                assert np.allclose(heads[pair], by_head[first, second], atol=0.004, equal_nan=True)
                tokens = np.concatenate([prefix[pair], patches[pair]]) if len(prefix) else patches[pair]
                assert np.allclose(tokens, by_token[first, second], atol=0.004, equal_nan=True)
                pair += 1
        assert pair == len(heads) == len(patches)


def test_ends_and_gaps_survive_the_bytes() -> None:
    values = np.array([[0.25, np.nan, 0.75], [0.5, 0.25, np.nan]])
    back = _unpacked(module._quantised(values))
    assert np.array_equal(np.isnan(back), np.isnan(values))
    assert back[0, 0] == 0.25
    assert back[0, 2] == pytest.approx(0.75)
    assert np.isnan(_unpacked(module._quantised(np.full((2, 2), np.nan)))).all()
    assert (_unpacked(module._quantised(np.full((2, 2), 0.3))) == 0.3).all()


@pytest.mark.parametrize(("height", "width", "by"), [(4, 6, 2), (5, 7, 3), (3, 3, 5)])
def test_pooling_is_a_mean_over_squares(height: int, width: int, by: int) -> None:
    squares = np.random.default_rng(0).random((2, height, width))
    squares[0, 0, 0] = np.nan
    pooled = module._pooled(squares, by)
    assert pooled.shape[1] * pooled.shape[2] == module.pooled_size((height, width), by)
    for image in range(2):
        for row in range(pooled.shape[1]):
            for column in range(pooled.shape[2]):
                square = squares[image, row * by : (row + 1) * by, column * by : (column + 1) * by]
                assert pooled[image, row, column] == pytest.approx(np.nanmean(square))


def test_pictures_by_token_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET", 2000)
    found = explorer(make_analysis(6, 2, (14, 14)))
    assert found is not None
    (details,) = found.drawn["groups"]
    assert details["by_token"]["pooled"] == 2  # 15 pairs of 196 patches are 2940 bytes, of 49 they are 735
    assert tuple(details["by_token"]["grid"]) == (7, 7)
    line = explorer(make_analysis(6, 2, None, 0))
    assert line is not None
    assert len(base64.b64decode(line.drawn["groups"][0]["by_token"]["patches"]["bytes"])) <= 2000


def test_nothing_to_compare_is_no_explorer() -> None:
    assert explorer(make_analysis(1)) is None
    assert explorer(all_nan(make_analysis(3), "similarity", "centred", "image_independent", "excess")) is None
