"""Several analyses beside each other: one colour scale, one set of axes, the right numbers under the right label."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from collapse_probe import plots
from collapse_probe.errors import UsageError
from collapse_probe.plots.comparison import CURVES
from collapse_probe.result import Analysis
from tests.analysis_factory import all_nan, hierarchy, make_analysis

READINGS = ("similarity", "centred", "image_independent", "excess")


def _opposed(analysis: Analysis) -> Analysis:
    """Maps mixed after the softmax may oppose each other."""
    values = analysis.groups[0].matrices["all"]["similarity"]
    values[0, 1] = values[1, 0] = -0.4
    return analysis


def test_heatmaps_hold_their_own_matrix_on_a_common_scale() -> None:
    sides = {"plain": make_analysis(6), "mixed": _opposed(make_analysis(8))}
    figure, axes = plots.heatmaps_compared(sides)
    assert [ax.get_title(loc="left") for ax in axes] == ["plain", "mixed"]
    for ax, analysis in zip(axes, sides.values(), strict=True):
        mesh = ax.collections[0]
        matrix = analysis.groups[0].matrices["all"]["similarity"]
        assert_allclose(np.asarray(mesh.get_array()).reshape(matrix.shape), matrix)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (-1, 1)
    assert len(figure.axes) == 3  # one colour bar
    _, alone = plots.heatmaps_compared({"plain": make_analysis(6)})
    assert alone[0].collections[0].norm.vmin == 0


def test_curves_of_equal_depth_stand_by_block_and_others_by_relative_depth() -> None:
    same = {"first": make_analysis(6), "second": make_analysis(6)}
    _, axes = plots.curves_compared(same)
    assert axes[0].get_xlabel() == "Block"
    assert_allclose(axes[0].lines[0].get_xdata(), np.arange(6))
    _, axes = plots.curves_compared({"first": make_analysis(6), "second": make_analysis(9)})
    assert axes[0].get_xlabel() == "Relative depth"
    assert_allclose(axes[0].lines[1].get_xdata(), np.arange(9) / 8)


def test_each_panel_shows_each_analysis_under_its_label() -> None:
    sides = {"first": make_analysis(6), "second": make_analysis(9)}
    figure, axes = plots.curves_compared(sides)
    titles = {title: name for name, title in CURVES.items()}
    assert axes.size >= 4
    for ax in axes:
        lines = {line.get_label(): line for line in ax.lines}
        for label, analysis in sides.items():
            assert_allclose(
                lines[label].get_ydata(), analysis.layers[titles[ax.get_title(loc="left").replace("\n", " ")]]
            )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes[0].lines[:2]}
    assert all(len(set(values)) == 2 for values in zip(*looks, strict=True))  # not by colour alone


def test_awkward_analyses_can_be_drawn() -> None:
    sides = {
        "nothing defined": all_nan(make_analysis(), *READINGS),
        "several groups": hierarchy(),
        "one layer": make_analysis(1),
    }
    for draw in (plots.heatmaps_compared, plots.curves_compared):
        plots.render(draw(sides)[0], dpi=50)


def test_what_cannot_be_compared_is_told() -> None:
    empty = make_analysis()
    empty.groups.clear()
    for draw in (plots.heatmaps_compared, plots.curves_compared):
        with pytest.raises(UsageError, match="Between 1 and 4 analyses"):
            draw({})
        with pytest.raises(UsageError, match="not 5"):
            draw({str(number): make_analysis(2) for number in range(5)})
        with pytest.raises(UsageError, match="'empty' holds no layers"):
            draw({"empty": empty})
    with pytest.raises(UsageError, match="reading='nonsense' is unknown"):
        plots.heatmaps_compared({"one": make_analysis()}, "nonsense")
