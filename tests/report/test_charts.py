"""The charts by depth: values, bands, gaps and groups are those of the analysis; each reading is explained once."""

from __future__ import annotations

import numpy as np
import pytest

from collapse_probe import references
from collapse_probe.plots.select import column, spread
from collapse_probe.readings import READINGS
from collapse_probe.report import render_html
from collapse_probe.report.charts import numbers, sections
from collapse_probe.result import Analysis
from tests.analysis_factory import all_nan, hierarchy, make_analysis, make_full, two_groups


@pytest.mark.parametrize("analysis", [make_full(make_analysis()), make_full(two_groups()), make_full(hierarchy())])
def test_lines_hold_the_table(analysis: Analysis) -> None:
    seen = 0
    for section in sections(analysis):
        for chart in section.charts:
            if chart.drawn["kind"] != "depth":
                continue
            table = analysis.layers.loc[chart.drawn["layers"]]
            for line in chart.drawn["lines"]:
                found = [name for name in chart.drawn["readings"] if _is(line["values"], column(table, name))]
                assert found
                low, high, _ = spread(table, found[0])
                assert _is(line["low"], low)
                assert _is(line["high"], high)
                seen += 1
            places = [at for lane in chart.drawn["lanes"] for at in lane]
            assert sorted(places) == list(range(len(table)))
    assert seen > 20


def _is(drawn: list[float | None], values: np.ndarray) -> bool:
    return np.allclose(np.array(drawn, dtype=float), values, rtol=1e-4, equal_nan=True)


def test_groups_have_lanes_and_letters() -> None:
    chart = sections(two_groups())[0].charts[0].drawn
    assert chart["lanes"] == [list(range(10)), [10, 11]]
    assert chart["brackets"] == [[0, 10, "A"], [10, 12, "B"]]
    assert sections(make_analysis())[0].charts[0].drawn["brackets"] == []


def test_what_is_not_defined_is_not_drawn() -> None:
    analysis = all_nan(make_analysis(), "centred")
    analysis.layers["centred_to_previous"] = np.nan
    labels = [line["label"] for chart in sections(analysis)[0].charts for line in chart.drawn["lines"]]
    assert "centred" not in labels
    assert "excess" in labels
    assert numbers(np.array([np.nan, 0.123456789, np.inf])) == [None, 0.12346, None]


def test_each_reading_is_explained_once_in_a_section() -> None:
    for section in sections(make_full(make_analysis())):
        labels = [label for chart in section.charts for label, _, _ in chart.meanings]
        assert len(set(labels)) == len(labels)
        assert labels


def test_references_are_of_known_readings_and_stand_on_the_page() -> None:
    known = references.known()
    assert set(known) <= set(READINGS)
    assert {"similarity_to_previous", "normalized_entropy", "head_diversity", "token_similarity"} <= set(known)
    for entries in known.values():
        assert any(item.healthy for item in entries)
        assert all(item.low <= item.high for item in entries)
    assert references.in_words("normalized_entropy") in render_html(make_analysis())
    assert references.in_words("no such reading") == ""
