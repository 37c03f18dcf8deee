"""Readings over training steps: the right numbers at the right step, one colour scale, an axis that suits the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.testing import assert_allclose

from collapse_probe import plots
from collapse_probe.errors import UsageError
from collapse_probe.plots.over_steps import CURVES, spaced, title_of
from collapse_probe.series import Series
from tests.analysis_factory import all_nan, hierarchy, make_analysis, make_full

READINGS = ("similarity", "centred", "image_independent", "excess")


def _series(steps: Sequence[float], layers: int = 6, unit: str = "step") -> Series:
    """Blocks grow less alike with every checkpoint."""
    analyses = {}
    for number, step in enumerate(steps):
        analysis = make_analysis(layers)
        analysis.layers["similarity_to_previous"] -= 0.05 * number
        analysis.groups[0].matrices["all"]["similarity"] *= 0.95**number
        analyses[step] = analysis
    return Series.from_analyses(analyses, unit)


def test_curves_show_mean_range_and_single_blocks() -> None:
    series = _series([0, 500, 1000])
    figure, axes = plots.over_steps(series)
    assert [ax.get_title(loc="left") for ax in axes] == list(CURVES.values())
    tables = [analysis.layers for analysis in series.analyses.values()]
    for name, ax in zip(CURVES, axes, strict=True):
        lines = {line.get_label(): line for line in ax.lines}
        assert_allclose(lines["mean of blocks"].get_ydata(), [table[name].mean() for table in tables])
        assert_allclose(lines["mean of blocks"].get_xdata(), [0, 500, 1000])
        for block in (1, 3, 5):
            assert_allclose(lines[f"block {block}"].get_ydata(), [table[name].iloc[block] for table in tables])
        extent = ax.collections[0].get_paths()[0].get_extents()
        assert_allclose(
            [extent.y0, extent.y1], [min(t[name].min() for t in tables), max(t[name].max() for t in tables)]
        )
    assert [ax.get_xlabel() for ax in axes] == [""] * 3 + ["Training step"] * 3
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes[0].lines[:4]]
    assert all(len(set(values)) == 4 for values in zip(*looks, strict=True))  # not by colour alone
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["block 1", "block 3", "block 5", "mean of blocks", "smallest to largest block"]


def test_bands_are_standard_errors() -> None:
    series = _series([0, 1])
    _, axes = plots.over_steps(series, ["normalized_entropy"])
    band = axes[0].collections[1].get_paths()[0].vertices
    table = series.analyses[0].layers
    value, error = table["normalized_entropy"].iloc[1], table["normalized_entropy_se"].iloc[1]
    assert_allclose(sorted(set(np.round(band[:, 1][band[:, 0] == 0], 9))), np.round([value - error, value + error], 9))


def test_any_reading_can_be_asked_for() -> None:
    full = Series.from_analyses({step: make_full(make_analysis(), step) for step in range(3)})
    _, axes = plots.over_steps(full, ["effective_rank", "sink_share_prefix", "outlier_tokens_absent"][:2])
    assert axes.size == 2
    assert axes[0].get_title(loc="left") == "Effective rank of maps"
    with pytest.raises(UsageError, match="'nonsense' is no reading"):
        plots.over_steps(full, ["nonsense"])


@pytest.mark.parametrize(
    ("steps", "scale"),
    [
        ([0, 500, 1000, 1500], "linear"),
        (list(range(0, 100_000, 500)), "linear"),  # spans decades, evenly
        ([1, 10, 100, 1000], "log"),
        ([0, 1, 10, 100, 1000], "symlog"),
        ([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 4000], "symlog"),
        ([1, 1000], "linear"),
        ([7], "linear"),
        ([-1000, 1, 10, 1000], "linear"),
    ],
)
def test_the_axis_suits_the_steps(steps: list[float], scale: str) -> None:
    _, axes = plots.over_steps(_series(steps, layers=3), ["similarity_to_previous"])
    assert axes[0].get_xscale() == scale


@pytest.mark.parametrize(
    ("unit", "label", "title"),
    [
        ("step", "Training step", "Step 20000"), ("epoch", "Epoch", "Epoch 20000"),
        ("number", "Number in the name", "No. 20000"), ("order", "Checkpoint, by time of writing", "Checkpoint 20000"),
    ],
)  # fmt: skip
def test_units_in_words(unit: str, label: str, title: str) -> None:
    series = _series([10000, 20000], unit=unit)
    figure, axes = plots.over_steps(series)
    assert axes[-1].get_xlabel() == label
    plots.render(figure, dpi=50)
    assert "20k" in [text.get_text() for text in axes[0].get_xticklabels()]
    assert title_of(series, 1) == title


def test_heatmaps_hold_the_matrix_of_their_step_on_one_scale() -> None:
    series = _series([0, 500, 1000])
    series.points[1].analysis.groups[0].matrices["all"]["similarity"][0, 1] = -0.4
    figure, axes = plots.heatmaps_over_steps(series)
    assert [ax.get_title(loc="left") for ax in axes] == ["Step 0", "Step 500", "Step 1000"]
    for ax, analysis in zip(axes, series.analyses.values(), strict=True):
        mesh = ax.collections[0]
        matrix = analysis.groups[0].matrices["all"]["similarity"]
        assert_allclose(np.asarray(mesh.get_array()).reshape(matrix.shape), matrix)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (-1, 1)
    assert len(figure.axes) == 4  # one colour bar
    for place in range(3):
        _, ax = plots.heatmap_at(series, place)
        assert (ax.collections[0].norm.vmin, ax.get_title(loc="left")) == (-1, title_of(series, place))


def test_of_many_steps_some_are_shown_and_always_the_first_and_the_last() -> None:
    assert spaced(3, 12) == [0, 1, 2]
    assert spaced(100, 1) == [99]
    for count in range(1, 200):
        chosen = spaced(count, 12)
        assert len(chosen) == min(count, 12)
        assert (chosen[0], chosen[-1]) == (0, count - 1)
        assert max(np.diff(chosen), default=1) - min(np.diff(chosen), default=1) <= 1
    _, axes = plots.heatmaps_over_steps(_series(range(40), layers=2))
    assert axes.size == 12
    _, axes = plots.heatmaps_over_steps(_series(range(40), layers=2), most=5)
    assert [ax.get_title(loc="left") for ax in axes][::4] == ["Step 0", "Step 39"]


def test_awkward_series_can_be_drawn() -> None:
    awkward = {
        "nothing defined": all_nan(make_analysis(), *READINGS),
        "several groups": hierarchy(),
        "one layer": make_analysis(1),
    }
    for analysis in awkward.values():
        series = Series.from_analyses({0: analysis, 1: make_analysis(len(analysis.layers))})
        for draw in (plots.over_steps, plots.heatmaps_over_steps):
            plots.render(draw(series)[0], dpi=40)
        plots.render(plots.heatmap_at(series, 0)[0], dpi=40)
    bare = make_analysis()
    bare.layers = bare.layers[["kind", "group", "block"]]
    assert plots.over_steps(Series.from_analyses({0: bare}))[1].size == 1


def test_models_of_different_depth_have_no_blocks_in_common() -> None:
    _, axes = plots.over_steps(Series.from_analyses({0: make_analysis(4), 1: make_analysis(6)}))
    assert [line.get_label() for line in axes[0].lines if not line.get_label().startswith("_")] == ["mean of blocks"]


def test_what_cannot_be_drawn_is_told() -> None:
    empty = make_analysis()
    empty.groups.clear()
    series = Series.from_analyses({7: empty})
    for draw in (plots.over_steps, plots.heatmaps_over_steps, lambda item: plots.heatmap_at(item, 0)):
        with pytest.raises(UsageError, match="'step 7' holds no layers"):
            draw(series)
    for most in (0, True, 2.5):
        with pytest.raises(UsageError, match=r"most=.* must be a whole number, 1 or more"):
            plots.heatmaps_over_steps(_series([1]), most=most)
    with pytest.raises(UsageError, match="reading='nonsense' is unknown"):
        plots.heatmaps_over_steps(_series([1]), "nonsense")
